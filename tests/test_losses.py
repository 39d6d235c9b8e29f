"""Losses of policy, critic and reward model, and the diagnostics beside them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.autograd import gradcheck

from ppomax import losses
from ppomax.errors import ConfigError
from ppomax.losses import (
    centring_loss,
    clipped_policy_loss,
    clipped_value_loss,
    entropy_loss,
    explained_variance,
    explained_variance_of,
    kl_penalty_policy_loss,
    lm_loss,
    pairwise_ranking_loss,
    ref_kl_loss,
)
from ppomax.masked import Moments, masked_moments, merge_moments
from ppomax.models.exact_kl import categorical_kl

examples = settings(max_examples=20, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 5))
NAN = math.nan
LN2 = math.log(2)


def _case(seed: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three tensors of the given size and a prefix mask (empty rows included)."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c = torch.randn((3, *size), generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, size[1] + 1, (size[0],), generator=generator)
    return a, b, c, torch.arange(size[1]) < lengths[:, None]


def _where(mask: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i, j in mask.nonzero().tolist()]


def _near(result: Tensor, expected: float) -> bool:
    return result.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def exact_kl_loss(logits: Tensor, ref_logits: Tensor, mask: Tensor, *, num_tokens: int) -> Tensor:
    """From logits; what lies under the mask is no state that the policy visited."""
    divergence = categorical_kl(torch.where(mask[..., None], logits, 0.0), ref_logits)
    return losses.exact_kl_loss(divergence, mask, num_tokens=num_tokens)


# --- clipped surrogate

RATIOS = tensor([[1.5, 0.5, 1.5, 0.5, NAN]], dtype=torch.float64)
SIGNS = tensor([[1.0, 1.0, -1.0, -1.0, NAN]], dtype=torch.float64)
FOUR = tensor([[True, True, True, True, False]])


def test_the_clipped_surrogate_of_four_tokens():
    # min(1.5, 1.2) + min(0.5, 0.8) + min(-1.5, -1.2) + min(-0.5, -0.8) = 1.2 + 0.5 - 1.5 - 0.8
    logprobs = RATIOS.log().requires_grad_()
    zeros = torch.zeros_like(RATIOS)
    result = clipped_policy_loss(logprobs, zeros, SIGNS, FOUR, clip=0.2, num_tokens=4)
    assert _near(result.loss, 0.6 / 4)
    assert _near(result.clip_fraction, 2 / 4)
    assert _near(result.approx_kl, 2 * (0.5 - math.log(1.5) - 0.5 + LN2) / 4)
    assert _near(result.ratio_mean, 1.0)
    assert _near(result.ratio_max, 1.5)
    # -ratio * A / 4 where the minimum is the unclipped term, 0 where it is the clipped one
    result.loss.backward()
    expected = tensor([[0.0, -0.5, 1.5, 0.0, 0.0]], dtype=torch.float64) / 4
    torch.testing.assert_close(logprobs.grad, expected)


def test_the_two_sides_of_the_clip_can_differ():
    # min(1.5, 1.4) + 0.5 - 1.5 + min(-0.5, -0.7) = 1.4 + 0.5 - 1.5 - 0.7
    zeros = torch.zeros_like(RATIOS)
    result = clipped_policy_loss(RATIOS.log(), zeros, SIGNS, FOUR, clip=(0.3, 0.4), num_tokens=2)
    assert _near(result.loss, 0.3 / 2)
    # high 0.6 clips nothing above, low 0.6 nothing below
    wide = clipped_policy_loss(RATIOS.log(), zeros, SIGNS, FOUR, clip=(0.6, 0.6), num_tokens=2)
    assert wide.clip_fraction.item() == 0


def test_the_dual_clip_bounds_the_loss_of_bad_tokens_alone():
    # ratio 5: A = -1: min(-5, -1.2) = -5, bounded to 3 * -1; A = 1: min(5, 1.2) stays 1.2
    # ratio 1/2: A = -1: -0.8 stays, A = 1: 0.5 stays
    logprobs = tensor([[5.0, 5.0, 0.5, 0.5]]).log().requires_grad_()
    advantages = tensor([[-1.0, 1.0, -1.0, 1.0]])
    mask, zeros = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4)
    options = {"num_tokens": 4, "dual_clip": 3.0}
    result = clipped_policy_loss(logprobs, zeros, advantages, mask, clip=0.2, **options)
    assert _near(result.loss, -(-3 + 1.2 - 0.8 + 0.5) / 4)
    assert _near(result.clip_fraction, 3 / 4)
    result.loss.backward()
    torch.testing.assert_close(logprobs.grad, tensor([[0.0, 0.0, 0.0, -0.125]]))
    alone = clipped_policy_loss(logprobs, zeros, advantages, mask, clip=None, **options)
    assert _near(alone.loss, -(-3 + 5 - 0.5 + 0.5) / 4)
    assert _near(alone.clip_fraction, 1 / 4)


def test_the_dual_clip_leaves_a_zero_advantage_alone():
    zeros, mask = torch.zeros(1, 1), tensor([[True]])
    logprobs = torch.full((1, 1), LN2, requires_grad=True)
    result = clipped_policy_loss(
        logprobs, zeros, zeros, mask, clip=None, num_tokens=1, dual_clip=2.0
    )
    assert result.loss.item() == result.clip_fraction.item() == 0


def test_the_largest_ratio_is_one_where_there_is_no_token_and_below_one_where_all_are():
    zeros = torch.zeros(1, 2)
    mask, none = tensor([[True, False]]), tensor([[False, False]])
    logprobs = tensor([[-LN2, 5.0]])
    below = clipped_policy_loss(logprobs, zeros, zeros, mask, clip=0.2, num_tokens=1)
    assert _near(below.ratio_max, 0.5)
    empty = clipped_policy_loss(logprobs, zeros, zeros, none, clip=0.2, num_tokens=3)
    assert empty.ratio_max.item() == 1
    assert empty.loss.item() == empty.ratio_mean.item() == empty.approx_kl.item() == 0


@examples
@given(seeds, sizes, st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.sampled_from([None, 1.5]))
def test_the_clipped_surrogate_agrees_with_plain_python(seed: int, size, low, high, dual):
    new, old, advantages, mask = _case(seed, size)
    loss, clipped, kl, ratios = 0.0, 0, 0.0, []
    for at in _where(mask):
        log_ratio, advantage = new[at].item() - old[at].item(), advantages[at].item()
        ratio = math.exp(log_ratio)
        inside = max(1 - low, min(ratio, 1 + high))
        objective = min(ratio * advantage, inside * advantage)
        if dual is not None and advantage < 0:
            objective = max(objective, dual * advantage)
        loss -= objective
        clipped += objective != ratio * advantage
        kl += ratio - 1 - log_ratio
        ratios.append(ratio)
    result = clipped_policy_loss(
        new, old, advantages, mask, clip=(low, high), num_tokens=7, dual_clip=dual
    )
    assert _near(result.loss, loss / 7)
    assert _near(result.clip_fraction, clipped / 7)
    assert _near(result.approx_kl, kl / 7)
    assert _near(result.ratio_mean, sum(ratios) / 7)
    assert _near(result.ratio_max, max(ratios, default=1.0))


@examples
@given(seeds, sizes)
def test_a_clip_that_is_wide_enough_is_none(seed: int, size: tuple[int, int]):
    new, old, advantages, mask = _case(seed, size)
    wide = clipped_policy_loss(new, old, advantages, mask, clip=(1.0, 1e9), num_tokens=5)
    none = clipped_policy_loss(new, old, advantages, mask, clip=None, num_tokens=5)
    assert torch.equal(wide.loss, none.loss)
    assert wide.clip_fraction.item() == none.clip_fraction.item() == 0
    expected = -sum((new - old).exp()[at] * advantages[at] for at in _where(mask)) / 5
    assert _near(none.loss, float(expected))


@pytest.mark.parametrize("clip", [None, 0.2, (0.2, 0.3)])
def test_where_new_is_old_the_gradient_is_reinforce_s_and_the_ratio_exactly_one(clip):
    new, _, advantages, mask = _case(3, (3, 4))
    logprobs = new.float().requires_grad_()
    advantages = advantages.float()
    result = clipped_policy_loss(
        logprobs, new.float(), advantages, mask, clip=clip, num_tokens=int(mask.sum())
    )
    result.loss.backward()
    reinforce = torch.where(mask, -advantages, 0.0) / mask.sum()
    torch.testing.assert_close(logprobs.grad, reinforce)
    assert result.approx_kl.item() == 0
    assert result.ratio_max.item() == result.ratio_mean.item() == 1
    assert result.clip_fraction.item() == 0


def test_the_approximate_kl_keeps_its_digits_near_zero():
    logprobs, zeros = torch.full((1, 1), 1e-4), torch.zeros(1, 1)
    result = clipped_policy_loss(logprobs, zeros, zeros, tensor([[True]]), clip=0.2, num_tokens=1)
    assert result.approx_kl.item() == pytest.approx(5.00017e-9, rel=2e-2)


# --- KL-penalised surrogate


def test_the_penalised_surrogate_of_one_token():
    # ratio 1.5, A 2: 3 - 0.5 * (1.5 - 1 - ln 1.5)
    logprobs = tensor([[math.log(1.5), NAN]], requires_grad=True)
    zeros, advantages = torch.zeros(1, 2), tensor([[2.0, NAN]])
    mask = tensor([[True, False]])
    result = kl_penalty_policy_loss(logprobs, zeros, advantages, mask, kl_coef=0.5, num_tokens=2)
    assert _near(result.loss, -(3 - 0.5 * (0.5 - math.log(1.5))) / 2)
    assert _near(result.approx_kl, (0.5 - math.log(1.5)) / 2)
    assert result.clip_fraction.item() == 0
    assert _near(result.ratio_mean, 1.5 / 2)
    assert _near(result.ratio_max, 1.5)
    # d/dlogp of ratio * A is 3, of k3 ratio - 1 = 0.5
    result.loss.backward()
    torch.testing.assert_close(logprobs.grad, tensor([[-(3 - 0.25) / 2, 0.0]]))


def test_the_penalty_s_expected_gradient_is_that_of_kl_old_new():
    # one token per quarter of the old distribution (1/4, 3/4): the mean is the exact expectation
    old = tensor([0.25, 0.75], dtype=torch.float64).log()
    actions = tensor([[0, 1, 1, 1]])
    logits = tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)[actions]
    mask, zeros = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.float64)
    result = kl_penalty_policy_loss(logprobs, old[actions], zeros, mask, kl_coef=2, num_tokens=4)
    (found,) = torch.autograd.grad(result.loss, logits)
    exact = 2 * (old.exp() * (old - logits.log_softmax(0))).sum()
    (expected,) = torch.autograd.grad(exact, logits)
    assert _near(result.loss, exact.item())
    torch.testing.assert_close(found, expected)


@examples
@given(seeds, sizes)
def test_without_a_coefficient_it_is_the_unclipped_surrogate(seed: int, size: tuple[int, int]):
    new, old, advantages, mask = _case(seed, size)
    penalised = kl_penalty_policy_loss(new, old, advantages, mask, kl_coef=0, num_tokens=5)
    unclipped = clipped_policy_loss(new, old, advantages, mask, clip=None, num_tokens=5)
    for field in ("loss", "clip_fraction", "approx_kl", "ratio_mean", "ratio_max"):
        assert torch.equal(getattr(penalised, field), getattr(unclipped, field))


# --- value loss


def test_the_clipped_value_loss_of_three_tokens():
    # V 3, old 1, R 4, clip 1/2: (3-4)^2 = 1 < (1.5-4)^2 = 6.25, clipped wins, no gradient
    # V 3, old 1, R 0: 9 > 1.5^2, the value's own error; V -1, old 1, R -2: 1 < (0.5+2)^2 = 6.25
    values = tensor([[3.0, 3.0, -1.0, NAN]], requires_grad=True)
    old, returns = tensor([[1.0, 1.0, 1.0, NAN]]), tensor([[4.0, 0.0, -2.0, NAN]])
    mask = tensor([[True, True, True, False]])
    result = clipped_value_loss(values, old, returns, mask, clip=0.5, num_tokens=5)
    assert _near(result.loss, (6.25 + 9 + 6.25) / 2 / 5)
    assert _near(result.clip_fraction, 2 / 5)
    assert _near(result.error, (1 + 9 + 1) / 5)
    result.loss.backward()
    torch.testing.assert_close(values.grad, tensor([[0.0, 3 / 5, 0.0, 0.0]]))


def test_without_a_clip_the_value_loss_is_half_the_squared_error():
    values = tensor([[3.0, 3.0]], requires_grad=True)
    returns, mask = tensor([[4.0, 0.0]]), tensor([[True, True]])
    result = clipped_value_loss(values, values.detach() + 9, returns, mask, clip=None, num_tokens=2)
    assert _near(result.loss, (1 + 9) / 2 / 2)
    assert result.clip_fraction.item() == 0
    assert _near(result.error, 5.0)
    result.loss.backward()
    torch.testing.assert_close(values.grad, tensor([[-0.5, 1.5]]))


@examples
@given(seeds, sizes, st.floats(0.05, 1))
def test_the_value_loss_agrees_with_plain_python(seed: int, size: tuple[int, int], clip: float):
    values, old, returns, mask = _case(seed, size)
    loss, clipped, error = 0.0, 0, 0.0
    for at in _where(mask):
        value, before, target = values[at].item(), old[at].item(), returns[at].item()
        near = before + max(-clip, min(value - before, clip))
        loss += 0.5 * max((value - target) ** 2, (near - target) ** 2)
        outside = abs(value - before) > clip
        clipped += outside and (near - target) ** 2 > (value - target) ** 2
        error += (value - target) ** 2
    result = clipped_value_loss(values, old, returns, mask, clip=clip, num_tokens=7)
    assert _near(result.loss, loss / 7)
    assert _near(result.clip_fraction, clipped / 7)
    assert _near(result.error, error / 7)


def test_a_value_that_has_not_moved_is_not_clipped():
    values, _, returns, mask = _case(5, (3, 5))
    result = clipped_value_loss(values, values, returns, mask, clip=0.1, num_tokens=3)
    assert result.clip_fraction.item() == 0
    assert _near(result.loss, result.error.item() / 2)


# --- entropy

H = tensor([[1.0, 2.0, NAN]])
TWO = tensor([[True, True, False]])


def test_the_entropy_bonus_is_minus_the_mean():
    entropy = H.clone().requires_grad_()
    loss = entropy_loss(entropy, TWO, threshold=None, num_tokens=2)
    assert loss.item() == -1.5
    loss.backward()
    assert entropy.grad.tolist() == [[-0.5, -0.5, 0.0]]


@pytest.mark.parametrize(("threshold", "slope"), [(2.0, -0.5), (1.0, 0.5), (1.5, 0.0)])
@pytest.mark.parametrize("batch_mean", [None, 1.5])
def test_the_entropy_threshold_pulls_the_mean_towards_itself(threshold, slope, batch_mean):
    entropy = H.clone().requires_grad_()
    loss = entropy_loss(entropy, TWO, threshold=threshold, num_tokens=2, batch_mean=batch_mean)
    assert loss.item() == pytest.approx(abs(1.5 - threshold))
    loss.backward()
    assert entropy.grad.tolist() == [[slope, slope, 0.0]]


@examples
@given(seeds, sizes, st.floats(-0.5, 0.5))
def test_with_the_batch_s_mean_the_entropy_losses_of_rows_add_up(seed: int, size, threshold):
    entropy, _, _, mask = _case(seed, size)
    count = int(mask.sum())
    if count == 0:
        return
    mean = entropy[mask].mean().item()
    whole, parts = entropy.clone().requires_grad_(), entropy.clone().requires_grad_()
    loss = entropy_loss(whole, mask, threshold=threshold, num_tokens=count)
    loss.backward()
    assert _near(loss, abs(mean - threshold))
    total = sum(
        entropy_loss(
            parts[row : row + 1], mask[row : row + 1], threshold=threshold, num_tokens=count,
            batch_mean=mean,
        )
        for row in range(size[0])
    )  # fmt: skip
    total.backward()
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(parts.grad, whole.grad)


# --- language modelling


def test_the_lm_loss_is_the_mean_nll():
    logprobs = tensor([[-1.0, -2.0, NAN]], requires_grad=True)
    loss = lm_loss(logprobs, TWO, num_tokens=2.0)
    assert loss.item() == 1.5
    loss.backward()
    assert logprobs.grad.tolist() == [[-0.5, -0.5, 0.0]]


# --- ranking


def test_the_ranking_loss_of_two_pairs():
    # z = ln 3: sigmoid 3/4; z = -ln 3: 1/4; log-odds of 4/3 and 4
    chosen, rejected = tensor([math.log(3), 0.0]), tensor([0.0, math.log(3)])
    result = pairwise_ranking_loss(chosen, rejected, num_pairs=2)
    assert _near(result.loss, (math.log(4 / 3) + math.log(4)) / 2)
    assert result.accuracy.item() == 0.5


def test_the_centring_loss_of_two_pairs():
    chosen, rejected = tensor([3.0, 0.5]), tensor([-1.0, 0.5])
    assert _near(centring_loss(chosen, rejected, num_pairs=2), (2**2 + 1) / 2)
    weighed = centring_loss(chosen, rejected, num_pairs=4, weights=tensor([0.5, 3.0]))
    assert _near(weighed, (0.5 * 4 + 3) / 4)
    assert _near(centring_loss(chosen, -chosen, num_pairs=2), 0.0)


def test_margin_smoothing_and_weights_of_the_ranking_loss():
    chosen, rejected = tensor([math.log(3), 0.0]), tensor([0.0, 0.0])
    # margin ln 3 on both: z = 0 and -ln 3
    result = pairwise_ranking_loss(chosen, rejected, num_pairs=2, margin=math.log(3))
    assert _near(result.loss, (LN2 + math.log(4)) / 2)
    result = pairwise_ranking_loss(chosen, rejected, num_pairs=2, margin=tensor([math.log(3), 0.0]))
    assert _near(result.loss, LN2)
    assert result.accuracy.item() == 0.5  # the margin has no part in who won
    # smoothing 0.1: 0.9 ln(4/3) + 0.1 ln 4, and ln 2 whatever the smoothing
    result = pairwise_ranking_loss(chosen, rejected, num_pairs=2, label_smoothing=0.1)
    assert _near(result.loss, (0.9 * math.log(4 / 3) + 0.1 * math.log(4) + LN2) / 2)
    # weights 1/2 and 3: 0.5 ln(4/3) + 3 ln 2, and half a pair right
    result = pairwise_ranking_loss(chosen, rejected, num_pairs=2, weights=tensor([0.5, 3.0]))
    assert _near(result.loss, (0.5 * math.log(4 / 3) + 3 * LN2) / 2)
    assert result.accuracy.item() == 0.25


def test_a_tie_is_not_won():
    zeros = torch.zeros(3)
    result = pairwise_ranking_loss(zeros, zeros, num_pairs=3)
    assert result.accuracy.item() == 0
    assert _near(result.loss, LN2)


@examples
@given(seeds, st.integers(1, 6), st.floats(0, 0.4), st.floats(-1, 2), st.floats(-9, 9))
def test_the_ranking_loss_agrees_with_plain_python_and_forgets_a_shift(
    seed: int, pairs: int, smoothing: float, margin: float, shift: float
):
    (chosen,), (rejected,), (weights,), _ = _case(seed, (1, pairs))
    weights = weights.abs()
    loss, right = 0.0, 0.0
    for better, worse, weight in zip(
        *(x.tolist() for x in (chosen, rejected, weights)), strict=True
    ):
        p = 1 / (1 + math.exp(worse + margin - better))
        loss -= weight * ((1 - smoothing) * math.log(p) + smoothing * math.log(1 - p))
        right += weight * (better > worse)
    options = {"num_pairs": 5, "margin": margin, "label_smoothing": smoothing, "weights": weights}
    for result in (
        pairwise_ranking_loss(chosen, rejected, **options),
        pairwise_ranking_loss(chosen + shift, rejected + shift, **options),
    ):
        assert _near(result.loss, loss / 5)
        assert _near(result.accuracy, right / 5)


# --- KL to the reference


def test_two_estimates_of_the_kl_to_the_reference():
    # r = -1 - (-3) = 2: k2 = 2, slope -2; k3 = e^2 - 3, slope 1 - e^2
    for estimator, number, slope in (("k2", 2.0, -2.0), ("k3", math.e**2 - 3, 1 - math.e**2)):
        logprobs = tensor([[-3.0, NAN]], requires_grad=True)
        loss = ref_kl_loss(
            logprobs, tensor([[-1.0, NAN]]), tensor([[True, False]]), estimator=estimator,
            num_tokens=4,
        )  # fmt: skip
        assert _near(loss, number / 4)
        loss.backward()
        torch.testing.assert_close(logprobs.grad, tensor([[slope / 4, 0.0]]))


def test_k1_is_no_loss_and_refused_outside_of_tests_too():
    unchecked = getattr(ref_kl_loss, "__wrapped__", ref_kl_loss)
    zeros = torch.zeros(1, 1)
    with pytest.raises(ConfigError, match="k1"):
        unchecked(zeros, zeros, tensor([[True]]), estimator="k1", num_tokens=1)


def test_the_exact_kl_of_two_coins():
    # pi (3/4, 1/4) against (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2); logits may be shifted
    logits = tensor([[[math.log(3), 0.0], [NAN, NAN]]], requires_grad=True)
    ref_logits = tensor([[[5.0, 5.0], [NAN, NAN]]])
    loss = exact_kl_loss(logits, ref_logits, tensor([[True, False]]), num_tokens=2)
    assert _near(loss, (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)
    loss.backward()
    # dKL/dlogit_v = pi_v (log pi_v/ref_v - KL)
    slope = 0.75 * (math.log(1.5) - 2 * loss.item()) / 2
    expected = tensor([[[slope, -slope], [0.0, 0.0]]])
    torch.testing.assert_close(logits.grad, expected)


@examples
@given(seeds, sizes)
def test_the_exact_kl_agrees_with_plain_python_and_is_zero_at_the_reference(seed: int, size):
    generator = torch.Generator().manual_seed(seed)
    logits, ref = torch.randn((2, *size, 3), generator=generator, dtype=torch.float64)
    *_, mask = _case(seed, size)
    total = 0.0
    for row, column in _where(mask):
        mine, theirs = logits[row, column].exp().tolist(), ref[row, column].exp().tolist()
        for one, other in zip(mine, theirs, strict=True):
            p, q = one / sum(mine), other / sum(theirs)
            total += p * math.log(p / q)
    assert _near(exact_kl_loss(logits, ref, mask, num_tokens=3), total / 3)
    assert exact_kl_loss(logits, logits, mask, num_tokens=3).item() == 0


# --- explained variance


def test_the_explained_variance_of_three_tokens():
    # R 1 2 3, V 1 2 2: R - V = 0 0 1 with m2 6/9, R with m2 2: 1 - 1/3
    returns, values = tensor([[1.0, 2.0, 3.0, NAN]]), tensor([[1.0, 2.0, 2.0, NAN]])
    mask = tensor([[True, True, True, False]])
    assert explained_variance(values, returns, mask) == pytest.approx(2 / 3)
    assert explained_variance(values + 5, returns, mask) == pytest.approx(2 / 3)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert explained_variance(torch.zeros(1, 4), returns, mask) == 0


def test_returns_that_do_not_vary_explain_nothing():
    values, returns = tensor([[1.0, 2.0]]), tensor([[3.0, 3.0]])
    assert explained_variance(values, returns, tensor([[True, True]])) == 0
    assert explained_variance(values, tensor([[3.0, 9.0]]), tensor([[True, False]])) == 0
    assert explained_variance_of(Moments(2, 0.0, 0.5), Moments(2, 0.0, 0.98e-16)) == 0
    assert explained_variance_of(Moments(2, 0.0, 0.5e-16), Moments(2, 0.0, 1.0e-16)) == 0.5
    assert explained_variance_of(Moments(3, 0.0, 1.5e-16), Moments(3, 0.0, 1.9e-16)) == 0
    assert explained_variance_of(Moments(2, 0.0, 0.5), Moments(2, 0.0, 2.0)) == 0.75
    rounding = tensor([[3.0, 3.0 + 2.4e-7]])  # one fp32 step apart
    assert explained_variance(values, rounding, tensor([[True, True]])) == 0
    for mean in (-2.0, 2.0):  # 1e-6 of the mean is where a std begins to count
        assert explained_variance_of(Moments(2, 0.0, 1.0), Moments(2, mean, 3.9e-12)) == 0
        assert explained_variance_of(Moments(2, 0.0, 1e-12), Moments(2, mean, 4.1e-12)) > 0.7


@examples
@given(seeds, sizes)
def test_the_explained_variance_of_rows_merges_to_the_batch_s(seed: int, size: tuple[int, int]):
    values, returns, _, mask = _case(seed, size)
    errors = targets = Moments(0, 0.0, 0.0)
    for v, r, m in zip(values, returns, mask, strict=True):
        errors = merge_moments(errors, masked_moments(r - v, m))
        targets = merge_moments(targets, masked_moments(r, m))
    merged = explained_variance_of(errors, targets)
    assert merged == pytest.approx(explained_variance(values, returns, mask), rel=1e-9)
    if mask.sum() > 1:
        ratio = (returns - values)[mask].var() / returns[mask].var()
        assert merged == pytest.approx(1 - ratio.item(), rel=1e-9)


# --- every loss

LOSSES = {
    "clipped": lambda a, b, c, m, n: clipped_policy_loss(a, b, c, m, clip=0.2, num_tokens=n),
    "dual": lambda a, b, c, m, n: clipped_policy_loss(
        a, b, c, m, clip=0.2, num_tokens=n, dual_clip=1.5
    ),
    "penalised": lambda a, b, c, m, n: kl_penalty_policy_loss(
        a, b, c, m, kl_coef=0.3, num_tokens=n
    ),
    "value": lambda a, b, c, m, n: clipped_value_loss(a, b, c, m, clip=0.2, num_tokens=n),
    "unclipped value": lambda a, b, c, m, n: clipped_value_loss(
        a, b, c, m, clip=None, num_tokens=n
    ),
    "k2": lambda a, b, c, m, n: ref_kl_loss(a, b, m, estimator="k2", num_tokens=n),
    "k3": lambda a, b, c, m, n: ref_kl_loss(a, b, m, estimator="k3", num_tokens=n),
    "lm": lambda a, b, c, m, n: lm_loss(a, m, num_tokens=n),
    "entropy": lambda a, b, c, m, n: entropy_loss(a, m, threshold=None, num_tokens=n),
}


def _loss(result) -> Tensor:
    return result if isinstance(result, Tensor) else result.loss


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_loss_is_its_derivative(name: str):
    a, b, c, mask = _case(11, (2, 3))
    a.requires_grad_()
    assert gradcheck(lambda x: _loss(LOSSES[name](x, b, c, mask, 3)), (a,))


def test_the_gradients_of_ranking_and_exact_kl_are_their_derivatives():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, 2, 2, 3), generator=generator, dtype=torch.float64)
    a.requires_grad_()
    mask = tensor([[True, True], [True, False]])
    assert gradcheck(lambda x: exact_kl_loss(x, b, mask, num_tokens=3), (a,))
    chosen, rejected = a[0, 0], a[0, 1]
    options = {"num_pairs": 3, "margin": 0.2, "label_smoothing": 0.1}
    assert gradcheck(lambda x, y: pairwise_ranking_loss(x, y, **options).loss, (chosen, rejected))


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_flows_to_the_first_argument_and_through_the_loss_alone(name: str):
    a, b, c, mask = _case(2, (2, 3))
    others = (b.requires_grad_(), c.requires_grad_())
    result = LOSSES[name](a.requires_grad_(), *others, mask, 3)
    _loss(result).backward()
    assert a.grad is not None
    assert all(other.grad is None for other in others)
    if not isinstance(result, Tensor):
        for field in result.__slots__:
            assert field == "loss" or not getattr(result, field).requires_grad


def test_no_gradient_flows_to_the_reference_s_logits_nor_through_accuracy():
    logits, ref = torch.zeros(1, 1, 2, requires_grad=True), torch.ones(1, 1, 2, requires_grad=True)
    exact_kl_loss(logits, ref, tensor([[True]]), num_tokens=1).backward()
    assert ref.grad is None
    scores = torch.ones(2, requires_grad=True)
    assert not pairwise_ranking_loss(scores, -scores, num_pairs=2).accuracy.requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_results_keep_the_argument_s_dtype(name: str):
    for dtype in (torch.float32, torch.float64):
        a, b, c, mask = (x if x.dtype == torch.bool else x.to(dtype) for x in _case(2, (2, 3)))
        result = LOSSES[name](a, b, c, mask, 3)
        fields = [result] if isinstance(result, Tensor) else [
            getattr(result, field) for field in result.__slots__
        ]  # fmt: skip
        assert {field.dtype for field in fields} == {dtype}


@pytest.mark.parametrize("name", LOSSES)
@examples
@given(seeds, sizes)
def test_permuting_the_batch_changes_no_loss_and_permutes_the_gradient(name: str, seed, size):
    a, b, c, mask = _case(seed, size)
    order = torch.randperm(size[0], generator=torch.Generator().manual_seed(seed))
    one, other = a.clone().requires_grad_(), a[order].clone().requires_grad_()
    loss = _loss(LOSSES[name](one, b, c, mask, 3))
    permuted = _loss(LOSSES[name](other, b[order], c[order], mask[order], 3))
    torch.testing.assert_close(permuted, loss)
    loss.backward(), permuted.backward()
    torch.testing.assert_close(other.grad, one.grad[order])
