"""Pattern collapse, noticed: robust deviations of seven signals from the run's own beginning.

The reward curve lies; perplexity, KL, length and the shape of the scores tell (Zheng et al. 2023,
§5.2). The rule is in docs/monitors.md. Reads rows of metrics, never a model; what it has seen is
its `state_dict`, so that a resumed run judges as the uninterrupted one.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from ppomax.config import Settings

Level = Literal["green", "amber", "red"]
LEVELS: tuple[Level, ...] = ("green", "amber", "red")


class Signal(NamedTuple):
    """A metric that moves one way when a policy collapses."""

    key: str
    direction: int
    """+1: rising is bad; -1: falling is bad."""
    floor: float
    """Least size of one deviation, in the metric's unit: a change below it matters to nobody."""
    relative: float = 0.0
    """The same as a share of the baseline's median."""


SIGNALS = (
    Signal("policy/perplexity", -1, 0.02, 0.05),
    Signal("kl/ref_k3", +1, 0.02),
    Signal("response/length_mean", +1, 0.5, 0.05),
    Signal("reward/score_skew", +1, 0.2),
    Signal("response/distinct_2", -1, 0.01),
    Signal("response/repetition_4", +1, 0.01),
    Signal("response/truncated_share", +1, 0.02),
)
"""What is watched (Zheng et al. 2023, §5.2, and repetition). The floors are ours."""

SCALE = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""
CAP = 50.0
"""Largest deviation counted: from here on a curve is simply off."""


class DetectorSettings(Settings):
    """When a run is called amber and red."""

    baseline: int = Field(10, ge=3)
    """Rows of the run's beginning that say what is normal (ours)."""
    votes: int = Field(3, ge=1, le=len(SIGNALS))
    """Signals that must stand beyond a threshold together (ours)."""
    amber: float = Field(2.5, gt=0)
    """Robust deviations for amber (ours, docs/LOG.md)."""
    red: float = Field(7.0, gt=0)
    """Robust deviations for red (ours, docs/LOG.md)."""
    patience: int = Field(3, ge=1)
    """Rows in a row beyond a threshold before the level rises (ours)."""
    calm: int = Field(5, ge=1)
    """Rows in a row below `release` of the threshold before it falls (ours)."""
    release: float = Field(0.7, gt=0, le=1)
    """Share of a threshold to fall below: a level is harder to leave than to enter (ours)."""
    max_kl: float | None = Field(None, gt=0)
    """Red at once where KL to the reference (k3, nats per token) passes this."""
    max_length_share: float | None = Field(None, gt=0, lt=1)
    """Red at once where the mean reply is longer than this share of the limit."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.red <= self.amber:
            raise ValueError(f"red {self.red:g} must be above amber {self.amber:g}")
        return self


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one row of metrics says."""

    level: Level
    before: Level
    """The level of the row before."""
    score: float
    """The `votes`-th largest deviation: so many signals stand at least this far out."""
    deviations: dict[str, float]
    """Robust deviations by key, in the direction that is bad; empty while there is no baseline."""
    limits: tuple[str, ...] = ()
    """Hard limits passed, in words."""

    @property
    def rose(self) -> bool:
        """Whether the level went up with this row."""
        return LEVELS.index(self.level) > LEVELS.index(self.before)


