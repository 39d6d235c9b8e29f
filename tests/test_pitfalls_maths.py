"""Mistakes found in other RLHF code, as far as they are mistakes of mathematics.

Every test is named for one that a public trainer has or had; none may come back here.
"""

import itertools
import json
import math
import statistics

import pytest
import torch
from torch import Tensor, tensor

from ppomax import losses
from ppomax.advantages import broadcast_scores, gae, reinforce_returns
from ppomax.experience import (
    AdaptiveKL,
    kl_penalty,
    missing_eos_scores,
    perplexity,
    reparameterize_scores,
    sequence_kl,
    token_rewards,
)
from ppomax.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy_loss,
    explained_variance,
    kl_penalty_policy_loss,
    lm_loss,
    pairwise_ranking_loss,
    ref_kl_loss,
)
from ppomax.masked import (
    Moments,
    masked_max,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_whiten,
    merge_moments,
)
from ppomax.models.exact_kl import categorical_kl
from ppomax.normalise import RunningMoments

GENERATOR_SEED = 20230711
F64 = torch.float64


def _random(*shape: int, seed: int = GENERATOR_SEED) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def exact_kl_loss(logits: Tensor, ref_logits: Tensor, mask: Tensor, *, num_tokens: int) -> Tensor:
    """From logits; what lies under the mask is no state that the policy visited."""
    divergence = categorical_kl(torch.where(mask[..., None], logits, 0.0), ref_logits)
    return losses.exact_kl_loss(divergence, mask, num_tokens=num_tokens)


LENGTHS = (4, 2, 0, 1)
MASK = torch.arange(4) < tensor(LENGTHS)[:, None]

MASKED = {
    "masked_sum": lambda a, b, c, m: masked_sum(a, m),
    "masked_mean": lambda a, b, c, m: masked_mean(a, m),
    "masked_max": lambda a, b, c, m: masked_max(a, m, empty=0),
    "masked_moments": lambda a, b, c, m: tensor(masked_moments(a, m)),
    "masked_whiten": lambda a, b, c, m: masked_whiten(a, m),
    "masked_whiten, unshifted": lambda a, b, c, m: masked_whiten(a, m, shift_mean=False),
    "gae": lambda a, b, c, m: torch.stack(gae(a, b, m, gamma=0.9, lam=0.8)),
    "gae, critic's lambda": lambda a, b, c, m: torch.stack(
        gae(a, b, m, gamma=0.9, lam=0.8, lam_critic=1.0, last_values=b[:, 0])
    ),
    "reinforce_returns": lambda a, b, c, m: reinforce_returns(a, m, gamma=0.9),
    "broadcast_scores": lambda a, b, c, m: broadcast_scores(a[:, 0], m),
    "k1": lambda a, b, c, m: kl_penalty(a, b, m, estimator="k1"),
    "k2": lambda a, b, c, m: kl_penalty(a, b, m, estimator="k2"),
    "k3": lambda a, b, c, m: kl_penalty(a, b, m, estimator="k3"),
    "sequence_kl": lambda a, b, c, m: sequence_kl(a, b, m),
    "perplexity": lambda a, b, c, m: perplexity(a, m),
    "token_rewards": lambda a, b, c, m: token_rewards(
        c[:, 0], a, b, m, kl_coef=0.1, step_rewards=c
    ),
    "clipped_policy_loss": lambda a, b, c, m: clipped_policy_loss(
        a, b, c, m, clip=0.2, num_tokens=7
    ),
    "clipped_policy_loss, dual": lambda a, b, c, m: clipped_policy_loss(
        a, b, c, m, clip=None, num_tokens=7, dual_clip=1.5
    ),
    "kl_penalty_policy_loss": lambda a, b, c, m: kl_penalty_policy_loss(
        a, b, c, m, kl_coef=0.1, num_tokens=7
    ),
    "clipped_value_loss": lambda a, b, c, m: clipped_value_loss(a, b, c, m, clip=0.2, num_tokens=7),
    "clipped_value_loss, off": lambda a, b, c, m: clipped_value_loss(
        a, b, c, m, clip=None, num_tokens=7
    ),
    "entropy_loss": lambda a, b, c, m: entropy_loss(a, m, threshold=None, num_tokens=7),
    "entropy_loss, threshold": lambda a, b, c, m: entropy_loss(a, m, threshold=0.3, num_tokens=7),
    "lm_loss": lambda a, b, c, m: lm_loss(a, m, num_tokens=7),
    "ref_kl_loss, k2": lambda a, b, c, m: ref_kl_loss(a, b, m, estimator="k2", num_tokens=7),
    "ref_kl_loss, k3": lambda a, b, c, m: ref_kl_loss(a, b, m, estimator="k3", num_tokens=7),
    "exact_kl_loss": lambda a, b, c, m: exact_kl_loss(
        torch.stack([a, b], -1), torch.stack([b, c], -1), m, num_tokens=7
    ),
    "explained_variance": lambda a, b, c, m: tensor(explained_variance(a, b, m)),
}
SUMMED = (  # what must add up over micro-batches
    "masked_sum", "clipped_policy_loss", "clipped_policy_loss, dual", "kl_penalty_policy_loss",
    "clipped_value_loss", "clipped_value_loss, off", "entropy_loss", "lm_loss", "ref_kl_loss, k2",
    "ref_kl_loss, k3", "exact_kl_loss",
)  # fmt: skip


