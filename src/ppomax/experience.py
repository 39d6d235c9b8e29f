"""From scores and log-probs to per-token rewards, and the coefficient that weighs the two.

The order is: normalise the score, clip it, then add the KL penalty (`reparameterize_scores`,
`token_rewards`). Rewards are constants to autograd; KL as a *loss* is in `losses`.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppomax.errors import ConfigError
from ppomax.masked import last_index, masked_mean


def kl_penalty(
    logprobs: Float[Tensor, "batch response"],
    ref_logprobs: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    estimator: Literal["k1", "k2", "k3"] = "k1",
) -> Float[Tensor, "batch response"]:
    """Per-token estimates of KL(policy || reference); 0 outside the mask.

    Schulman 2020, "Approximating KL divergence", with r = ref_logprobs - logprobs on tokens that
    the policy sampled:

        k1 = -r        k2 = r^2 / 2        k3 = e^r - 1 - r

    k1 and k3 are unbiased, k2 and k3 are never negative. As a *reward* only k1 gives the gradient
    of KL(policy || reference); see `token_rewards`. For a loss see `losses.ref_kl_loss`.
    """
    r = torch.where(mask, ref_logprobs - logprobs, 0.0)
    match estimator:
        case "k1":
            return -r
        case "k2":
            return 0.5 * r.square()
        case "k3":
            return torch.expm1(r) - r
    raise ConfigError(f"estimator: {estimator!r} is none of k1, k2, k3")


def sequence_kl(
    logprobs: Float[Tensor, "batch response"],
    ref_logprobs: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
) -> Float[Tensor, " batch"]:
    """The k1 estimate summed over each response, in nats per response; 0 in an empty row."""
    return kl_penalty(logprobs, ref_logprobs, mask, estimator="k1").sum(dim=1)


def perplexity(
    logprobs: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, ""]:
    """Exponential of the mean negative log-likelihood per response token; 1.0 where there is none.

    The released code of Zheng et al. 2023 divides by the token count twice; this does not.
    """
    return masked_mean(-logprobs, mask).exp()


def weighted_scores(
    scores: Float[Tensor, "sources batch"], weights: Float[Tensor, " sources"]
) -> Float[Tensor, " batch"]:
    """Several scores of each reply added up by weight; nan where one of them is."""
    return (weights[:, None] * scores).sum(dim=0)


def ensemble_mean(scores: Float[Tensor, "models batch"]) -> Float[Tensor, " batch"]:
    """The members' mean score of each reply (Coste et al. 2023, 2310.02743, §3)."""
    return scores.mean(dim=0)


def ensemble_min(scores: Float[Tensor, "models batch"]) -> Float[Tensor, " batch"]:
    """The lowest of the members' scores: worst-case optimisation (Coste et al. 2023, §3)."""
    return scores.amin(dim=0)


def ensemble_mean_minus_variance(
    scores: Float[Tensor, "models batch"], *, coef: float | int
) -> Float[Tensor, " batch"]:
    """Mean less the members' variance: uncertainty-weighted optimisation (Coste et al. 2023, §3).

        mean_i s_i - coef · mean_i (s_i - mean_j s_j)²

    Args:
        coef: their λ.
    """
    return scores.mean(dim=0) - coef * scores.var(dim=0, correction=0)


def ensemble_std(scores: Float[Tensor, "models batch"]) -> Float[Tensor, " batch"]:
    """How far the members disagree on each reply: the root of the variance above."""
    return scores.std(dim=0, correction=0)


def reparameterize_scores(
    scores: Float[Tensor, " batch"],
    *,
    mean: float | int | None = None,
    std: float | int | None = None,
    clip: float | int | None = None,
) -> Float[Tensor, " batch"]:
    """Scores normalised by historical moments, then clipped.

    Zheng et al. 2023, eq. 18: clamp((score - mean) / std, -clip, clip).

    Args:
        mean: None takes nothing away (reward scaling, Figure 5, detail 4).
        std: None does not scale. Must be safe to divide by, as `RunningMoments.std` is.
        clip: applies to the scaled score, before any KL penalty. None is off.
    """
    if mean is not None:
        scores = scores - mean
    if std is not None:
        scores = scores / std
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return scores


def missing_eos_scores(
    scores: Float[Tensor, " batch"],
    truncated: Bool[Tensor, " batch"],
    *,
    penalty: float | int | None,
) -> Float[Tensor, " batch"]:
    """Scores with `penalty` taken off the replies that never ended; None is off.

    Args:
        truncated: True where a reply reached its length limit without EOS.
    """
    return scores if penalty is None else torch.where(truncated, scores - penalty, scores)


def reparameterize_steps(
    step_rewards: Float[Tensor, "batch response"],
    *,
    std: float | int | None = None,
    clip: float | int | None = None,
) -> Float[Tensor, "batch response"]:
    """Step rewards over the std of the replies' totals, each clipped; nothing is taken away.

    A mean taken off every step would pay for many short steps, or for few (ours).

    Args:
        std: of scores and step rewards summed over a reply. None does not scale.
        clip: bound on each scaled step reward. None is off.
    """
    if std is not None:
        step_rewards = step_rewards / std
    return step_rewards if clip is None else step_rewards.clamp(-clip, clip)


