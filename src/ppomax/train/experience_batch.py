"""From replies to experience: score with all roles on the planned micro-batches, then estimate.

Every rank holds the whole rollout (token ids and a few floats per token) and computes its share of
the forwards; so normalisation and advantages never depend on how the work was split.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppomax.advantages import gae
from ppomax.data.batching import TokenBatch, collate, permutation, plan_micro_batches
from ppomax.distributed import World, sum_tensor
from ppomax.experience import (
    AdaptiveKL,
    FixedKL,
    missing_eos_scores,
    reparameterize_scores,
    token_rewards,
)
from ppomax.models.language import values_before_targets
from ppomax.normalise import RunningMoments
from ppomax.rollout.engine import Rollout
from ppomax.train.actors import Actors
from ppomax.train.loop import autocast, rank_micro_batches
from ppomax.train.ppo_config import PPOConfig, RewardSettings
from ppomax.train.prompts import Prompt
from ppomax.train.rewards import call

Plan = list[list[list[int]]]
"""Minibatches (one optimizer step each) of micro-batches of reply indices."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What the roles say of a rollout. Tensors are [replies, response], right-padded, fp32."""

    mask: Bool[Tensor, "batch response"]
    logprobs: Float[Tensor, "batch response"]
    """The trainer's own, at the sampling temperature: the old log-probs of the update."""
    plain: Float[Tensor, "batch response"]
    """At temperature 1, for perplexity."""
    entropy: Float[Tensor, "batch response"]
    ref_logprobs: Float[Tensor, "batch response"] | None
    ref_plain: Float[Tensor, "batch response"] | None
    values: Float[Tensor, "batch response"]
    scores: Float[Tensor, " batch"]
    """nan where a reply was set aside; its mask row is empty."""


@dataclass(frozen=True, slots=True)
class Experience:
    """What the update learns from."""

    rollout: Rollout
    scored: Scored
    rewards: Float[Tensor, "batch response"]
    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"]
    monte_carlo: Float[Tensor, "batch response"]
    """Returns without the critic in them (λ = 1), to judge the critic by."""
    kl_coef: float


def plan_updates(rollout: Rollout, config: PPOConfig, here: World, *parts: int | str) -> Plan:
    """Minibatches by a seeded permutation, each cut into length-sorted micro-batches.

    Made before scoring: old log-probs are computed on exactly these micro-batches, so the first
    update's ratio is 1 bitwise. A pure function of lengths, settings and `parts`.
    """
    lengths = [len(p) + len(r) for p, r in zip(rollout.prompts, rollout.responses, strict=True)]
    order = permutation(len(lengths), config.seed, "minibatches", *parts)
    plan: Plan = []
    for start in range(0, len(order), config.minibatch_size):
        chunk = order[start : start + config.minibatch_size]
        micro = plan_micro_batches([lengths[i] for i in chunk], config.micro_tokens, here.size)
        plan.append([[chunk[i] for i in batch] for batch in micro])
    return plan


def reply_batch(rollout: Rollout, indices: list[int], pad: int, device: torch.device) -> TokenBatch:
    """Prompts with their replies; the reply's tokens are the targets."""
    rows = []
    for index in indices:
        prompt, response = rollout.prompts[index], rollout.responses[index]
        rows.append((prompt + response, [False] * len(prompt) + [True] * len(response)))
    return collate(rows, pad, device)


def response_mask(rollout: Rollout, device: torch.device) -> Bool[Tensor, "batch response"]:
    """True on reply tokens, from lengths."""
    lengths = torch.tensor([len(response) for response in rollout.responses], device=device)
    return torch.arange(int(lengths.max()), device=device)[None] < lengths[:, None]


