"""The steps of a reply, for process rewards: their texts, and the token on which each ends."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """One step of a reply."""

    text: str
    """Without the separator."""
    end: int
    """Characters of the reply up to its end, the separator that closes it included."""


def split_steps(text: str, separator: str) -> list[Step]:
    """A reply cut at every separator; pieces of white space alone are no steps.

    A reply of white space alone is one step, so that there is something to judge.
    """
    steps, place = [], 0
    for piece in text.split(separator):
        place += len(piece) + len(separator)
        if piece.strip():
            steps.append(Step(piece, min(place, len(text))))
    return steps or [Step(text, len(text))]


def last_tokens(
    ids: Sequence[int], text: str, steps: Sequence[Step], decode: Callable[[Sequence[int]], str]
) -> list[int]:
    """Index of each step's last token; the last step's is the reply's last, its end token.

    A step ends with the first token after which the text decoded so far holds the step and its
    separator whole. Prefixes of the ids are decoded and nothing is tokenised again: another
    tokenisation of the same text may have other boundaries.

    Args:
        ids: of the reply, at least one.
        text: the whole reply decoded.
    """
    places = []
    for step in steps[:-1]:
        wanted = text[: step.end]
        low, high = 1, len(ids)
        while low < high:  # longer prefixes hold what shorter ones hold
            middle = (low + high) // 2
            if decode(ids[:middle]).startswith(wanted):
                high = middle
            else:
                low = middle + 1
        places.append(low - 1)
    return [*places, len(ids) - 1]
