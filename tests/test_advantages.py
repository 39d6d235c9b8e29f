"""GAE and the critic-free estimators."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from ppomax.advantages import (
    broadcast_scores,
    gae,
    grpo_advantages,
    reinforce_baseline_advantages,
    reinforce_returns,
    rloo_advantages,
)

examples = settings(max_examples=20, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 5))
units = st.floats(0, 1)
NAN = math.nan


def _case(seed: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, a prefix mask (empty rows included) and values after the last token."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn((2, *size), generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, size[1] + 1, (size[0],), generator=generator)
    last = torch.randn(size[0], generator=generator, dtype=torch.float64)
    return rewards, values, torch.arange(size[1]) < lengths[:, None], last


def _double_sum(rewards, values, mask, *, gamma, lam, last_values=None) -> Tensor:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, term by term in plain Python."""
    result = torch.zeros_like(values)
    for row in range(len(mask)):
        length = int(mask[row].sum())
        r, v = rewards[row, :length].tolist(), values[row, :length].tolist()
        v.append(0.0 if last_values is None else last_values[row].item())
        for t in range(length):
            result[row, t] = math.fsum(
                (gamma * lam) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s])
                for s in range(t, length)
            )
    return result


# --- GAE


def test_gae_of_three_tokens():
    # deltas 1 + 4/2 - 2 = 1, 2 + 8/2 - 4 = 2, 4 - 8 = -4; A = 1 + 1/4, 2 - 4/4, -4; R = A + V
    result = gae(
        tensor([[1.0, 2.0, 4.0]]), tensor([[2.0, 4.0, 8.0]]), tensor([[True] * 3]),
        gamma=0.5, lam=0.5,
    )  # fmt: skip
    assert result.advantages.tolist() == [[1.25, 1.0, -4.0]]
    assert result.returns.tolist() == [[3.25, 5.0, 4.0]]


def test_gae_reads_no_padding_and_an_empty_row_is_all_zeros():
    # row 0 ends after two tokens: deltas 1 + 4/2 - 2 = 1, 2 - 4 = -2; A = 1 - 2/4, -2
    mask = tensor([[True, True, False], [False] * 3])
    rewards, values = tensor([[1.0, 2.0, NAN], [NAN] * 3]), tensor([[2.0, 4.0, NAN], [NAN] * 3])
    result = gae(rewards, values, mask, gamma=0.5, lam=0.5, last_values=tensor([0.0, NAN]))
    assert result.advantages.tolist() == [[0.5, -2.0, 0.0], [0.0] * 3]
    assert result.returns.tolist() == [[2.5, 2.0, 0.0], [0.0] * 3]


def test_gae_goes_on_from_the_value_after_a_truncated_reply():
    # last delta 2 + 6/2 - 4 = 1, first 1 + 4/2 - 2 = 1; A = 1 + 1/4, 1
    result = gae(
        tensor([[1.0, 2.0, 0.0]]), tensor([[2.0, 4.0, 0.0]]), tensor([[True, True, False]]),
        gamma=0.5, lam=0.5, last_values=tensor([6.0]),
    )  # fmt: skip
    assert result.advantages.tolist() == [[1.25, 1.0, 0.0]]


@examples
@given(seeds, sizes, units, units, st.booleans())
def test_gae_is_the_double_sum(seed: int, size: tuple[int, int], gamma: float, lam: float, cut):
    rewards, values, mask, last = _case(seed, size)
    options = {"gamma": gamma, "lam": lam, "last_values": last if cut else None}
    result = gae(rewards, values, mask, **options)
    expected = _double_sum(rewards, values, mask, **options)
    torch.testing.assert_close(result.advantages, expected, rtol=1e-12, atol=1e-12)
    returns = torch.where(mask, expected + values, 0.0)
    torch.testing.assert_close(result.returns, returns, rtol=1e-12, atol=1e-12)


@examples
@given(seeds, sizes, units)
def test_lambda_zero_is_the_td_error_and_lambda_one_is_monte_carlo(
    seed: int, size: tuple[int, int], gamma: float
):
    rewards, values, mask, _ = _case(seed, size)
    following = torch.cat([torch.where(mask, values, 0.0)[:, 1:], torch.zeros(size[0], 1)], dim=1)
    td = torch.where(mask, rewards + gamma * following - values, 0.0)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=gamma, lam=0).advantages, td)
    to_go = reinforce_returns(rewards, mask, gamma=gamma)
    result = gae(rewards, values, mask, gamma=gamma, lam=1)
    torch.testing.assert_close(result.returns, to_go)
    torch.testing.assert_close(result.advantages, torch.where(mask, to_go - values, 0.0))