def unflatten(
    flat: Float[Tensor, " tokens"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """Target tokens, row by row, back in their places; zero elsewhere. Differentiable."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


@torch.no_grad()
def score(
    rollout: Rollout,
    prompts: list[Prompt],
    plan: Plan,
    actors: Actors,
    config: PPOConfig,
    here: World,
) -> Scored:
    """All roles on every reply; each rank its share, then everything on every rank."""
    mask = response_mask(rollout, here.device)
    names = ["logprobs", "plain", "entropy", "values"]
    with_reference = config.kl is not None
    names += ["ref_logprobs", "ref_plain"] if with_reference else []
    tables = {name: torch.zeros(mask.shape, device=here.device) for name in names}
    scores = torch.zeros(len(rollout.responses), device=here.device)
    for minibatch in plan:
        for indices, weight in rank_micro_batches(minibatch, here):
            batch = reply_batch(rollout, indices, actors.pad, here.device)
            with autocast(here, config.compute_dtype):
                own = actors.policy.model(batch, config.sampling.temperature, entropy=True)
                flat = {"logprobs": own.logprobs, "plain": own.plain, "entropy": own.entropy}
                flat["values"] = values_before_targets(actors.critic.model, batch)
                if with_reference:
                    with actors.as_reference() as reference:
                        ref = reference(batch, config.sampling.temperature)
                    flat |= {"ref_logprobs": ref.logprobs, "ref_plain": ref.plain}
                if actors.reward is not None:
                    found = actors.reward.scores(batch.input_ids, batch.lengths)
            if weight:
                for name, values in flat.items():
                    tables[name][indices] = unflatten(values, mask[indices])
                if actors.reward is not None:
                    scores[indices] = found
    tables = {name: sum_tensor(table, here) for name, table in tables.items()}
    if actors.scorer is not None:
        scores = _called_scores(rollout, prompts, actors, config, here)
    scores = sum_tensor(scores, here)
    mask = mask & ~torch.isnan(scores)[:, None]
    return Scored(
        mask=mask,
        scores=scores,
        logprobs=tables["logprobs"],
        plain=tables["plain"],
        entropy=tables["entropy"],
        values=tables["values"],
        ref_logprobs=tables.get("ref_logprobs"),
        ref_plain=tables.get("ref_plain"),
    )


def _called_scores(
    rollout: Rollout, prompts: list[Prompt], actors: Actors, config: PPOConfig, here: World
) -> Float[Tensor, " batch"]:
    """The Python function's scores, each rank calling it for its share of the replies."""
    assert actors.scorer is not None
    mine = here.share(range(len(rollout.responses)))
    scores = torch.zeros(len(rollout.responses), device=here.device)
    if mine:
        rows = [prompts[index].row for index in mine]
        found = call(
            actors.scorer,
            [row.messages for row in rows],
            [actors.template.decode(rollout.responses[index]) for index in mine],
            [row.id for row in rows],
            [row.meta for row in rows],
            timeout=config.reward.timeout,
            retries=config.reward.retries,
        )
        scores[mine] = torch.tensor(found, device=here.device)
    return scores


def normalised_scores(
    scores: Float[Tensor, " batch"],
    truncated: Bool[Tensor, " batch"],
    moments: RunningMoments,
    settings: RewardSettings,
) -> Float[Tensor, " batch"]:
    """Eq. 18 with moments that already hold this rollout; then the missing-EOS penalty."""
    result = reparameterize_scores(
        scores,
        mean=moments.mean if settings.normalise == "standardize" else None,
        std=moments.std if settings.normalise is not None else None,
        clip=settings.clip,
    )
    return missing_eos_scores(result, truncated, penalty=settings.missing_eos_penalty)


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
    scores = torch.where(alive, scored.scores, 0.0)
    scores = normalised_scores(scores, truncated, moments, config.reward)
    kl_coef = float(kl.coef) if config.kl is not None else 0.0
    rewards = token_rewards(
        scores, scored.logprobs, scored.ref_logprobs, scored.mask, kl_coef=kl_coef
    )
    found = gae(
        rewards,
        scored.values,
        scored.mask,
        gamma=config.advantage.gamma,
        lam=config.advantage.lam,
        lam_critic=config.advantage.lam_critic,
    )
    pure = gae(rewards, scored.values, scored.mask, gamma=config.advantage.gamma, lam=1.0)
    return Experience(
        rollout, scored, rewards, found.advantages, found.returns, pure.returns, kl_coef
    )