def token_rewards(
    scores: Float[Tensor, " batch"],
    logprobs: Float[Tensor, "batch response"],
    ref_logprobs: Float[Tensor, "batch response"] | None,
    mask: Bool[Tensor, "batch response"],
    *,
    kl_coef: float | int,
    step_rewards: Float[Tensor, "batch response"] | None = None,
) -> Float[Tensor, "batch response"]:
    """Reward of each response token: the KL penalty, and the score on the last one.

    Zheng et al. 2023, eq. 19, with eta = kl_coef:

        r_t = -eta (log pi(a_t|s_t) - log pi_ref(a_t|s_t)) + [t is last] score

    The penalty is k1 and nothing else: the policy gradient of an in-reward k3 is
    grad KL(pi||ref) - grad KL(ref||pi), which vanishes to first order at the reference.

    Args:
        scores: reparameterized already. The score of a row without tokens is dropped.
        logprobs: of the policy that sampled the tokens, at the sampling temperature.
        ref_logprobs: of the same tokens under the reference; None only with kl_coef = 0.
        step_rewards: of a process reward model, added token by token.

    Raises:
        ConfigError: a KL coefficient without a reference to measure it against.
    """
    if ref_logprobs is None:
        if kl_coef != 0:
            raise ConfigError(
                f"kl_coef: {kl_coef} without a reference model; set it to 0 or add one"
            )
        ref_logprobs = logprobs
    rewards = -kl_coef * kl_penalty(logprobs, ref_logprobs, mask, estimator="k1")
    if step_rewards is not None:
        rewards = rewards + torch.where(mask, step_rewards, 0.0)
    columns = torch.arange(mask.shape[1], device=mask.device)
    is_last = columns == last_index(mask)[:, None]
    return torch.where(is_last, rewards + scores[:, None], rewards).detach()


class FixedKL:
    """A KL coefficient that stays as it is; stands where `AdaptiveKL` may."""

    def __init__(self, coef: float | int) -> None:
        self.coef = coef

    def update(self, kl: float | int, num_steps: int) -> None:
        """Nothing to learn from."""

    def state_dict(self) -> dict[str, float | int]:
        """The coefficient."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on from what `state_dict` gave."""
        self.coef = state["coef"]


class AdaptiveKL:
    """A KL coefficient steered towards a target KL.

    Ziegler et al. 2019 (1909.08593), §2.2, in the form of their code:

        error = clamp(kl / target - 1, -0.2, 0.2)
        coef <- coef (1 + error min(num_steps / horizon, 1))

    The minimum is ours: it keeps the coefficient positive however many replies a step takes in.

    Args:
        coef: to begin with.
        target_per_token: in nats per response token; then `update` takes KL in the same unit.
        target_per_sequence: in nats per response, likewise. Exactly one of the two is given.
        horizon: replies over which the coefficient may change by up to 20% (their 10,000).

    Raises:
        ConfigError: none or both of the targets given, or one that is not above 0.
    """

    def __init__(
        self,
        coef: float | int,
        *,
        target_per_token: float | int | None = None,
        target_per_sequence: float | int | None = None,
        horizon: float | int = 10_000,
    ) -> None:
        given = [target for target in (target_per_token, target_per_sequence) if target is not None]
        if len(given) != 1 or given[0] <= 0:
            raise ConfigError(
                "kl target: give one of target_per_token and target_per_sequence, above 0; "
                f"found {target_per_token} and {target_per_sequence}"
            )
        self.coef = coef
        self.target = given[0]
        self.unit = "token" if target_per_sequence is None else "sequence"
        self.horizon = horizon

    def update(self, kl: float | int, num_steps: int) -> None:
        """Move the coefficient after `num_steps` replies with a mean KL of `kl` nats per `unit`."""
        error = max(-0.2, min(kl / self.target - 1, 0.2))
        self.coef *= 1 + error * min(num_steps / self.horizon, 1)

    def state_dict(self) -> dict[str, float | int]:
        """The coefficient; target and horizon are settings."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on from what `state_dict` gave."""
        self.coef = state["coef"]


class AdaptivePenalty:
    """The coefficient of PPO-penalty, fixed or kept near a target KL to the sampling policy.

    Schulman et al. 2017 (1707.06347), §4, after each update with d = KL(old || new):

        d < target / 1.5  =>  coef / 2        d > 1.5 target  =>  2 coef

    Args:
        coef: to begin with.
        target: nats per token; None keeps the coefficient.
    """

    def __init__(self, coef: float | int, *, target: float | int | None = None) -> None:
        self.coef = coef
        self.target = target

    def update(self, kl: float | int) -> None:
        """Move the coefficient after an update that ended at `kl` nats per token."""
        if self.target is None:
            return
        if kl < self.target / 1.5:
            self.coef /= 2
        elif kl > 1.5 * self.target:
            self.coef *= 2

    def state_dict(self) -> dict[str, float | int]:
        """The coefficient; the target is a setting."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on from what `state_dict` gave."""
        self.coef = state["coef"]