def _fields(result) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"": result}
    return {name: getattr(result, name) for name in result.__slots__}


def _run(name: str, a: Tensor, b: Tensor, c: Tensor, mask: Tensor):
    """All results and the gradient of their sum (None where there is none)."""
    a = a.clone().requires_grad_()
    fields = _fields(MASKED[name](a, b, c, mask))
    if not any(field.requires_grad for field in fields.values()):
        return fields, None
    sum(field.sum() for field in fields.values() if field.requires_grad).backward()
    return {key: field.detach() for key, field in fields.items()}, a.grad


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e4])
@pytest.mark.parametrize("name", MASKED)
def test_01_garbage_in_padding_changes_nothing(name: str, garbage: float):
    clean = _random(3, *MASK.shape)
    dirty = torch.where(MASK, clean, garbage)
    expected, gradient = _run(name, *clean, MASK)
    found, found_gradient = _run(name, *dirty, MASK)
    for key, field in expected.items():
        assert torch.equal(found[key], field), key
    if gradient is not None:
        assert torch.equal(found_gradient, gradient)
        assert torch.all(gradient[~MASK] == 0)


@pytest.mark.parametrize("length", range(6))
@pytest.mark.parametrize("batch_mate", [0, 5])
def test_02_the_score_lands_on_the_last_generated_token(length: int, batch_mate: int):
    mask = torch.arange(5) < tensor([length, batch_mate])[:, None]
    zeros = torch.zeros(2, 5)
    rewards = token_rewards(tensor([3.0, 0.0]), zeros, zeros, mask, kl_coef=0.1)
    expected = torch.zeros(2, 5)
    if length:
        expected[0, length - 1] = 3
    assert torch.equal(rewards, expected)


def test_04_diagnostics_are_not_averaged_over_padding():
    # one token of ratio 1/2 in a batch padded to four: the padding counts for nothing
    logprobs = tensor([[-math.log(2), 0.0, 0.0, 0.0]], dtype=F64)
    mask = tensor([[True, False, False, False]])
    zeros = torch.zeros_like(logprobs)
    found = clipped_policy_loss(logprobs, zeros, zeros - 1, mask, clip=0.2, num_tokens=1)
    assert found.approx_kl.item() == pytest.approx(math.log(2) - 0.5)
    assert found.ratio_mean.item() == found.ratio_max.item() == pytest.approx(0.5)
    assert found.clip_fraction.item() == 1
    assert perplexity(logprobs, mask).item() == pytest.approx(2)
    assert entropy_loss(logprobs, mask, threshold=None, num_tokens=1).item() == pytest.approx(
        math.log(2)
    )


