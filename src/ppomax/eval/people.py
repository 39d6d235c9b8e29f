"""People's votes on pairs, as `ppomax annotate` writes them, turned into verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ppomax.errors import DataError
from ppomax.eval.agreement import majority
from ppomax.eval.outcomes import Judged, Side, question_of
from ppomax.eval.pairs import (
    QUESTIONS,
    Pair,
    Verdict,
    read_verdicts,
    swapped_hash,
    verdicts_for,
)


@dataclass(frozen=True, slots=True)
class Votes:
    """What a verdict file says of some pairs."""

    rows: list[Judged]
    """One per pair and question that has a vote: the side with the most votes."""
    raters: dict[str, dict[str, Side]]
    """Each annotator's verdicts by pair and question."""
    notes: dict[str, int]


def read_votes(pairs: Sequence[Pair], path: Path) -> Votes:
    """The votes of a file on these pairs.

    Equal replies tie on the questions voted on, without a vote on the one of their kind.

    Raises:
        DataError: unreadable, empty, or no vote is on one of the pairs.
    """
    verdicts = read_verdicts(path)
    if not verdicts:
        raise DataError(f"{path}: no verdicts; `ppomax annotate PAIRS --out FILE` writes them")
    by_pair: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_pair.setdefault(verdict.pair, []).append(verdict)
    rows, raters = [], dict[str, dict[str, Side]]()
    for pair in pairs:
        votes = verdicts_for(pair, by_pair)
        for question in QUESTIONS:
            sides: list[Side] = []
            for vote in votes:
                if vote.question == question and vote.verdict != "skip":
                    sides.append(vote.verdict)
                    item = f"{pair.pair} {question}"
                    raters.setdefault(vote.annotator, {})[item] = vote.verdict
            if pair.a.response == pair.b.response:
                voted_on = {vote.question for vote in votes} or {question_of(pair.kind)}
                sides = ["tie"] if question in voted_on else []
            if sides:
                side = majority(sides)
                rows.append(Judged(pair, question, side, side, ordered=False))
    here = {pair.pair for pair in pairs} | {swapped_hash(pair) for pair in pairs}
    foreign = sum(verdict.pair not in here for verdict in verdicts)
    if not raters:
        other = verdicts[0]
        raise DataError(
            f"{path}: none of {len(verdicts)} verdicts is on these replies; the first is on "
            f"{other.a!r} and {other.b!r}, prompt {other.prompt_id}"
        )
    voted = {row.pair.pair for row in rows}
    notes = {
        "pairs without a vote": sum(pair.pair not in voted for pair in pairs),
        "votes on other pairs": foreign,
        "skipped": sum(verdict.verdict == "skip" for verdict in verdicts),
    }
    return Votes(rows, raters, {name: count for name, count in notes.items() if count})
