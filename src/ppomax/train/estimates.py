"""From scores to what the update learns from: rewards, advantages, returns."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppomax.advantages import (
    Advantages,
    broadcast_scores,
    gae,
    grpo_advantages,
    reinforce_baseline_advantages,
    reinforce_returns,
    rloo_advantages,
)
from ppomax.experience import (
    AdaptiveKL,
    FixedKL,
    missing_eos_scores,
    reparameterize_scores,
    reparameterize_steps,
    token_rewards,
)
from ppomax.masked import masked_whiten
from ppomax.normalise import RunningMoments
from ppomax.rollout.engine import Rollout
from ppomax.train.experience_batch import Experience, Scored
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.ppo_settings import AdvantageSettings
from ppomax.train.reward_settings import RewardSettings


def normalised_scores(
    scores: Float[Tensor, " batch"],
    truncated: Bool[Tensor, " batch"],
    moments: RunningMoments,
    settings: RewardSettings,
) -> Float[Tensor, " batch"]:
    """Eq. 18 with moments that already hold this rollout; then the missing-EOS penalty.

    Where only steps are rewarded the scores are 0 and stay there.
    """
    centred = settings.normalise == "standardize" and settings.has_outcome
    result = reparameterize_scores(
        scores,
        mean=moments.mean if centred else None,
        std=moments.std if settings.normalise is not None else None,
        clip=settings.clip,
    )
    return missing_eos_scores(result, truncated, penalty=settings.missing_eos_penalty)


def outcome_scores(scored: Scored, settings: RewardSettings) -> Float[Tensor, " batch"]:
    """The scores without the step rewards that are in them."""
    if scored.steps is None:
        return scored.scores
    if not settings.has_outcome:
        return torch.zeros_like(scored.scores)
    return scored.scores - scored.steps.sum(1)


def normalised_steps(
    scored: Scored, moments: RunningMoments, settings: RewardSettings
) -> Float[Tensor, "batch response"] | None:
    """Step rewards in the units of the normalised scores; none where there is no process."""
    if scored.steps is None:
        return None
    std = moments.std if settings.normalise is not None else None
    return reparameterize_steps(scored.steps, std=std, clip=settings.clip)


def estimate(
    rollout: Rollout,
    scored: Scored,
    moments: RunningMoments,
    kl: FixedKL | AdaptiveKL,
    config: PPOConfig,
) -> Experience:
    """Moments, scores, token rewards, advantages: in this order (paper.md §2; pitfall 11)."""
    alive = scored.mask.any(1)
    moments.update(scored.scores[alive])
    truncated = ~torch.tensor(rollout.finished, device=scored.scores.device)
    scores = torch.where(alive, outcome_scores(scored, config.reward), 0.0)
    scores = normalised_scores(scores, truncated, moments, config.reward)
    mask = scored.mask
    if config.advantage.missing_eos == "drop":
        mask = mask & ~truncated[:, None]
    if config.advantage.missing_eos == "bootstrap":
        scores = torch.where(truncated, 0.0, scores)
    in_reward = config.kl is not None and config.kl.where == "reward"
    rewards = token_rewards(
        scores,
        scored.logprobs,
        scored.ref_logprobs,
        scored.mask,
        kl_coef=float(kl.coef) if in_reward else 0.0,
        step_rewards=normalised_steps(scored, moments, config.reward),
    )
    found, monte_carlo = credit(rewards, scored, mask, truncated, config)
    return Experience(
        rollout=rollout,
        scored=scored,
        mask=mask,
        rewards=rewards,
        advantages=found.advantages,
        returns=found.returns if scored.values is not None else None,
        monte_carlo=monte_carlo,
        kl_coef=float(kl.coef),
    )


def credit(
    rewards: Float[Tensor, "batch response"],
    scored: Scored,
    mask: Bool[Tensor, "batch response"],
    truncated: Bool[Tensor, " batch"],
    config: PPOConfig,
) -> tuple[Advantages, Float[Tensor, "batch response"] | None]:
    """Advantages and returns, with and (where there is a critic) without the critic in them."""
    settings = config.advantage
    if scored.values is None:
        groups = torch.arange(len(mask), device=mask.device) // config.samples_per_prompt
        return critic_free(rewards, mask, groups, settings), None
    last = None
    if scored.last_values is not None:
        last = torch.where(truncated, scored.last_values, 0.0)

    def with_lambda(lam: float, lam_critic: float | None) -> Advantages:
        assert scored.values is not None
        return gae(
            rewards,
            scored.values,
            mask,
            gamma=settings.gamma,
            lam=lam,
            lam_critic=lam_critic,
            last_values=last,
        )

    return with_lambda(settings.lam, settings.lam_critic), with_lambda(1.0, None).returns


def critic_free(
    rewards: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    groups: Int[Tensor, " batch"],
    settings: AdvantageSettings,
) -> Advantages:
    """REINFORCE and the estimators that compare a prompt's replies; returns are rewards to go.

    A reply's reward is the sum of its tokens', KL penalty included; replies set aside or dropped
    are in nobody's group.
    """
    returns = reinforce_returns(rewards, mask, gamma=settings.gamma)
    if settings.estimator == "reinforce":
        return Advantages(masked_whiten(returns, mask), returns)
    alive = mask.any(1)
    totals = torch.where(mask, rewards, 0.0).sum(1)
    compared = torch.zeros_like(totals)
    match settings.estimator:
        case "rloo":
            compared[alive] = rloo_advantages(totals[alive], groups[alive])
        case "grpo":
            compared[alive] = grpo_advantages(
                totals[alive], groups[alive], scale_std=settings.scale_std
            )
        case "reinforce_baseline":
            compared[alive] = reinforce_baseline_advantages(totals[alive], groups[alive])
    advantages = broadcast_scores(compared, mask)
    if settings.estimator == "reinforce_baseline":
        advantages = masked_whiten(advantages, mask)
    return Advantages(advantages, returns)