def test_05_whitening_has_mean_0_and_variance_1_over_the_mask_and_forgets_a_shift():
    x = _random(*MASK.shape) * 3 + 7
    white = masked_whiten(x, MASK)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[MASK].var().item() == pytest.approx(1)
    torch.testing.assert_close(masked_whiten(x + 100, MASK), white)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_06_whitening_does_not_depend_on_the_split(parts: int):
    x = _random(*MASK.shape) * 3 + 7
    pieces = list(zip(x.chunk(parts), MASK.chunk(parts), strict=True))
    moments = Moments(0, 0.0, 0.0)
    for piece, mask in pieces:
        moments = merge_moments(moments, masked_moments(piece, mask))
    white = torch.cat([masked_whiten(piece, mask, moments=moments) for piece, mask in pieces])
    torch.testing.assert_close(white, masked_whiten(x, MASK), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_mate", range(5))
def test_07_a_truncated_reply_s_advantage_does_not_depend_on_its_batch_mates(batch_mate: int):
    rewards, values = _random(2, 2, 4)
    last = tensor([0.7, -0.3], dtype=F64)
    alone = gae(
        rewards[:1, :2], values[:1, :2], torch.ones(1, 2, dtype=torch.bool), gamma=0.9, lam=0.8,
        last_values=last[:1],
    )  # fmt: skip
    mask = torch.arange(4) < tensor([2, batch_mate])[:, None]
    beside = gae(rewards, values, mask, gamma=0.9, lam=0.8, last_values=last)
    assert torch.equal(beside.advantages[0, :2], alone.advantages[0])
    assert torch.equal(beside.returns[0, :2], alone.returns[0])


def test_09_k1_and_k3_agree_with_the_exact_kl_and_k3_is_never_negative():
    policy = tensor([0.5, 0.3, 0.15, 0.05], dtype=F64)
    reference = tensor([0.2, 0.3, 0.1, 0.4], dtype=F64)
    exact = (policy * (policy / reference).log()).sum().item()
    count = 20_000
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    actions = torch.multinomial(policy, count, replacement=True, generator=generator)[None]
    mask = torch.ones_like(actions, dtype=torch.bool)
    for estimator in ("k1", "k3"):
        estimates = kl_penalty(
            policy.log()[actions], reference.log()[actions], mask, estimator=estimator
        )
        error = estimates.std().item() / math.sqrt(count)
        assert abs(estimates.mean().item() - exact) < 3 * error
        assert error < exact / 20  # the tolerance is one that can fail
    assert torch.all(estimates >= 0)


def test_10_the_adaptive_coefficient_knows_the_unit_of_its_target():
    # responses of 50 tokens at 0.02 nats per token are on a target of 1 nat per response
    per_token = AdaptiveKL(0.1, target_per_token=0.02)
    per_sequence = AdaptiveKL(0.1, target_per_sequence=1.0)
    logprobs = torch.full((2, 50), -1.0, dtype=F64)
    mask = torch.ones(2, 50, dtype=torch.bool)
    k1 = kl_penalty(logprobs, logprobs - 0.02, mask, estimator="k1")
    by_unit = {
        "token": masked_mean(k1, mask),
        "sequence": sequence_kl(logprobs, logprobs - 0.02, mask).mean(),
    }
    for controller in (per_token, per_sequence):
        controller.update(by_unit[controller.unit].item(), 64)
        assert controller.coef == pytest.approx(0.1, rel=1e-12)


def test_11_the_score_is_scaled_then_clipped_and_the_penalty_added_after_the_clip():
    # (9 - 1) / 2 = 4 -> 3, not 9 -> 3 -> 1; each token keeps a penalty of 10, beyond the clip
    scores = reparameterize_scores(tensor([9.0]), mean=1.0, std=2.0, clip=3.0)
    assert scores.tolist() == [3.0]
    mask = tensor([[True, True]])
    rewards = token_rewards(scores, torch.zeros(1, 2), -torch.ones(1, 2), mask, kl_coef=10)
    assert rewards.tolist() == [[-10.0, -7.0]]
    assert missing_eos_scores(scores, tensor([True]), penalty=1.0).tolist() == [2.0]


def test_12_running_moments_are_the_two_pass_result_in_any_order_of_batches():
    batches = [[3.0], [1.5, -2.0, 4.25], [], [0.1, 0.1], [7.0]]
    samples = [sample for batch in batches for sample in batch]
    for order in itertools.permutations(batches):
        moments = RunningMoments()
        for batch in order:
            moments.update(tensor(batch, dtype=F64))
            resumed = RunningMoments()
            resumed.load_state_dict(json.loads(json.dumps(moments.state_dict())))
            moments = resumed
        assert moments.count == len(samples)
        assert moments.mean == pytest.approx(statistics.fmean(samples), abs=1e-12)
        assert moments.std == pytest.approx(statistics.stdev(samples), abs=1e-12)


def test_12_a_single_first_sample_and_constant_rewards_divide_by_one():
    moments = RunningMoments()
    moments.update(tensor([0.7]))
    assert moments.std == 1
    moments.update(tensor([0.7, 0.7, 0.7]))
    assert moments.std == 1
    score = reparameterize_scores(tensor([0.7]), mean=moments.mean, std=moments.std, clip=10)
    assert score.item() == 0


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("split", [(1, 1, 1, 1), (2, 2), (3, 1)])
def test_19_micro_batches_add_up_in_loss_gradient_and_diagnostics(name: str, split):
    tensors = _random(3, *MASK.shape)
    whole, gradient = _run(name, *tensors, MASK)
    pieces = zip(*(x.split(split) for x in (*tensors, MASK)), strict=True)
    parts = [_run(name, *piece) for piece in pieces]
    torch.testing.assert_close(torch.cat([part for _, part in parts]), gradient)
    for key, field in whole.items():
        if key != "ratio_max":
            torch.testing.assert_close(sum(part[key] for part, _ in parts), field)


def test_19_the_mean_of_micro_batch_means_would_be_something_else():
    logprobs = _random(*MASK.shape)
    rows = [masked_mean(logprobs[i], MASK[i]) for i in range(4) if LENGTHS[i]]
    wrong = -sum(rows) / len(rows)
    assert abs(wrong - lm_loss(logprobs, MASK, num_tokens=7)) > 0.1


def test_21_an_entropy_threshold_above_ln_v_never_acts_and_one_below_does():
    # four tokens over a vocabulary of eight, between uniform and peaked
    logits = _random(1, 4, 8) * tensor([0.0, 0.5, 1.0, 2.0], dtype=F64)[:, None]
    entropy = torch.distributions.Categorical(logits=logits).entropy().requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool)

    def slope(threshold: float | None) -> float:
        loss = entropy_loss(entropy, mask, threshold=threshold, num_tokens=4)
        return torch.autograd.grad(loss, entropy)[0].sum().item()

    assert slope(35.0) == slope(math.log(8) + 0.01) == slope(None) == -1
    assert slope(0.5 * entropy.mean().item()) == 1


