"""Which pair a person sees next, and which reply stands first. Pure functions."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

from ppomax.eval.pairs import Choice, Pair, Question

Seen = Literal["first", "second", "tie", "skip"]
"""A choice as the person made it: by place, not by model."""

HARM_KINDS = frozenset({"harmful", "harmless", "sensitive"})
"""Kinds of prompts whose replies are compared for harm; every other is asked for help."""


def question_of(pair: Pair) -> Question:
    """What is asked about a pair, by the kind of its prompt."""
    return "harmless" if pair.kind in HARM_KINDS else "helpful"


def swapped(annotator: str, pair: str) -> bool:
    """Whether reply `b` stands first: a fair coin that is the same each time it is asked."""
    return _draw("side", annotator, pair) % 2 == 1


def unswap(seen: Seen, turned: bool) -> Choice:
    """The side of the pair that a choice by place means."""
    if seen in ("tie", "skip"):
        return seen
    return "b" if (seen == "second") != turned else "a"


def next_pair(
    annotator: str, open_pairs: Iterable[str], given: Mapping[str, int], quota: int
) -> str | None:
    """The pair with the fewest votes so far; of equals, one in the person's own random order.

    So a job that is stopped early has votes on as many pairs as it could have.

    Args:
        annotator: who asks.
        open_pairs: those the person has not voted on.
        given: votes of each pair, those that others are about to give included.
        quota: votes that are enough.
    """
    wanted = (pair for pair in open_pairs if given.get(pair, 0) < quota)
    return min(wanted, key=lambda p: (given.get(p, 0), _draw("order", annotator, p)), default=None)


def _draw(what: str, annotator: str, pair: str) -> int:
    text = "\0".join((what, annotator, pair))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