@examples
@given(seeds, sizes, units, st.sampled_from([0.0, 0.4, 1.0]))
def test_the_critic_s_lambda_changes_the_returns_alone(
    seed: int, size: tuple[int, int], lam: float, lam_critic: float
):
    rewards, values, mask, last = _case(seed, size)
    both = gae(rewards, values, mask, gamma=0.9, lam=lam, lam_critic=lam_critic, last_values=last)
    policy = gae(rewards, values, mask, gamma=0.9, lam=lam, last_values=last)
    critic = gae(rewards, values, mask, gamma=0.9, lam=lam_critic, last_values=last)
    assert torch.equal(both.advantages, policy.advantages)
    assert torch.equal(both.returns, critic.returns)


@examples
@given(seeds, sizes)
def test_gae_of_a_reply_depends_on_no_other_reply_and_on_no_padding(seed: int, size):
    rewards, values, mask, last = _case(seed, size)
    whole = gae(rewards, values, mask, gamma=0.9, lam=0.7, last_values=last)
    for row in range(size[0]):
        length = int(mask[row].sum())
        alone = gae(
            rewards[row : row + 1, :length], values[row : row + 1, :length],
            mask[row : row + 1, :length], gamma=0.9, lam=0.7, last_values=last[row : row + 1],
        )  # fmt: skip
        assert torch.equal(alone.advantages[0], whole.advantages[row, :length])
        assert torch.equal(alone.returns[0], whole.returns[row, :length])


@examples
@given(seeds, sizes, st.floats(-4, 4))
def test_gae_is_linear_in_rewards_and_values_together(seed: int, size, scale: float):
    rewards, values, mask, last = _case(seed, size)
    one = gae(rewards, values, mask, gamma=0.9, lam=0.7, last_values=last)
    other = gae(scale * rewards, scale * values, mask, gamma=0.9, lam=0.7, last_values=scale * last)
    torch.testing.assert_close(other.advantages, scale * one.advantages)
    torch.testing.assert_close(other.returns, scale * one.returns)


def test_a_gap_in_the_mask_is_skipped_as_if_it_were_not_there():
    gap, dense = tensor([[True, False, True]]), tensor([[True, True]])
    rewards, values = tensor([[1.0, NAN, 2.0]]), tensor([[2.0, NAN, 4.0]])
    skipped = gae(rewards, values, gap, gamma=0.5, lam=0.5)
    short = gae(rewards[:, ::2], values[:, ::2], dense, gamma=0.5, lam=0.5)
    assert torch.equal(skipped.advantages[:, ::2], short.advantages)
    assert skipped.advantages[0, 1] == skipped.returns[0, 1] == 0


def test_gae_of_no_columns_has_none():
    empty = torch.zeros(2, 0)
    assert gae(empty, empty, empty.bool(), gamma=1.0, lam=0.9).advantages.shape == (2, 0)


def test_results_are_constants_and_arguments_are_left_as_they_were():
    rewards, values = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    scores, mask = torch.ones(1, requires_grad=True), tensor([[True, True]])
    groups = tensor([0])
    result = gae(rewards, values, mask, gamma=1, lam=0.9, lam_critic=0.5, last_values=scores)
    assert not result.advantages.requires_grad
    assert not result.returns.requires_grad
    assert not gae(rewards.detach(), values, mask, gamma=1, lam=1).returns.requires_grad
    assert not gae(rewards, values.detach(), mask, gamma=1, lam=1).returns.requires_grad
    detached = values.detach()
    cut = gae(detached, detached, mask, gamma=1, lam=1, last_values=scores)
    assert not cut.advantages.requires_grad
    assert not reinforce_returns(rewards, mask, gamma=1).requires_grad
    assert not rloo_advantages(scores, groups).requires_grad
    assert not grpo_advantages(scores, groups, scale_std=True).requires_grad
    assert not broadcast_scores(scores, mask).requires_grad
    assert torch.equal(rewards, torch.ones(1, 2))
    assert torch.equal(values, torch.ones(1, 2))


# --- without a critic


def test_rewards_to_go_of_three_tokens():
    # 4; 2 + 4/2 = 4; 1 + 4/2 = 3
    mask = tensor([[True, True, True, False]])
    returns = reinforce_returns(tensor([[1.0, 2.0, 4.0, NAN]]), mask, gamma=0.5)
    assert returns.tolist() == [[3.0, 4.0, 4.0, 0.0]]


SCORES = tensor([1.0, 10.0, 2.0, 6.0, 30.0, 5.0])
GROUPS = tensor([7, 3, 7, 7, 3, 1])


def test_leave_one_out_advantages_of_groups_of_three_two_and_one():
    # 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2; 10 - 30, 30 - 10; alone: 0
    assert rloo_advantages(SCORES, GROUPS).tolist() == [-3.0, -20.0, -1.5, 4.5, 20.0, 0.0]