def test_22_the_value_loss_has_its_half_and_reads_the_tokens_the_advantages_have():
    values = _random(*MASK.shape).requires_grad_()
    old, returns = _random(2, *MASK.shape, seed=1)
    found = clipped_value_loss(values, old, returns, MASK, clip=None, num_tokens=7)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(0.5 * found.error.item())
    torch.testing.assert_close(values.grad, torch.where(MASK, values - returns, 0.0).detach() / 7)
    advantages = gae(returns, old, MASK, gamma=1, lam=0.9).advantages
    assert torch.equal(advantages != 0, values.grad != 0)


def test_28_the_ranking_loss_is_as_steep_for_a_pair_far_wrong_as_it_should_be():
    # -log(sigmoid(x) + 1e-5) has a slope of 4e-13 at x = -40; logsigmoid has -1
    chosen = tensor([-40.0, -1000.0], requires_grad=True)
    loss = pairwise_ranking_loss(chosen, torch.zeros(2), num_pairs=1).loss
    loss.backward()
    assert loss.item() == 1040
    assert chosen.grad.tolist() == [-1.0, -1.0]


# --- 38: which estimator may stand where


def _actions(policy: Tensor) -> tuple[Tensor, Tensor]:
    """Every action once, as one reply of one token each, and the mask."""
    count = len(policy)
    return torch.arange(count)[:, None], torch.ones(count, 1, dtype=torch.bool)


def _in_reward_gradient(logits: Tensor, penalty: Tensor) -> Tensor:
    """Expected policy gradient of a per-token penalty: sum of pi(a) grad log pi(a) penalty(a)."""
    logprobs = logits.log_softmax(0)
    actions, mask = _actions(logits)
    weighted = logprobs.detach().exp()[:, None] * penalty.detach()
    loss = clipped_policy_loss(
        logprobs[actions], logprobs.detach()[actions], weighted, mask, clip=None, num_tokens=1
    ).loss
    return -torch.autograd.grad(loss, logits)[0]


