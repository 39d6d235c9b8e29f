"""The votes of people on the pairs of one file. All that matters is in the vote file."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from ppomax.annotate.queue import Seen, next_pair, question_of, swapped, unswap
from ppomax.errors import DataError, PpomaxError
from ppomax.eval.pairs import Pair, Verdict, append_line, append_verdict, read_verdicts

RESERVED_SECONDS = 15 * 60.0
"""How long a pair that someone has open counts towards its quota."""


class Conflict(PpomaxError):
    """A vote or an undo that does not fit what is on disk; nothing was written."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one person and all together are."""

    mine: int
    """Pairs this person has dealt with, skipped ones included."""
    left: int
    """Pairs this person could still vote on."""
    votes: int
    """Votes of everyone that count towards the quota."""
    wanted: int
    seconds: float | None
    """Median time of this person's votes."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """The pair a person has open."""

    pair: str
    since: float
    note: str = ""
    """Of the vote that was undone."""


def read_votes(pairs: list[Pair], path: Path) -> list[Verdict]:
    """The votes that stand, oldest first; none where there is no file yet.

    Raises:
        DataError: unreadable, or a vote on something else than these pairs.
    """
    if not path.exists():
        return []
    known = {pair.pair: pair for pair in pairs}
    votes = read_verdicts(path)
    for vote in votes:
        pair = known.get(vote.pair)
        if pair is None:
            raise DataError(
                f"{path}: holds a vote of {vote.annotator!r} on pair {vote.pair[:12]} "
                f"(prompt {vote.prompt_id!r:.60}), not one of the {len(pairs)} pairs given; "
                "name the pair file it belongs to, or a new file for the votes"
            )
        if (vote.a, vote.b) != (pair.a.name, pair.b.name):
            raise DataError(
                f"{path}: holds a vote on {vote.a} against {vote.b} where the pair file has "
                f"{pair.a.name} against {pair.b.name}; name a new file for the votes"
            )
    return votes


class Votes:
    """Votes given so far and who has what open; every change is on disk before it is taken in.

    The votes are a function of the file. Who has which pair open is not kept: after a restart at
    most one vote per person beyond the quota comes of that.
    """

    def __init__(
        self, pairs: list[Pair], path: Path, *, quota: int, clock: Callable[[], float]
    ) -> None:
        self.path, self.quota, self.clock = path, quota, clock
        self.pairs = {pair.pair: pair for pair in pairs}
        self.reserved: dict[str, Reserved] = {}
        self.given: dict[tuple[str, str], Verdict] = {}
        """By person and pair, oldest first."""
        for vote in read_votes(pairs, path):
            if vote.question == question_of(self.pairs[vote.pair]):
                self.given[vote.annotator, vote.pair] = vote

    def current(self, annotator: str) -> Pair | None:
        """The pair this person is to vote on, reserved from now on; the same until they do."""
        held = self.reserved.get(annotator)
        counts = self._counts(besides=annotator)
        open_pairs = self._open(annotator)
        if held is None or held.pair not in open_pairs or counts[held.pair] >= self.quota:
            found = next_pair(annotator, open_pairs, counts, self.quota)
            held = None if found is None else Reserved(found, self.clock())
        if held is None:
            self.reserved.pop(annotator, None)
            return None
        self.reserved[annotator] = Reserved(held.pair, self.clock(), held.note)
        return self.pairs[held.pair]

    def note(self, annotator: str) -> str:
        """What the undone vote on the current pair said."""
        held = self.reserved.get(annotator)
        return held.note if held else ""

    def vote(self, annotator: str, pair: str, seen: Seen, note: str, seconds: float) -> None:
        """Append a vote. The same one sent again, after a lost answer, changes nothing.

        Raises:
            Conflict: no such pair, or this person has another vote on it.
            OSError: the vote could not be written and is not taken in.
        """
        found = self.pairs.get(pair)
        if found is None:
            raise Conflict(f"there is no pair {pair[:40]!r}")
        choice = unswap(seen, swapped(annotator, pair))
        earlier = self.given.get((annotator, pair))
        if earlier is not None:
            if (earlier.verdict, earlier.note or "") == (choice, note):
                return
            raise Conflict("this pair has your vote already; undo it first")
        verdict = Verdict(
            pair=pair,
            prompt_id=found.prompt_id,
            a=found.a.name,
            b=found.b.name,
            annotator=annotator,
            question=question_of(found),
            verdict=choice,
            time=_now(),
            seconds=seconds,
            note=note or None,
        )
        append_verdict(self.path, verdict)
        self.given[annotator, pair] = verdict
        self.reserved.pop(annotator, None)

    def undo(self, annotator: str, pair: str) -> None:
        """Append that this person's last vote, which is on `pair`, no longer counts; reopen it.

        Raises:
            Conflict: their last vote is on another pair.
            OSError: it could not be written; the vote stands.
        """
        last = self.last(annotator)
        if (annotator, pair) in self.given and pair != last:
            raise Conflict("only the last vote can be undone")
        if pair not in self.pairs:
            raise Conflict(f"there is no pair {pair[:40]!r}")
        note = ""
        if pair == last:
            row = {"pair": pair, "annotator": annotator, "undo": True, "time": _now()}
            append_line(self.path, json.dumps(row, ensure_ascii=False))
            note = self.given.pop((annotator, pair)).note or ""
        self.reserved[annotator] = Reserved(pair, self.clock(), note)

    def last(self, annotator: str) -> str | None:
        """The pair of this person's last vote that stands."""
        return next((pair for name, pair in reversed(self.given) if name == annotator), None)

    def progress(self, annotator: str) -> Progress:
        """How far this person and all together are."""
        counts = self._counts(besides=annotator, reserved=False)
        mine = [vote for (name, _), vote in self.given.items() if name == annotator]
        votes = [vote for vote in mine if vote.verdict != "skip"]
        everyone = counts + Counter(vote.pair for vote in votes)
        return Progress(
            mine=len(mine),
            left=sum(counts[pair] < self.quota for pair in self._open(annotator)),
            votes=sum(min(count, self.quota) for count in everyone.values()),
            wanted=self.quota * len(self.pairs),
            seconds=median(vote.seconds for vote in votes) if votes else None,
        )

    def _open(self, annotator: str) -> list[str]:
        return [pair for pair in self.pairs if (annotator, pair) not in self.given]

    def _counts(self, *, besides: str, reserved: bool = True) -> Counter[str]:
        """Votes of each pair by other people, and pairs they have open."""
        counts = Counter(
            pair
            for (name, pair), vote in self.given.items()
            if name != besides and vote.verdict != "skip"
        )
        oldest = self.clock() - RESERVED_SECONDS
        counts.update(
            held.pair
            for name, held in self.reserved.items()
            if reserved and name != besides and held.since >= oldest
        )
        return counts


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
