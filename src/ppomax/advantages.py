"""Advantages and returns from rewards: with a critic (GAE) and without one.

Everything here is a constant to autograd: no gradient flows from a result to an argument. Rewards
are made in `experience`; whitening is `masked.masked_whiten`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppomax.masked import MIN_STD


class Advantages(NamedTuple):
    """What the policy and the critic are fitted to, per response token; 0 outside the mask."""

    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"]
    """The critic's targets: advantage + value."""


def gae(
    rewards: Float[Tensor, "batch response"],
    values: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    gamma: float | int,
    lam: float | int,
    lam_critic: float | int | None = None,
    last_values: Float[Tensor, " batch"] | None = None,
) -> Advantages:
    """Generalised advantage estimates and the returns they imply.

    Schulman et al. 2016 (1506.02438), eq. 16; Zheng et al. 2023, eq. 9:

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t = sum_l (gamma lam)^l delta_{t+l}        R_t = A_t + V(s_t)

    lam = 0 is the TD error, lam = 1 the Monte Carlo return minus the value. Only response tokens
    are read; a row without any gives zeros.

    Args:
        values: of the state in which each token was chosen.
        lam_critic: lambda of the returns where it shall differ from the advantages'.
        last_values: V after each row's last token, for replies that were cut off and not ended;
            None: 0 for every row, the episode's end. Ignored in rows without tokens.
    """
    rewards, values = rewards.detach(), values.detach()
    last = values.new_zeros(len(values)) if last_values is None else last_values.detach()
    advantages = _discounted_errors(rewards, values, last, mask, gamma=gamma, lam=lam)
    fitted = advantages
    if lam_critic is not None:
        fitted = _discounted_errors(rewards, values, last, mask, gamma=gamma, lam=lam_critic)
    return Advantages(advantages, torch.where(mask, fitted + values, 0.0))


def _discounted_errors(
    rewards: Float[Tensor, "batch response"],
    values: Float[Tensor, "batch response"],
    last_values: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch response"],
    *,
    gamma: float | int,
    lam: float | int,
) -> Float[Tensor, "batch response"]:
    """GAE by its recurrence A_t = delta_t + gamma lam A_{t+1}; skipped tokens pass it through."""
    result = torch.empty_like(values)
    advantage = torch.zeros_like(last_values)
    next_value = last_values
    for t in reversed(range(mask.shape[1])):
        here = mask[:, t]
        error = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(here, error + gamma * lam * advantage, advantage)
        next_value = torch.where(here, values[:, t], next_value)
        result[:, t] = torch.where(here, advantage, 0.0)
    return result


def reinforce_returns(
    rewards: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    gamma: float | int,
) -> Float[Tensor, "batch response"]:
    """Reward to go, G_t = sum_l gamma^l r_{t+l} over response tokens (Williams 1992)."""
    no_values = torch.zeros_like(rewards)
    return gae(rewards, no_values, mask, gamma=gamma, lam=1.0).advantages


def rloo_advantages(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Score minus the mean score of the *other* replies to the same prompt.

    Ahmadian et al. 2024 (2402.14740). A reply alone in its group has no baseline and gets 0.

    Args:
        groups: a number per prompt; replies with the same number answer the same prompt.
    """
    size, mean, _ = _group_moments(scores, groups)
    centred = scores.detach() - mean
    # s_i - (n mean - s_i) / (n - 1)  =  (s_i - mean) n / (n - 1)
    return (centred * size / (size - 1).clamp(min=1)).to(scores.dtype)


def grpo_advantages(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"], *, scale_std: bool
) -> Float[Tensor, " batch"]:
    """Score minus the group's mean, over the group's unbiased standard deviation.

    Shao et al. 2024 (2402.03300), §4.1.2. A group of equal scores, or of one, gets 0.

    Args:
        groups: as in `rloo_advantages`.
        scale_std: False leaves the division out (Liu et al. 2025, 2503.20783, "Dr. GRPO").
    """
    _, mean, std = _group_moments(scores, groups)
    centred = scores.detach() - mean
    return (centred / std if scale_std else centred).to(scores.dtype)


def reinforce_baseline_advantages(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Score minus its group's mean, to be whitened over the whole batch by the caller.

    Hu et al. 2025 (2501.03262), REINFORCE++ with baseline.
    """
    return grpo_advantages(scores, groups, scale_std=False)


def _group_moments(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Size, mean and safe unbiased std of each reply's group, in double precision.

    Double, because in single precision three equal scores have a mean that differs from them, and
    a std that would blow the difference up to order one.
    """
    same = groups[:, None] == groups[None, :]
    peers = scores.detach().double().expand(len(scores), -1)
    size = same.sum(dim=1).double()
    mean = torch.where(same, peers, 0.0).sum(dim=1) / size
    squares = torch.where(same, peers - mean[:, None], 0.0).square().sum(dim=1)
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    return size, mean, torch.where(std < MIN_STD, 1.0, std)


def broadcast_scores(
    scores: Float[Tensor, " batch"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """Each reply's number on every one of its tokens; 0 outside the mask."""
    return torch.where(mask, scores.detach()[:, None], 0.0)