def _as_loss_gradient(logits: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Expected gradient of a loss term on sampled tokens, each action weighted by pi(a)."""
    logprobs = logits.log_softmax(0)
    actions, _ = _actions(logits)
    total = sum(
        logprobs[a].exp().detach()
        * ref_kl_loss(
            logprobs[action][None], reference.log()[action][None], tensor([[True]]),
            estimator=estimator, num_tokens=1,
        )
        for a, action in enumerate(actions)
    )  # fmt: skip
    return torch.autograd.grad(total, logits)[0]


def _kl_gradients(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """By autograd of the exact divergences: of KL(pi || ref) and of KL(ref || pi)."""
    logprobs = logits.log_softmax(0)
    forward = (logprobs.exp() * (logprobs - reference.log())).sum()
    backward = (reference * (reference.log() - logprobs)).sum()
    return tuple(
        torch.autograd.grad(kl, logits, retain_graph=True)[0] for kl in (forward, backward)
    )


TWO_ACTIONS = tensor([0.8, -0.3], dtype=F64)
COIN = tensor([0.35, 0.65], dtype=F64)


def _penalty(logits: Tensor, reference: Tensor, estimator: str) -> Tensor:
    actions, mask = _actions(logits)
    logprobs = logits.detach().log_softmax(0)
    return kl_penalty(logprobs[actions], reference.log()[actions], mask, estimator=estimator)


def test_38_only_k1_in_the_reward_gives_the_gradient_of_the_kl_to_the_reference():
    logits = TWO_ACTIONS.clone().requires_grad_()
    forward, backward = _kl_gradients(logits, COIN)
    found = {k: _in_reward_gradient(logits, _penalty(logits, COIN, k)) for k in ("k1", "k2", "k3")}
    torch.testing.assert_close(found["k1"], forward)
    torch.testing.assert_close(found["k3"], forward - backward)
    assert (found["k3"] - forward).abs().max() > 0.1
    assert (found["k2"] - forward).abs().max() > 0.1


def test_38_the_reward_that_ppo_sees_carries_k1():
    logits = TWO_ACTIONS.clone().requires_grad_()
    actions, mask = _actions(logits)
    rewards = token_rewards(
        torch.zeros(2, dtype=F64), logits.log_softmax(0)[actions], COIN.log()[actions], mask,
        kl_coef=1.0,
    )  # fmt: skip
    forward, _ = _kl_gradients(logits, COIN)
    torch.testing.assert_close(_in_reward_gradient(logits, rewards), -forward)


def test_38_k3_in_the_reward_vanishes_to_first_order_at_the_reference():
    step = tensor([1e-4, 0.0], dtype=F64)
    logits = (COIN.log() + step).requires_grad_()
    forward, _ = _kl_gradients(logits, COIN)
    k3 = _in_reward_gradient(logits, _penalty(logits, COIN, "k3"))
    assert forward.abs().max() > 1e-5
    assert k3.abs().max() < 1e-3 * forward.abs().max()


def test_38_as_losses_k2_k3_and_the_exact_kl_have_the_gradients_they_are_said_to_have():
    logits = TWO_ACTIONS.clone().requires_grad_()
    forward, backward = _kl_gradients(logits, COIN)
    torch.testing.assert_close(_as_loss_gradient(logits, COIN, "k2"), forward)
    torch.testing.assert_close(_as_loss_gradient(logits, COIN, "k3"), backward)
    exact = exact_kl_loss(
        logits[None, None], COIN.log()[None, None], tensor([[True]]), num_tokens=1
    )
    torch.testing.assert_close(torch.autograd.grad(exact, logits)[0], forward)


# --- the bandit whose optimum is known: pi proportional to pi_ref exp(r / eta)

REWARDS = tensor([1.0, 0.2, -0.5, 0.6], dtype=F64)
PRIOR = tensor([0.1, 0.4, 0.3, 0.2], dtype=F64)
ETA = 0.5
OPTIMUM = (PRIOR.log() + REWARDS / ETA).softmax(0)


def _ascend(gradient, steps: int = 150, lr: float = 4.0) -> Tensor:
    """Exact expected gradient ascent from the reference; the policy it arrives at."""
    logits = PRIOR.log().clone()
    for _ in range(steps):
        logits += lr * gradient(logits.clone().requires_grad_())
    return logits.softmax(0)


def _k1_in_reward(logits: Tensor) -> Tensor:
    actions, mask = _actions(logits)
    rewards = token_rewards(
        REWARDS, logits.log_softmax(0)[actions], PRIOR.log()[actions], mask, kl_coef=ETA
    )
    return _in_reward_gradient(logits, rewards)


def _k3_in_reward(logits: Tensor) -> Tensor:
    return _in_reward_gradient(logits, REWARDS[:, None] - ETA * _penalty(logits, PRIOR, "k3"))


def _exact_kl_as_loss(logits: Tensor) -> Tensor:
    kl = exact_kl_loss(logits[None, None], PRIOR.log()[None, None], tensor([[True]]), num_tokens=1)
    (slope,) = torch.autograd.grad(kl, logits, retain_graph=True)
    return _in_reward_gradient(logits, REWARDS[:, None]) - ETA * slope


def _total_variation(policy: Tensor) -> float:
    return 0.5 * (policy - OPTIMUM).abs().sum().item()


def test_the_bandit_s_optimum_is_somewhere_else_than_where_it_starts():
    assert _total_variation(PRIOR) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [_k1_in_reward, _exact_kl_as_loss])
def test_the_bandit_s_closed_form_optimum_is_reached(gradient):
    assert _total_variation(_ascend(gradient)) < 0.02


def test_k3_in_the_reward_misses_the_bandit_s_optimum():
    assert _total_variation(_ascend(_k3_in_reward)) > 0.1