class CollapseDetector:
    """Baseline, counters and level; updated with every row, saved in checkpoints."""

    def __init__(self, settings: DetectorSettings, *, max_new_tokens: int) -> None:
        self.settings, self.max_new_tokens = settings, max_new_tokens
        self.rows: list[dict[str, float]] = []
        self.level: Level = "green"
        self.above = {"amber": 0, "red": 0}
        """Rows in a row beyond each threshold."""
        self.below = 0
        """Rows in a row below the release of the present level."""

    @property
    def has_baseline(self) -> bool:
        """Whether enough rows have been seen to judge by."""
        return len(self.rows) >= self.settings.baseline

    def learn(self, row: Mapping[str, float]) -> None:
        """Take a row of the unchanged policy (critic pre-training, held-out replies of SFT).

        Rows beyond the baseline's size push out the oldest: all of them are of the same policy.
        """
        found = {s.key: row[s.key] for s in SIGNALS if s.key in row}
        if all(math.isfinite(value) for value in found.values()):
            self.rows = [*self.rows, found][-self.settings.baseline :]

    def update(self, row: Mapping[str, float]) -> Judgement:
        """Judge a row; while the baseline is short of rows, the row becomes part of it."""
        before, limits = self.level, self._limits(row)
        if not self.has_baseline:
            if not limits:
                self.learn(row)
            self.level = "red" if limits else before
            return Judgement(self.level, before, 0.0, {}, limits)
        deviations = self.deviations(row)
        score = nth_largest(list(deviations.values()), self.settings.votes)
        self._count(score)
        self.level = self._next(limits)
        if self.level != before:
            self.below = 0
        return Judgement(self.level, before, score, deviations, limits)

    def deviations(self, row: Mapping[str, float]) -> dict[str, float]:
        """Robust z-scores in the direction that is bad: (x - median) / max(1.4826 MAD, floor)."""
        found = {}
        for signal in SIGNALS:
            known = [old[signal.key] for old in self.rows if signal.key in old]
            value = row.get(signal.key)
            if value is None or len(known) < 3:
                continue
            if not math.isfinite(value):
                found[signal.key] = CAP
                continue
            z = signal.direction * deviation(value, known, signal.floor, signal.relative)
            found[signal.key] = max(-CAP, min(CAP, z))
        return found

    def reset(self) -> None:
        """Green again with the same baseline: the run went back to a good state."""
        self.level, self.above, self.below = "green", {"amber": 0, "red": 0}, 0

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "rows": self.rows,
            "level": self.level,
            "above": dict(self.above),
            "below": self.below,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.rows = [dict(row) for row in state["rows"]]
        self.level, self.below = state["level"], state["below"]
        self.above = dict(state["above"])

    def _limits(self, row: Mapping[str, float]) -> tuple[str, ...]:
        found = []
        kl, share = row.get("kl/ref_k3", 0.0), row.get("response/length_mean", 0.0)
        share /= self.max_new_tokens
        if self.settings.max_kl is not None and not kl <= self.settings.max_kl:
            found.append(f"KL {kl:.3g} above max_kl {self.settings.max_kl:g}")
        if self.settings.max_length_share is not None and share > self.settings.max_length_share:
            found.append(
                f"length {share:.2f} of the limit, above max_length_share "
                f"{self.settings.max_length_share:g}"
            )
        return tuple(found)

    def _count(self, score: float) -> None:
        for name, threshold in (("amber", self.settings.amber), ("red", self.settings.red)):
            self.above[name] = self.above[name] + 1 if score >= threshold else 0
        mine = self.settings.red if self.level == "red" else self.settings.amber
        calm = self.level != "green" and score < self.settings.release * mine
        self.below = self.below + 1 if calm else 0

    def _next(self, limits: Sequence[str]) -> Level:
        if limits or self.above["red"] >= self.settings.patience:
            return "red"
        if self.level != "green" and self.below >= self.settings.calm:
            return "amber" if self.level == "red" else "green"
        if self.level == "green" and self.above["amber"] >= self.settings.patience:
            return "amber"
        return self.level


def deviation(value: float, known: Sequence[float], floor: float, relative: float = 0.0) -> float:
    """(value - median) / max(1.4826 MAD, floor, relative · |median|), of the known values."""
    middle = statistics.median(known)
    spread = statistics.median(abs(x - middle) for x in known)
    return (value - middle) / max(SCALE * spread, floor, relative * abs(middle))


def nth_largest(values: Sequence[float], n: int) -> float:
    """The n-th largest value; 0 where there are fewer."""
    return sorted(values, reverse=True)[n - 1] if len(values) >= n else 0.0
