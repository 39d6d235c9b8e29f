"""Preference pairs out of votes, as `ppomax reward` reads them: the loop closes."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ppomax import rundir
from ppomax.annotate.votes import read_votes
from ppomax.errors import ConfigError, DataError
from ppomax.eval.pairs import Pair, Question, Verdict, read_pairs


@dataclass(frozen=True, slots=True)
class Export:
    """Preference rows, and the pairs that gave none, by reason."""

    rows: list[dict[str, object]]
    left_out: Counter[str]


def preferences(pairs: Sequence[Pair], votes: Sequence[Verdict]) -> Export:
    """One row for each pair and question on which more people prefer one reply than the other."""
    tallies: dict[str, dict[Question, Counter[str]]] = {}
    for vote in votes:
        if vote.verdict != "skip":
            by_question = tallies.setdefault(vote.pair, {})
            by_question.setdefault(vote.question, Counter())[vote.verdict] += 1
    found = Export([], Counter())
    for pair in pairs:
        if pair.pair not in tallies:
            found.left_out["without a vote"] += 1
        for question, tally in tallies.get(pair.pair, {}).items():
            reason = _unusable(pair, tally)
            if reason:
                found.left_out[reason] += 1
            else:
                found.rows.append(_row(pair, question, tally))
    return found


def export_preferences(pairs: Path, votes: Path, out: Path) -> list[str]:
    """Write the preference file; returns what to say of it.

    Raises:
        ConfigError: `out` is one of the files read, or cannot be written.
        DataError: a file is unreadable, the votes are on other pairs, or none decides a pair.
    """
    if out.resolve() in (pairs.resolve(), votes.resolve()):
        raise ConfigError(f"option export: {out} is a file that is read here; name another")
    found_pairs = read_pairs(pairs)
    if not votes.exists():
        raise DataError(f"{votes}: no such file; `ppomax annotate` without --export collects votes")
    found = preferences(found_pairs, read_votes(found_pairs, votes))
    left_out = "; ".join(f"{count} {reason}" for reason, count in found.left_out.items())
    if not found.rows:
        raise DataError(f"{votes}: no preference comes of these votes ({left_out})")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
    try:
        rundir.write_text(out, text)
    except OSError as error:
        raise ConfigError(f"option export: cannot write {out} ({error.strerror})") from None
    kinds = Counter(str(row["kind"]) for row in found.rows)
    named = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    lines = [f"{len(found.rows)} preference pairs in {out} ({named})"]
    return lines + ([f"left out: {left_out}"] if left_out else [])


def _unusable(pair: Pair, tally: Counter[str]) -> str | None:
    if tally["a"] == tally["b"]:
        return "without a majority"
    texts = {pair.a.response.strip(), pair.b.response.strip()}
    if "" in texts:
        return "with an empty reply"
    if len(texts) == 1:
        return "with equal replies"
    return None


def _row(pair: Pair, question: Question, tally: Counter[str]) -> dict[str, object]:
    a_wins = tally["a"] > tally["b"]
    chosen, rejected = (pair.a, pair.b) if a_wins else (pair.b, pair.a)
    for_chosen, for_rejected = sorted((tally["a"], tally["b"]), reverse=True)
    return {
        "id": f"{pair.pair}-{question}",
        "prompt": list(pair.messages),
        "chosen": chosen.response,
        "rejected": rejected.response,
        "kind": question,
        "lang": pair.lang,
        "label_by": "people",
        "votes_chosen": for_chosen,
        "votes_rejected": for_rejected,
        "votes_tie": tally["tie"],
    }
