"""Coefficients that a run may steer: of the KL to the reference, and of PPO-penalty."""

from ppomax.experience import AdaptiveKL, AdaptivePenalty, FixedKL
from ppomax.train.ppo_config import PPOConfig


def kl_controller(config: PPOConfig) -> FixedKL | AdaptiveKL:
    """Fixed or adaptive coefficient of the KL penalty."""
    kl = config.kl
    if kl is None:
        return FixedKL(0.0)
    if kl.target_per_token is None and kl.target_per_sequence is None:
        return FixedKL(kl.coef)
    return AdaptiveKL(
        kl.coef,
        target_per_token=kl.target_per_token,
        target_per_sequence=kl.target_per_sequence,
        horizon=kl.horizon,
    )


def penalty_controller(config: PPOConfig) -> AdaptivePenalty | None:
    """The coefficient of PPO-penalty, fixed or adaptive."""
    coef, target = config.loss.penalty_coef, config.loss.penalty_target
    return None if coef is None else AdaptivePenalty(coef, target=target)
