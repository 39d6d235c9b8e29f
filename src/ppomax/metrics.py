"""Metrics that add up: sums and weights collected over micro-batches, merged over ranks."""

import copy
import math
from collections.abc import Mapping

from ppomax.distributed import World, all_max, all_sum


class MetricSums:
    """Weighted means and maxima, exact under any split into micro-batches and ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(self, key: str, total: float, weight: float) -> None:
        """Add a sum over `weight` things; the mean is sum of totals over sum of weights."""
        self._sums[key] = self._sums.get(key, 0.0) + total
        self._weights[key] = self._weights.get(key, 0.0) + weight

    def maximum(self, key: str, value: float) -> None:
        """Keep the largest value; nan is larger than any."""
        known = self._maxima.get(key, -math.inf)
        self._maxima[key] = value if math.isnan(value) else max(known, value)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers, this rank's own."""
        return copy.deepcopy({"sums": self._sums, "weights": self._weights, "maxima": self._maxima})

    def add_state(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Add what a `state_dict` holds."""
        for key, total in state["sums"].items():
            self.add(key, total, state["weights"][key])
        for key, value in state["maxima"].items():
            self.maximum(key, value)

    def add_keys(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Know what a `state_dict` knows without its numbers: ranks merge what all of them know."""
        for key in state["sums"]:
            self.add(key, 0.0, 0.0)
        for key in state["maxima"]:
            self.maximum(key, -math.inf)

    def reset(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Forget what was added since `state_dict` gave the state."""
        self._sums, self._weights = dict(state["sums"]), dict(state["weights"])
        self._maxima = dict(state["maxima"])

    def merged(self, world: World) -> dict[str, float]:
        """Means and maxima over all ranks, which know the same keys.

        Those with no weight are absent.
        """
        sums = all_sum(self._sums, world)
        weights = all_sum(self._weights, world)
        means = {key: sums[key] / weights[key] for key in sums if weights[key]}
        return means | all_max(self._maxima, world)


def as_row(
    stage: str, step: int, attempt: int, seconds: float, values: Mapping[str, float]
) -> dict[str, object]:
    """One line of metrics.jsonl."""
    return {"stage": stage, "step": step, "attempt": attempt, "time": round(seconds, 3), **values}