def test_group_relative_advantages_of_groups_of_three_two_and_one():
    # group 7: mean 3, variance (4 + 1 + 9) / 2 = 7; group 3: mean 20, variance 200 / 1
    root = 7**0.5
    expected = tensor([-2 / root, -(0.5**0.5), -1 / root, 3 / root, 0.5**0.5, 0.0])
    torch.testing.assert_close(grpo_advantages(SCORES, GROUPS, scale_std=True), expected)
    centred = [-2.0, -10.0, -1.0, 3.0, 10.0, 0.0]
    assert grpo_advantages(SCORES, GROUPS, scale_std=False).tolist() == centred
    assert reinforce_baseline_advantages(SCORES, GROUPS).tolist() == centred


def test_equal_scores_in_a_group_give_exactly_zero_in_single_precision():
    # in float32, (0.7 + 0.7 + 0.7) / 3 != 0.7, and dividing by the std would make it order one
    scores, groups = torch.full((3,), 0.7), tensor([0, 0, 0])
    assert grpo_advantages(scores, groups, scale_std=True).tolist() == [0.0, 0.0, 0.0]
    assert rloo_advantages(scores, groups).tolist() == [0.0, 0.0, 0.0]


def test_a_group_s_std_counts_from_1e_8_on():
    scores, groups = tensor([-1e-8, 0.0, 1e-8], dtype=torch.float64), tensor([0, 0, 0])
    torch.testing.assert_close(
        grpo_advantages(scores, groups, scale_std=True),
        tensor([-1.0, 0.0, 1.0], dtype=torch.float64),
    )
    smaller = 0.9 * scores
    assert torch.equal(grpo_advantages(smaller, groups, scale_std=True), smaller)


def test_a_broken_score_stays_within_its_group():
    scores = tensor([1.0, NAN, 3.0, 4.0])
    groups = tensor([0, 1, 0, 1])
    assert rloo_advantages(scores, groups)[::2].tolist() == [-2.0, 2.0]
    assert grpo_advantages(scores, groups, scale_std=False)[::2].tolist() == [-1.0, 1.0]


@examples
@given(seeds, st.integers(1, 9), st.floats(-5, 5), st.floats(0.1, 9))
def test_group_estimators_agree_with_plain_python_and_forget_a_shift(
    seed: int, batch: int, shift: float, scale: float
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, generator=generator, dtype=torch.float64)
    groups = torch.randint(0, 3, (batch,), generator=generator)
    rloo, grpo = [], []
    for i in range(batch):
        peers = [scores[j].item() for j in range(batch) if groups[j] == groups[i]]
        others = [scores[j].item() for j in range(batch) if groups[j] == groups[i] and j != i]
        mean = sum(peers) / len(peers)
        m2 = sum((peer - mean) ** 2 for peer in peers)
        rloo.append(scores[i].item() - sum(others) / len(others) if others else 0.0)
        grpo.append((scores[i].item() - mean) / math.sqrt(m2 / len(others)) if others else 0.0)
    rloo, grpo = torch.tensor(rloo).double(), torch.tensor(grpo).double()
    close = {"rtol": 1e-5, "atol": 1e-5}
    moved = shift + scale * scores
    torch.testing.assert_close(rloo_advantages(scores, groups), rloo, **close)
    torch.testing.assert_close(rloo_advantages(moved, groups), scale * rloo, **close)
    torch.testing.assert_close(grpo_advantages(scores, groups, scale_std=True), grpo, **close)
    torch.testing.assert_close(grpo_advantages(moved, groups, scale_std=True), grpo, **close)


@examples
@given(seeds, st.integers(1, 9))
def test_permuting_the_replies_permutes_the_advantages(seed: int, batch: int):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, generator=generator, dtype=torch.float64)
    groups = torch.randint(0, 3, (batch,), generator=generator)
    order = torch.randperm(batch, generator=generator)
    for estimate in (rloo_advantages, lambda s, g: grpo_advantages(s, g, scale_std=True)):
        torch.testing.assert_close(
            estimate(scores[order], groups[order]), estimate(scores, groups)[order]
        )


def test_scores_are_spread_over_their_replies_tokens():
    mask = tensor([[True, True, False], [True, False, False], [False] * 3])
    spread = broadcast_scores(tensor([2.0, -1.0, NAN]), mask)
    assert spread.tolist() == [[2.0, 2.0, 0.0], [-1.0, 0.0, 0.0], [0.0] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_argument_s_dtype(dtype: torch.dtype):
    x, mask = torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=torch.bool)
    assert gae(x, x, mask, gamma=1.0, lam=0.95).returns.dtype == dtype
    assert rloo_advantages(x[0], tensor([0, 0])).dtype == dtype
    assert grpo_advantages(x[0], tensor([0, 0]), scale_std=True).dtype == dtype
