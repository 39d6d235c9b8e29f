"""Losses and their diagnostics: pure functions of tensors, to be minimised.

Each is a sum over selected tokens divided by a denominator its caller passes: the response tokens
(or pairs) of the whole optimizer batch over all ranks. So the losses, gradients and diagnostics of
micro-batches just add up. Weights of losses belong to the trainer, estimates of advantage and
return to `advantages`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ppomax.errors import ConfigError
from ppomax.masked import MIN_STD, Moments, masked_max, masked_moments, masked_sum


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A surrogate objective and its diagnostics, per response token. Only `loss` has a gradient."""

    loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]
    """Share of tokens whose gradient the clip removed."""
    approx_kl: Float[Tensor, ""]
    """KL(old || new), the k3 estimator (Schulman 2020)."""
    ratio_mean: Float[Tensor, ""]
    """Mean of new / old probability of the sampled tokens."""
    ratio_max: Float[Tensor, ""]
    """Largest such ratio; the one number that does not add up over micro-batches."""


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """The critic's loss and its diagnostics, per response token. Only `loss` has a gradient."""

    loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]
    """Share of tokens whose gradient the clip removed."""
    error: Float[Tensor, ""]
    """Mean squared error of the unclipped values to the returns."""


@dataclass(frozen=True, slots=True)
class RankingLoss:
    """The reward model's loss over pairs. Only `loss` has a gradient."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    """Share of pairs with the chosen answer scored strictly higher, weighted as the loss is."""


def clipped_policy_loss(
    logprobs: Float[Tensor, "batch response"],
    old_logprobs: Float[Tensor, "batch response"],
    advantages: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    clip: float | int | tuple[float | int, float | int] | None,
    num_tokens: float | int,
    dual_clip: float | int | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, negated so that it is minimised.

    Schulman et al. 2017, eq. 7; Zheng et al. 2023, eq. 15:

        L = -E[min(ratio * A, clamp(ratio, 1 - low, 1 + high) * A)]

    Args:
        old_logprobs: of the same tokens under the policy that sampled them.
        advantages: constants; no gradient flows through them.
        clip: one number for both sides, or (low, high); None leaves the ratio as it is.
        num_tokens: response tokens in the whole optimizer batch, all ranks.
        dual_clip: c > 1 keeps the objective at a negative advantage above c * A (Ye et al. 2020,
            1912.09729), so that a huge ratio cannot dominate. None is off.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)
    advantages = advantages.detach()
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    objective = unclipped
    if clip is not None:
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        objective = torch.minimum(unclipped, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, bounded, objective)
    return _policy_loss(objective, objective != unclipped, log_ratio, mask, num_tokens)


def kl_penalty_policy_loss(
    logprobs: Float[Tensor, "batch response"],
    old_logprobs: Float[Tensor, "batch response"],
    advantages: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    kl_coef: float | int,
    num_tokens: float | int,
) -> PolicyLoss:
    """PPO with a KL penalty to the sampling policy in place of a clip.

    Schulman et al. 2017, eq. 8; Zheng et al. 2023, eq. 14:

        L = -E[ratio * A - kl_coef * KL(old || new)]

    The divergence is estimated by k3 = ratio - 1 - log ratio on the tokens that `old` sampled: in
    expectation its value and its gradient are those of KL(old || new).

    Args:
        old_logprobs, advantages, num_tokens: as in `clipped_policy_loss`.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)
    objective = log_ratio.exp() * advantages.detach() - kl_coef * _k3(log_ratio)
    return _policy_loss(objective, torch.zeros_like(mask), log_ratio, mask, num_tokens)


def _policy_loss(
    objective: Float[Tensor, "batch response"],
    clipped: Bool[Tensor, "batch response"],
    log_ratio: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    num_tokens: float | int,
) -> PolicyLoss:
    """The record both surrogates return."""
    ratio = log_ratio.detach().exp()
    return PolicyLoss(
        loss=-masked_sum(objective, mask) / num_tokens,
        clip_fraction=masked_sum(clipped.to(ratio.dtype), mask) / num_tokens,
        approx_kl=masked_sum(_k3(log_ratio.detach()), mask) / num_tokens,
        ratio_mean=masked_sum(ratio, mask) / num_tokens,
        ratio_max=masked_max(ratio, mask, empty=1.0),
    )


