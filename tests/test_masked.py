"""Masked sums, means, maxima, moments and whitening."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from ppomax.masked import (
    Moments,
    last_index,
    masked_max,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_whiten,
    merge_moments,
    unbiased_std,
)

examples = settings(max_examples=25, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 6))
NONE = torch.zeros(2, 3, dtype=torch.bool)
X = tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
MASK = tensor([[True, True, False], [True, False, False]])


def _case(seed: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    return x, torch.rand(size, generator=generator) < 0.6


def _selected(x: Tensor, mask: Tensor) -> list[float]:
    flat = zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True)
    return [number for number, counts in flat if counts]


# --- sum, mean, maximum


def test_sum_mean_and_maximum_of_three_selected_numbers():
    # 1 + 2 + 4 = 7, 7 / 3, max 4; the nines are not selected
    assert masked_sum(X, MASK).item() == 7
    assert masked_mean(X, MASK).item() == pytest.approx(7 / 3)
    assert masked_max(X, MASK, empty=0).item() == 4


def test_the_maximum_of_negative_numbers_is_negative_and_padding_is_no_candidate():
    assert masked_max(-X, MASK, empty=0).item() == -1


def test_an_empty_mask_sums_to_zero_has_mean_zero_and_the_maximum_its_caller_names():
    assert masked_sum(X, NONE).item() == 0
    assert masked_mean(X, NONE).item() == 0
    assert masked_max(X, NONE, empty=1.5).item() == 1.5
    assert masked_max(X[:0], NONE[:0], empty=-2).item() == -2


def test_one_selected_number_is_its_own_mean():
    one = tensor([[False, True, False]])
    assert masked_mean(X[:1], one).item() == 2


def test_any_shape_will_do():
    assert masked_sum(tensor([1.0, 2.0]), tensor([False, True])).item() == 2
    assert masked_mean(tensor(3.0), tensor(True)).item() == 3
    assert masked_sum(torch.ones(2, 2, 2), torch.ones(2, 2, 2, dtype=torch.bool)).item() == 8


@examples
@given(seeds, sizes)
def test_sum_mean_and_maximum_agree_with_plain_python(seed: int, size: tuple[int, int]):
    x, mask = _case(seed, size)
    chosen = _selected(x, mask)
    assert masked_sum(x, mask).item() == pytest.approx(math.fsum(chosen), abs=1e-12)
    mean = statistics.fmean(chosen) if chosen else 0.0
    assert masked_mean(x, mask).item() == pytest.approx(mean, abs=1e-12)
    assert masked_max(x, mask, empty=-7.0).item() == max(chosen, default=-7.0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(
    "function",
    [masked_sum, masked_mean, lambda x, m: masked_max(x, m, empty=0),
     lambda x, m: masked_whiten(x, m).square().square().sum()],
)  # fmt: skip
def test_garbage_outside_the_mask_changes_neither_value_nor_gradient(function, garbage: float):
    clean = X.double().requires_grad_()
    dirty = torch.where(MASK, X.double(), garbage).requires_grad_()
    function(clean, MASK).backward()
    function(dirty, MASK).backward()
    assert torch.equal(function(clean, MASK), function(dirty, MASK))
    assert torch.equal(clean.grad, dirty.grad)
    assert torch.all(dirty.grad[~MASK] == 0)
    assert torch.any(dirty.grad[MASK] != 0)


def test_gradients_of_sum_and_mean_are_one_and_one_over_the_count():
    x = X.clone().requires_grad_()
    masked_sum(x, MASK).backward()
    assert torch.equal(x.grad, MASK.float())
    x.grad = None
    masked_mean(x, MASK).backward()
    torch.testing.assert_close(x.grad, MASK.float() / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_keep_the_argument_s_dtype(dtype: torch.dtype):
    x = X.to(dtype)
    assert masked_sum(x, MASK).dtype == dtype
    assert masked_max(x, MASK, empty=0).dtype == dtype
    assert masked_whiten(x, MASK).dtype == dtype


# --- moments


def test_moments_of_one_two_four():
    # mean 7/3; squared deviations 16/9 + 1/9 + 25/9 = 42/9
    count, mean, m2 = masked_moments(X, MASK)
    assert count == 3
    assert mean == pytest.approx(7 / 3, abs=1e-15)
    assert m2 == pytest.approx(42 / 9, abs=1e-15)


def test_moments_of_nothing_are_zeros():
    nothing = masked_moments(X, NONE)
    for moments in (nothing, merge_moments(nothing, nothing)):
        assert moments == Moments(0, 0.0, 0.0)
        assert [type(number) for number in moments] == [int, float, float]


def test_moments_are_plain_numbers_in_double_precision():
    # float32 would round the sum 1e8 + 1 to 1e8
    x = tensor([1e8, 1.0], requires_grad=True)
    moments = masked_moments(x, tensor([True, True]))
    assert moments.mean == 50_000_000.5
    assert moments.m2 == pytest.approx(2 * 49_999_999.5**2, rel=1e-15)
    assert [type(number) for number in moments] == [int, float, float]


def test_merging_one_two_with_four_gives_the_moments_of_all_three():
    # {1, 2}: mean 1.5, m2 0.5; with 4: d = 2.5, mean 1.5 + 2.5/3 = 7/3, m2 0.5 + 6.25 * 2/3 = 14/3
    merged = merge_moments(Moments(2, 1.5, 0.5), Moments(1, 4.0, 0.0))
    assert merged.count == 3
    assert merged.mean == pytest.approx(7 / 3, abs=1e-15)
    assert merged.m2 == pytest.approx(14 / 3, abs=1e-15)
    # and with two samples that both vary: {1, 2} and {4, 8}: mean 3.75, m2 28.75
    merged = merge_moments(Moments(2, 1.5, 0.5), Moments(2, 6.0, 8.0))
    assert merged == Moments(4, 3.75, 28.75)


def test_merging_with_nothing_changes_nothing():
    nothing, some = Moments(0, 0.0, 0.0), Moments(3, 0.1, 0.7)
    assert merge_moments(nothing, some) == some
    assert merge_moments(some, nothing) == some


@examples
@given(seeds, sizes)
def test_moments_agree_with_the_statistics_module_however_split(seed: int, size: tuple[int, int]):
    x, mask = _case(seed, size)
    x = 5 + 3 * x
    chosen = _selected(x, mask)
    rows = [masked_moments(row, keep) for row, keep in zip(x, mask, strict=True)]
    merged = Moments(0, 0.0, 0.0)
    for row in reversed(rows):
        merged = merge_moments(row, merged)
    for moments in (masked_moments(x, mask), merged):
        assert moments.count == len(chosen)
        if chosen:
            assert moments.mean == pytest.approx(statistics.fmean(chosen), rel=1e-12)
        if len(chosen) > 1:
            variance = statistics.variance(chosen)
            assert moments.m2 / (moments.count - 1) == pytest.approx(variance, rel=1e-12)
            assert unbiased_std(moments) == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_the_std_is_unbiased_and_one_where_it_could_not_divide():
    assert unbiased_std(Moments(3, 0.0, 8.0)) == 2  # sqrt(8 / 2)
    assert unbiased_std(Moments(2, 0.0, 9.0)) == 3  # two samples are enough
    assert unbiased_std(Moments(1, 5.0, 0.0)) == 1
    assert unbiased_std(Moments(0, 0.0, 0.0)) == 1
    assert unbiased_std(Moments(2, 0.0, 1e-16)) == 1e-8  # the smallest that counts
    assert unbiased_std(Moments(2, 0.0, 0.98e-16)) == 1


# --- whitening


def test_whitening_one_and_three():
    # mean 2, unbiased std sqrt(2)
    white = masked_whiten(tensor([[1.0, 3.0, 7.0]]), tensor([[True, True, False]]))
    torch.testing.assert_close(white, tensor([[-(0.5**0.5), 0.5**0.5, 0.0]]))


def test_whitening_by_given_moments_and_without_the_shift():
    # std sqrt(8 / 2) = 2
    x, mask = tensor([[1.0, 3.0]]), tensor([[True, True]])
    moments = Moments(3, 5.0, 8.0)
    assert masked_whiten(x, mask, moments=moments).tolist() == [[-2.0, -1.0]]
    assert masked_whiten(x, mask, moments=moments, shift_mean=False).tolist() == [[0.5, 1.5]]


def test_a_constant_sample_is_centred_and_a_single_one_becomes_zero():
    mask = tensor([[True, True, False]])
    assert masked_whiten(tensor([[0.1, 0.1, 4.0]]), mask).tolist() == [[0.0, 0.0, 0.0]]
    one = tensor([[False, True, False]])
    assert masked_whiten(tensor([[0.1, 0.7, 4.0]]), one).tolist() == [[0.0, 0.0, 0.0]]
    assert masked_whiten(X, NONE).tolist() == torch.zeros(2, 3).tolist()


@examples
@given(seeds, sizes, st.floats(-50, 50), st.floats(0.1, 50))
def test_whitened_numbers_have_mean_0_variance_1_and_forget_shift_and_scale(
    seed: int, size: tuple[int, int], shift: float, scale: float
):
    x, mask = _case(seed, size)
    white = masked_whiten(x, mask)
    assert torch.all(white[~mask] == 0)
    if mask.sum() > 1:
        assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
        assert white[mask].var().item() == pytest.approx(1, rel=1e-9)
        moved = masked_whiten(shift + scale * x, mask)
        torch.testing.assert_close(moved, white, rtol=1e-9, atol=1e-9)
        unshifted = masked_whiten(scale * x, mask, shift_mean=False)
        torch.testing.assert_close(unshifted[mask], x[mask] / x[mask].std())


@examples
@given(seeds, sizes)
def test_whitening_rows_with_merged_moments_is_whitening_the_batch(
    seed: int, size: tuple[int, int]
):
    x, mask = _case(seed, size)
    merged = Moments(0, 0.0, 0.0)
    for row, keep in zip(x, mask, strict=True):
        merged = merge_moments(merged, masked_moments(row, keep))
    rows = [masked_whiten(r, k, moments=merged) for r, k in zip(x, mask, strict=True)]
    torch.testing.assert_close(torch.stack(rows), masked_whiten(x, mask), rtol=1e-12, atol=1e-12)


def test_moments_are_constants_to_the_gradient_of_whitening():
    x = tensor([[1.0, 3.0, 7.0]], requires_grad=True)
    masked_whiten(x, tensor([[True, True, False]])).sum().backward()
    torch.testing.assert_close(x.grad, tensor([[0.5**0.5, 0.5**0.5, 0.0]]))


def test_the_argument_is_left_as_it_was():
    x = X.clone()
    masked_whiten(x, MASK), masked_moments(x, MASK), masked_max(x, MASK, empty=0)
    assert torch.equal(x, X)


# --- last_index


def test_the_last_index_of_full_short_empty_and_broken_rows():
    mask = tensor([[True, True, True], [True, False, False], [False] * 3, [True, False, True]])
    assert last_index(mask).tolist() == [2, 0, -1, 2]


def test_the_last_index_of_rows_without_columns_and_of_no_rows():
    assert last_index(torch.zeros(2, 0, dtype=torch.bool)).tolist() == [-1, -1]
    assert last_index(torch.zeros(0, 3, dtype=torch.bool)).tolist() == []
