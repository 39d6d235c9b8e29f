"""Numerical alarms: values that no healthy run shows, whatever it learns.

Each looks at one row of metrics and the few before it. The thresholds are ours and stand here
alone; docs/monitors.md says what each alarm means.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

SPIKE = 10.0
"""A loss or gradient norm this many times its running median is a spike."""
WINDOW, LEAST = 20, 8
"""Rows of the running median, and the fewest that make one."""
SPIKING = ("policy/loss", "value/loss", "policy/grad_norm", "value/grad_norm")
NEGATIVE_KL = -4.0
"""k1 has mean KL ≥ 0; below this many of its own standard errors the sampler is not the policy."""
RATIO, CLIPPED = 10.0, 0.8
"""Largest ratio and share of clipped tokens that an update may show."""
GAP_MEAN, GAP_MAX = 0.05, 1.0
"""Nats per token between the engine's log-probs and the trainer's: mean and largest."""
DEAD = 20
"""Rows in a row in which the critic explained nothing."""


class Alarm(NamedTuple):
    """Something to look at."""

    name: str
    reason: str


class NumericalAlarms:
    """The alarms that stand, and the rows they are judged by; saved in checkpoints."""

    def __init__(self, *, plain: bool) -> None:
        self.plain = plain
        """Whether replies are drawn from the plain distribution that log-probs are taken of."""
        self.recent: dict[str, deque[float]] = {}
        self.dead = 0
        self.standing: list[str] = []

    def update(self, row: Mapping[str, float]) -> list[Alarm]:
        """Alarms that begin with this row; one that goes on is not given again."""
        found = list(self._found(row))
        for key in SPIKING:
            value = row.get(key)
            if value is not None and math.isfinite(value):
                self.recent.setdefault(key, deque(maxlen=WINDOW)).append(abs(value))
        new = [alarm for alarm in found if alarm.name not in self.standing]
        self.standing = [alarm.name for alarm in found]
        return new

    def reset(self) -> None:
        """Nothing stands: the run went back to a good state."""
        self.dead, self.standing = 0, []

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        recent = {key: list(values) for key, values in self.recent.items()}
        return {"recent": recent, "dead": self.dead, "standing": list(self.standing)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.recent = {key: deque(v, maxlen=WINDOW) for key, v in state["recent"].items()}
        self.dead, self.standing = state["dead"], list(state["standing"])

    def _found(self, row: Mapping[str, float]) -> Iterator[Alarm]:
        odd = sorted(key for key, value in row.items() if not math.isfinite(value))
        if odd:
            yield Alarm("non_finite", f"{', '.join(odd)} not finite")
        for key in SPIKING:
            yield from self._spike(key, row.get(key))
        yield from self._kl(row)
        yield from _above("ratio_outlier", row, "policy/ratio_max", RATIO)
        yield from _above("clip_fraction", row, "policy/clip_fraction", CLIPPED)
        gap = [
            *_above("engine_gap", row, "engine/logprob_gap_mean", GAP_MEAN),
            *_above("engine_gap", row, "engine/logprob_gap_max", GAP_MAX),
        ]
        yield from gap[:1]
        explained = row.get("value/explained_variance")
        if explained is not None:
            self.dead = self.dead + 1 if explained <= 0 else 0
        if self.dead >= DEAD:
            yield Alarm("dead_critic", f"explained variance not above 0 for {self.dead} rows")

    def _spike(self, key: str, value: float | None) -> Iterator[Alarm]:
        known = self.recent.get(key, ())
        if value is None or not math.isfinite(value) or len(known) < LEAST:
            return
        usual = statistics.median(known)
        least = (
            0.1 if key == "policy/loss" else 0.0
        )  # whose mean is about 0: any step is many times it
        if abs(value) > max(SPIKE * usual, least) and usual > 0:
            name = "spike_" + key.replace("/", "_")
            yield Alarm(name, f"{key} {value:.3g}, usually {usual:.3g}")

    def _kl(self, row: Mapping[str, float]) -> Iterator[Alarm]:
        k1, error = row.get("kl/ref_k1"), row.get("kl/ref_k1_se")
        if k1 is None or not math.isfinite(k1):
            return
        if not self.plain:
            if k1 < 0:
                reason = f"k1 {k1:.3g} below 0: replies are not drawn from the plain distribution"
                yield Alarm("sampler_mismatch", reason)
        elif error is not None and error > 0 and k1 < NEGATIVE_KL * error:
            times = k1 / error
            yield Alarm("negative_kl", f"k1 {k1:.3g}, {times:.1f} of its standard errors")


def _above(name: str, row: Mapping[str, float], key: str, limit: float) -> Iterator[Alarm]:
    value = row.get(key)
    if value is not None and value > limit:
        yield Alarm(name, f"{key} {value:.3g} above {limit:g}")
