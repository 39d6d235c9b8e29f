import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.distributed import World
from ppomax.metrics import MetricSums, as_row
from ppomax.train.position import Position

ALONE = World(0, 1, torch.device("cpu"))


def test_a_mean_is_the_sum_of_totals_over_the_sum_of_weights():
    sums = MetricSums()
    sums.add("loss", 6.0, 3)  # values 1, 2, 3
    sums.add("loss", 10.0, 1)  # value 10
    assert sums.merged(ALONE) == {"loss": 4.0}  # (6 + 10) / 4, not the mean of means 6


def test_a_maximum_is_the_largest_value():
    sums = MetricSums()
    for value in (-5.0, -2.0, -9.0):
        sums.maximum("ratio", value)
    assert sums.merged(ALONE) == {"ratio": -2.0}


def test_a_key_without_weight_is_absent():
    sums = MetricSums()
    sums.add("none", 0.0, 0)
    sums.add("some", 0.0, 2)
    assert sums.merged(ALONE) == {"some": 0.0}
    assert MetricSums().merged(ALONE) == {}


def test_a_part_without_weight_changes_nothing():
    sums = MetricSums()
    sums.add("a", 3.0, 2)
    sums.add("a", 0.0, 0)
    assert sums.merged(ALONE) == {"a": 1.5}


def test_merging_leaves_the_sums_as_they_were():
    sums = MetricSums()
    sums.add("a", 3.0, 2)
    sums.maximum("b", 1.0)
    assert sums.merged(ALONE) == sums.merged(ALONE) == {"a": 1.5, "b": 1.0}
    sums.add("a", 1.0, 2)
    assert sums.merged(ALONE)["a"] == 1.0


@settings(max_examples=100)
@given(
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=20),
    st.lists(st.integers(0, 20), max_size=4),
)
def test_any_split_into_parts_gives_the_same_mean_and_maximum(values, cuts):
    sums = MetricSums()
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    for start, stop in itertools.pairwise(edges):
        part = values[start:stop]
        sums.add("mean", float(sum(part)), len(part))
        if part:
            sums.maximum("max", float(max(part)))
    merged = sums.merged(ALONE)
    assert merged["mean"] == pytest.approx(sum(values) / len(values), rel=1e-12)
    assert merged["max"] == max(values)


@pytest.mark.parametrize("values", [[math.nan], [1.0, math.nan], [math.nan, 1.0]])
def test_a_maximum_over_something_not_finite_says_so(values):
    sums = MetricSums()
    for value in values:
        sums.maximum("ratio", value)
    assert math.isnan(sums.merged(ALONE)["ratio"])


def test_a_mean_over_something_not_finite_says_so():
    sums = MetricSums()
    sums.add("a", math.nan, 1)
    sums.add("a", 1.0, 1)
    assert math.isnan(sums.merged(ALONE)["a"])


def test_a_row_holds_stage_step_attempt_time_and_values():
    row = as_row("ppo", 3, 1, 12.34567, {"policy/loss": 0.25})
    assert row == {"stage": "ppo", "step": 3, "attempt": 1, "time": 12.346, "policy/loss": 0.25}
    assert list(row) == ["stage", "step", "attempt", "time", "policy/loss"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_on_another_number_of_ranks_all_know_the_same_keys_and_the_numbers_count_once(ranks):
    parts = []
    for rank in range(2):
        sums = MetricSums()
        sums.add("loss", 3.0 + rank, 2)
        sums.maximum("ratio", 1.0 + rank)
        parts.append(sums.state_dict())
    state = {"stage": "ppo", "taken": 3, "kl": 0.1, "sums": parts, "seconds": {}}
    found = [
        Position.of(state, World(rank, ranks, torch.device("cpu"))).sums.state_dict()
        for rank in range(ranks)
    ]
    for one in found:  # ranks that merge pass the same keys
        assert {name: set(values) for name, values in one.items()} == {
            "sums": {"loss"},
            "weights": {"loss"},
            "maxima": {"ratio"},
        }
    assert sum(one["sums"]["loss"] for one in found) == 7.0
    assert sum(one["weights"]["loss"] for one in found) == 4
    assert max(one["maxima"]["ratio"] for one in found) == 2.0