def _k3(r: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """e^r - 1 - r without cancellation near 0 (Schulman 2020)."""
    return torch.expm1(r) - r


def clipped_value_loss(
    values: Float[Tensor, "batch response"],
    old_values: Float[Tensor, "batch response"],
    returns: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    clip: float | int | None,
    num_tokens: float | int,
) -> ValueLoss:
    """Half the squared error to the returns, the larger of two where the value moved too far.

    Zheng et al. 2023, eq. 16 and §5.3 (the half is the released code's):

        L = 1/2 E[max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2)]

    Args:
        old_values, returns: constants; no gradient flows through them.
        clip: how far a value may move from the rollout's, in units of reward. None is off.
        num_tokens: as in `clipped_policy_loss`; the same tokens as the policy's.
    """
    values = torch.where(mask, values, 0.0)
    old_values, returns = old_values.detach(), returns.detach()
    error = (values - returns).square()
    worst = error
    if clip is not None:
        near = values.clamp(old_values - clip, old_values + clip)
        worst = torch.maximum(error, (near - returns).square())
    return ValueLoss(
        loss=0.5 * masked_sum(worst, mask) / num_tokens,
        clip_fraction=masked_sum((worst > error).to(error.dtype), mask) / num_tokens,
        error=masked_sum(error.detach(), mask) / num_tokens,
    )


def entropy_loss(
    entropy: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    num_tokens: float | int,
    threshold: float | int | None = None,
    batch_mean: float | int | None = None,
) -> Float[Tensor, ""]:
    """What an entropy bonus adds to the loss, before its weight.

    Zheng et al. 2023, Figure 5, detail 3: -mean H, or with a threshold |mean H - threshold| as in
    the released code. A threshold above ln(vocabulary) never acts as one: H is pushed up for ever.

    The absolute value of a mean is not a sum over micro-batches, its sign is all that couples them:

        |mean H - threshold| = sign(mean H - threshold) * sum(H - threshold) / num_tokens

    Args:
        num_tokens: as in `clipped_policy_loss`.
        threshold: in nats per token; None is the plain bonus.
        batch_mean: mean entropy of the whole optimizer batch, where this is a part of it. Loss and
            gradient of the parts then add up. None: this *is* the whole batch.
    """
    if threshold is None:
        return -masked_sum(entropy, mask) / num_tokens
    excess = masked_sum(entropy - threshold, mask) / num_tokens
    if batch_mean is None:
        return excess.abs()
    return excess * ((batch_mean > threshold) - (batch_mean < threshold))


def lm_loss(
    logprobs: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    num_tokens: float | int,
) -> Float[Tensor, ""]:
    """Negative log-likelihood per selected token (SFT; the second terms of eq. 2 and eq. 17).

    Args:
        num_tokens: selected tokens in the whole optimizer batch, all ranks.
    """
    return -masked_sum(logprobs, mask) / num_tokens


def pairwise_ranking_loss(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    *,
    num_pairs: float | int,
    margin: float | int | Float[Tensor, " pairs"] | None = None,
    label_smoothing: float | int = 0.0,
    weights: Float[Tensor, " pairs"] | None = None,
) -> RankingLoss:
    """Negative log-likelihood of the preferences under Bradley and Terry.

    Zheng et al. 2023, eq. 2, first term; z = chosen - rejected - margin, s = label_smoothing:

        L = -(1 - s) log sigmoid(z) - s log sigmoid(-z)

    Args:
        chosen, rejected: scores of the two answers to each prompt.
        num_pairs: in the whole optimizer batch, all ranks (with weights: their sum).
        margin: by how much chosen should win (Touvron et al. 2023, 2307.09288, eq. 2).
        label_smoothing: assumed share of flipped labels, in [0, 0.5).
        weights: one per pair; the pairs of one ranked list sum to 1. None: 1 each.
    """
    difference = chosen - rejected
    z = difference if margin is None else difference - margin
    losses = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    correct = (difference > 0).to(losses.dtype)
    if weights is not None:
        losses, correct = weights * losses, weights * correct
    return RankingLoss(loss=losses.sum() / num_pairs, accuracy=correct.sum() / num_pairs)


def centring_loss(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    *,
    num_pairs: float | int,
    weights: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, ""]:
    """Pulls each pair's scores towards a mean of 0, which the ranking loss leaves free.

    Eisenstein et al. 2023, 2312.09244, section 3: mean of (chosen + rejected)^2.

    Args:
        num_pairs, weights: as in `pairwise_ranking_loss`.
    """
    squares = (chosen + rejected).square()
    return (squares if weights is None else weights * squares).sum() / num_pairs


def ref_kl_loss(
    logprobs: Float[Tensor, "batch response"],
    ref_logprobs: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    estimator: Literal["k2", "k3"],
    num_tokens: float | int,
) -> Float[Tensor, ""]:
    """KL to the reference as a loss term on sampled tokens, before its weight.

    With r = ref_logprobs - logprobs: k2 = r^2 / 2, whose expected gradient on the policy's own
    samples is that of KL(policy || reference); k3 = e^r - 1 - r, that of KL(reference || policy).
    k1 has none: its expected gradient is zero.

    Args:
        ref_logprobs: constants; no gradient flows through them.
        num_tokens: as in `clipped_policy_loss`.
    """
    r = torch.where(mask, ref_logprobs.detach() - logprobs, 0.0)
    match estimator:
        case "k2":
            return masked_sum(0.5 * r.square(), mask) / num_tokens
        case "k3":
            return masked_sum(_k3(r), mask) / num_tokens
    raise ConfigError(f"estimator: {estimator!r} is none of k2, k3")


def exact_kl_loss(
    divergence: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    num_tokens: float | int,
) -> Float[Tensor, ""]:
    """KL(policy || reference) at every response token as a loss term, before its weight.

    Args:
        divergence: exact, at each state the policy visited (`models.exact_kl`).
        num_tokens: as in `clipped_policy_loss`.
    """
    return masked_sum(divergence, mask) / num_tokens


def explained_variance(
    values: Float[Tensor, "batch response"],
    returns: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
) -> float:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one, negative for worse."""
    return explained_variance_of(
        masked_moments(returns - values, mask), masked_moments(returns, mask)
    )


def explained_variance_of(errors: Moments, returns: Moments) -> float:
    """Explained variance from moments of R - V and of R, merged over micro-batches and ranks.

    0.0 where the returns do not vary: fewer than two, or a std that is rounding of fp32 (below
    1e-8, or 1e-6 of their mean).
    """
    least = max(MIN_STD, 1e-6 * abs(returns.mean))
    if returns.count < 2 or math.sqrt(returns.m2 / (returns.count - 1)) < least:
        return 0.0
    return 1 - errors.m2 / returns.m2
