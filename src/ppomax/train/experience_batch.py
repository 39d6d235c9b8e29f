"""From replies to experience: all roles on the planned micro-batches.

Every rank holds the whole rollout (token ids and a few floats per token) and computes its share of
the forwards; so normalisation and advantages never depend on how the work was split.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppomax.data.batching import TokenBatch, collate, permutation, plan_micro_batches
from ppomax.distributed import World, sum_tensor
from ppomax.metrics import MetricSums
from ppomax.models.language import TargetReading, values_of_replies
from ppomax.rollout.engine import Rollout
from ppomax.train.actors import Actors
from ppomax.train.micro_batches import Watched, autocast, rank_micro_batches
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.prompts import Prompt
from ppomax.train.reward_scores import judge

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
    values: Float[Tensor, "batch response"] | None
    """None without a critic."""
    last_values: Float[Tensor, " batch"] | None
    """V after each reply's last token, where replies cut at the limit go on in it."""
    scores: Float[Tensor, " batch"]
    """Of the outcome and all steps; nan where a reply was set aside: its mask row is empty."""
    steps: Float[Tensor, "batch response"] | None = None
    """Raw step rewards, on the tokens where the steps end; None without a process function."""
    spread: Float[Tensor, " batch"] | None = None
    """Std over an ensemble's members; None without one."""


@dataclass(frozen=True, slots=True)
class Experience:
    """What the update learns from."""

    rollout: Rollout
    scored: Scored
    mask: Bool[Tensor, "batch response"]
    """Tokens that are learned from: the scored ones, less replies dropped for want of an end."""
    rewards: Float[Tensor, "batch response"]
    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"] | None
    """The critic's targets."""
    monte_carlo: Float[Tensor, "batch response"] | None
    """Returns without the critic in them (λ = 1), to judge the critic by."""
    kl_coef: float
    """The controller's, wherever the KL is charged."""
    exact_kl: float | None = None
    """KL to the reference over the whole vocabulary, where it was asked for."""


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
    watched: Watched = iter,
    *,
    update_follows: bool = False,
) -> Scored:
    """All roles on every reply; each rank its share, then everything on every rank.

    Args:
        update_follows: the policy's first step comes next, on the first minibatch. It begins with
            the micro-batch that is scored first, whose forward is then kept for it: one less.
            So is the critic's, on a processor, where that micro-batch holds all replies; else it
            would hold memory for long and save little, and on a device memory is what is short. Not
            of a sharded model, which frees its parameters between
            forwards, and not where the exact KL is measured meanwhile.
    """
    mask = response_mask(rollout, here.device)
    tables: dict[str, Tensor] = defaultdict(lambda: torch.zeros(mask.shape, device=here.device))
    last_values = torch.zeros(len(rollout.responses), device=here.device)
    exact = config.kl is not None and config.kl.exact_loss  # that forward is another one
    measured = config.kl is not None and config.kl.exact_replies is not None
    keep = update_follows and here.size == 1 and not exact and not measured
    whole = here.device.type == "cpu" and [len(minibatch) for minibatch in plan] == [1]
    for minibatch in plan:
        for indices, weight in watched(rank_micro_batches(minibatch, here)):
            batch = reply_batch(rollout, indices, actors.pad, here.device)
            with autocast(here, config.compute_dtype):
                with torch.set_grad_enabled(keep):
                    own = actors.policy.model(batch, config.sampling.temperature, entropy=True)
                flat = _log_probs(batch, own, actors, config)
                if actors.critic is not None:
                    with torch.set_grad_enabled(keep and whole):
                        values, last = values_of_replies(actors.critic.model, batch)
                    flat["values"], last = values.detach(), last.detach()
                    if keep and whole:
                        actors.critic.keep(indices, values)
            if keep:
                actors.policy.keep(indices, own)
                keep = False
            for name, found in flat.items():
                table = tables[name]  # on every rank, also where its micro-batch is a filler
                if weight:
                    table[indices] = unflatten(found, mask[indices])
            if weight and actors.critic is not None:
                last_values[indices] = last
    tables = {name: sum_tensor(table, here) for name, table in sorted(tables.items())}
    every = [micro for minibatch in plan for micro in minibatch]
    judged = judge(rollout, prompts, every, actors.rewards, actors.template, config, here)
    bootstrap = config.advantage.missing_eos == "bootstrap"
    return Scored(
        mask=mask & ~torch.isnan(judged.scores)[:, None],
        scores=judged.scores,
        steps=judged.steps,
        spread=judged.spread,
        logprobs=tables["logprobs"],
        plain=tables["plain"],
        entropy=tables["entropy"],
        values=tables.get("values"),
        last_values=sum_tensor(last_values, here) if bootstrap else None,
        ref_logprobs=tables.get("ref_logprobs"),
        ref_plain=tables.get("ref_plain"),
    )


def _log_probs(
    batch: TokenBatch, own: TargetReading, actors: Actors, config: PPOConfig
) -> dict[str, Float[Tensor, " tokens"]]:
    """What policy and reference say of the batch's target tokens, as constants."""
    found = {
        "logprobs": own.logprobs.detach(),
        "plain": own.plain,
        "entropy": own.entropy.detach(),
    }
    if config.kl is not None:
        with actors.as_reference() as reference:
            ref = reference(batch, config.sampling.temperature)
        found |= {"ref_logprobs": ref.logprobs, "ref_plain": ref.plain}
    return found


@torch.no_grad()
def exact_kl(rollout: Rollout, actors: Actors, config: PPOConfig, here: World, count: int) -> float:
    """Mean KL(policy || reference) over the vocabulary, nats per token of the first replies."""
    lengths = [len(p) + len(r) for p, r in zip(rollout.prompts, rollout.responses, strict=True)][
        :count
    ]
    sums = MetricSums()
    num_tokens = sum(map(len, rollout.responses[:count]))
    plan = plan_micro_batches(lengths, config.micro_tokens, here.size)
    for indices, weight in rank_micro_batches(plan, here):
        batch = reply_batch(rollout, indices, actors.pad, here.device)
        with autocast(here, config.compute_dtype):
            with actors.as_reference() as reference:
                states = reference.states(batch)
            found = actors.policy.model(batch, config.sampling.temperature, reference=states)
        assert found.ref_kl is not None
        share = batch.num_targets * weight / num_tokens
        sums.add("kl", float(found.ref_kl.sum()) * weight / num_tokens, share)
    return sums.merged(here)["kl"]
