"""Running moments of the scores."""

import json
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from ppomax.masked import Moments
from ppomax.normalise import RunningMoments

examples = settings(max_examples=25, derandomize=True, database=None)
numbers = st.floats(-100, 100, width=32)
batches = st.lists(st.lists(numbers, max_size=5), max_size=6)


def _fed(batches: list[list[float]]) -> RunningMoments:
    moments = RunningMoments()
    for batch in batches:
        moments.update(tensor(batch, dtype=torch.float64))
    return moments


def test_one_two_then_four():
    # mean 7/3, unbiased variance (14/3) / 2 = 7/3
    moments = _fed([[1.0, 2.0], [4.0]])
    assert moments.count == 3
    assert moments.mean == pytest.approx(7 / 3, abs=1e-15)
    assert moments.std == pytest.approx(math.sqrt(7 / 3), abs=1e-15)


def test_before_the_first_sample_nothing_is_shifted_or_scaled():
    moments = RunningMoments()
    assert (moments.count, moments.mean, moments.std) == (0, 0.0, 1.0)


def test_a_single_first_sample_has_its_mean_and_std_one():
    moments = _fed([[3.5]])
    assert (moments.count, moments.mean, moments.std) == (1, 3.5, 1.0)


def test_constant_samples_have_std_one():
    moments = _fed([[0.7], [0.7, 0.7], [0.7] * 4])
    assert moments.mean == pytest.approx(0.7)
    assert moments.std == 1


def test_every_entry_of_any_shape_counts():
    moments = RunningMoments()
    moments.update(tensor(1.0))
    moments.update(tensor([[2.0, 3.0], [4.0, 5.0]]))
    assert (moments.count, moments.mean) == (5, 3.0)


@examples
@given(batches, st.randoms(use_true_random=False))
def test_any_order_and_split_gives_the_two_pass_result(batches, random):
    samples = [number for batch in batches for number in batch]
    shuffled = random.sample(samples, len(samples))
    one_by_one = _fed([[sample] for sample in shuffled])
    for moments in (_fed(batches), one_by_one, _fed([shuffled])):
        assert moments.count == len(samples)
        if samples:
            assert moments.mean == pytest.approx(statistics.fmean(samples), rel=1e-12, abs=1e-12)
        if len(samples) > 1:
            std = statistics.stdev(samples)
            expected = std if std >= 1e-8 else 1.0
            assert moments.std == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_moments_of_all_ranks_merge_as_if_one_rank_had_seen_everything():
    merged = RunningMoments()
    merged.merge(Moments(2, 1.5, 0.5))
    merged.merge(Moments(2, 6.0, 8.0))
    assert merged.state_dict() == _fed([[1.0, 2.0, 4.0, 8.0]]).state_dict()


@examples
@given(batches, batches)
def test_state_that_went_through_json_goes_on_bit_for_bit(before, after):
    moments = _fed(before)
    resumed = RunningMoments()
    resumed.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    assert resumed.state_dict() == moments.state_dict()
    for batch in after:
        moments.update(tensor(batch))
        resumed.update(tensor(batch))
    assert (resumed.count, resumed.mean, resumed.std) == (moments.count, moments.mean, moments.std)


def test_the_state_is_count_mean_and_m2():
    assert _fed([[1.0, 3.0]]).state_dict() == {"count": 2, "mean": 2.0, "m2": 2.0}


def test_a_state_is_a_copy():
    moments = _fed([[1.0, 3.0]])
    state = moments.state_dict()
    moments.update(tensor([9.0]))
    assert state == {"count": 2, "mean": 2.0, "m2": 2.0}
