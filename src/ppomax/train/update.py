"""One optimizer step of policy and critic on one minibatch, whatever its cut into micro-batches."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppomax.data.batching import TokenBatch, collate, plan_micro_batches
from ppomax.distributed import World
from ppomax.experience import kl_penalty
from ppomax.losses import (
    PolicyLoss,
    clipped_policy_loss,
    clipped_value_loss,
    entropy_loss,
    exact_kl_loss,
    kl_penalty_policy_loss,
    lm_loss,
    ref_kl_loss,
)
from ppomax.masked import masked_max, masked_sum, masked_whiten
from ppomax.metrics import MetricSums
from ppomax.models.language import TargetReading, values_before_targets
from ppomax.train.actors import Actors
from ppomax.train.experience_batch import Experience, reply_batch, unflatten
from ppomax.train.guard import contents
from ppomax.train.loop import StageRun, Trainable
from ppomax.train.micro_batches import autocast, rank_micro_batches
from ppomax.train.ppo_config import PPOConfig


@dataclass(frozen=True, slots=True)
class Updating:
    """What every optimizer step of an iteration is made with."""

    actors: Actors
    config: PPOConfig
    here: World
    run: StageRun
    sums: MetricSums
    step: int
    """The iteration."""
    penalty_coef: float | None = None
    """β of PPO-penalty now; None: the clipped surrogate."""
    entropy_threshold: float | None = None
    """Nats per token."""


@dataclass(frozen=True, slots=True)
class Part:
    """One micro-batch of a minibatch, and what was found out about its replies."""

    batch: TokenBatch
    mask: Bool[Tensor, "batch response"]
    """Tokens learned from."""
    full: Bool[Tensor, "batch response"]
    """All reply tokens, those of replies set aside included."""
    rows: list[int]

    def of(self, table: Float[Tensor, "replies longest"]) -> Float[Tensor, "batch response"]:
        """The micro-batch's share of a table over the whole rollout."""
        return table[self.rows, : self.mask.shape[1]]

    def unflat(self, flat: Float[Tensor, " tokens"]) -> Float[Tensor, "batch response"]:
        """Target tokens, row by row, in their places."""
        return unflatten(flat, self.full)


def update_policy(
    now: Updating,
    experience: Experience,
    minibatch: list[list[int]],
    texts: list[list[int]],
    *,
    first: bool,
) -> float | None:
    """Surrogate, entropy, KL and LM terms in one step; returns KL to the sampling policy.

    No step, and None, where no token is learned from and there are no texts.

    Args:
        first: the parameters are still those that scored the rollout, so the ratio must be 1.
    """
    config, sums, policy = now.config, now.sums, now.actors.policy
    rows = [index for micro in minibatch for index in micro]
    if not (experience.mask[rows].any() or texts):
        policy.drop_gradients()
        return None
    num_tokens = max(1, int(experience.mask[rows].sum()))
    advantages = prepared_advantages(experience, rows, config)
    entropy_mean = _entropy_mean(now, experience, minibatch, num_tokens)
    steps_kl = MetricSums()
    for indices, weight in now.run.watched(rank_micro_batches(minibatch, now.here)):
        part = micro_batch(experience, indices, now)
        with autocast(now.here, config.compute_dtype):
            out = _policy_forward(part, now)
        logprobs = part.unflat(out.logprobs)
        surrogate = _surrogate(logprobs, part, experience, advantages, num_tokens, now)
        loss = surrogate.loss
        share = int(part.mask.sum()) * weight / num_tokens
        if config.loss.entropy_coef is not None:
            bonus = entropy_loss(
                part.unflat(out.entropy),
                part.mask,
                threshold=now.entropy_threshold,
                num_tokens=num_tokens,
                batch_mean=entropy_mean,
            )
            loss = loss + config.loss.entropy_coef * bonus
        if config.kl is not None and config.kl.where == "loss":
            divergence = _ref_kl(out, logprobs, part, experience, num_tokens, config)
            loss = loss + experience.kl_coef * divergence
            sums.add("kl/loss", float(divergence.detach()) * weight, share)
        policy.backward(loss * weight)
        old_kl = _old_kl(logprobs.detach(), part, experience, num_tokens)
        steps_kl.add("kl", old_kl * weight, share)
        logged = {
            "policy/loss": float(surrogate.loss.detach()),
            "policy/clip_fraction": float(surrogate.clip_fraction),
            "policy/ratio_mean": float(surrogate.ratio_mean),
            "kl/old_k3": old_kl,
        }
        for key, value in logged.items():
            sums.add(key, value * weight, share)
        sums.maximum("policy/ratio_max", float(surrogate.ratio_max))
        if first:
            error = (logprobs.detach() - part.of(experience.scored.logprobs)).exp().sub(1).abs()
            largest = masked_max(error, part.mask, empty=0.0)
            sums.maximum("policy/first_ratio_error", float(largest))
            sums.add("kl/first_old_k3", old_kl * weight, share)
    if texts:
        _add_lm_term(texts, now)
    sums.add("policy/lr", policy.lr, 1.0)
    norm, taken = policy.step()
    _count(now, policy, taken, experience, rows)
    sums.add("policy/grad_norm", norm if taken else 0.0, float(taken))
    return steps_kl.merged(now.here).get("kl", 0.0)


def update_critic(
    now: Updating, experience: Experience, minibatch: list[list[int]], *, clip: float | None
) -> None:
    """Clipped squared error to the returns, one step; none where no token is learned from."""
    critic, sums = now.actors.critic, now.sums
    assert critic is not None
    assert experience.returns is not None
    assert experience.scored.values is not None
    rows = [index for micro in minibatch for index in micro]
    if not experience.mask[rows].any():
        critic.drop_gradients()
        return
    num_tokens = int(experience.mask[rows].sum())
    for indices, weight in now.run.watched(rank_micro_batches(minibatch, now.here)):
        part = micro_batch(experience, indices, now)
        flat = critic.kept(part.rows)
        if flat is None:
            with autocast(now.here, now.config.compute_dtype):
                flat = values_before_targets(critic.model, part.batch)
        found = clipped_value_loss(
            part.unflat(flat),
            part.of(experience.scored.values),
            part.of(experience.returns),
            part.mask,
            clip=clip,
            num_tokens=num_tokens,
        )
        critic.backward(found.loss * weight)
        share = int(part.mask.sum()) * weight / num_tokens
        sums.add("value/loss", float(found.loss.detach()) * weight, share)
        if clip is not None:
            sums.add("value/clip_fraction", float(found.clip_fraction) * weight, share)
    sums.add("value/lr", critic.lr, 1.0)
    norm, taken = critic.step()
    _count(now, critic, taken, experience, rows)
    sums.add("value/grad_norm", norm if taken else 0.0, float(taken))


@torch.no_grad()
def kl_of_update(now: Updating, experience: Experience, minibatch: list[list[int]]) -> float:
    """KL (k3) from the policy that wrote the replies to the one there is now, nats per token."""
    rows = [index for micro in minibatch for index in micro]
    num_tokens = max(1, int(experience.mask[rows].sum()))
    sums = MetricSums()
    for indices, weight in rank_micro_batches(minibatch, now.here):
        part = micro_batch(experience, indices, now)
        with autocast(now.here, now.config.compute_dtype):
            out = now.actors.policy.model(part.batch, now.config.sampling.temperature)
        found = _old_kl(part.unflat(out.logprobs), part, experience, num_tokens)
        sums.add("kl", found * weight, int(part.mask.sum()) * weight / num_tokens)
    return sums.merged(now.here).get("kl", 0.0)


def _count(
    now: Updating, part: Trainable[Any], taken: bool, experience: Experience, rows: list[int]
) -> None:
    """Tell the run whether a model's step was taken, and with which replies if not."""
    now.run.step_taken(
        part.name,
        taken,
        now.step,
        rows,
        reason=part.why_skipped,
        contents=lambda: contents(experience, rows),
    )


def micro_batch(experience: Experience, indices: list[int], now: Updating) -> Part:
    """Replies as the models read them, with their masks cut to the longest."""
    batch = reply_batch(experience.rollout, indices, now.actors.pad, now.here.device)
    width = int(batch.targets.sum(1).max())
    lengths = batch.targets.sum(1)
    full = torch.arange(width, device=lengths.device)[None] < lengths[:, None]
    return Part(batch, experience.mask[indices, :width], full, indices)


def prepared_advantages(
    experience: Experience, rows: list[int], config: PPOConfig
) -> Float[Tensor, "replies longest"]:
    """Advantages of the minibatch's rows, whitened over it and clipped where asked (detail 6)."""
    settings = config.advantage
    if not settings.whiten and settings.clip is None:
        return experience.advantages
    part = experience.advantages[rows]
    if settings.whiten:
        part = masked_whiten(part, experience.mask[rows])
    if settings.clip is not None:
        part = part.clamp(-settings.clip, settings.clip)
    result = experience.advantages.clone()
    result[rows] = part
    return result


def _policy_forward(part: Part, now: Updating) -> TargetReading:
    """The policy's forward; scoring has kept that of an iteration's first micro-batch."""
    config, batch = now.config, part.batch
    kept: TargetReading | None = now.actors.policy.kept(part.rows)
    if kept is not None:
        return kept
    states = None
    if config.kl is not None and config.kl.exact_loss:
        with now.actors.as_reference() as reference:
            states = reference.states(batch)
    found: TargetReading = now.actors.policy.model(
        batch,
        config.sampling.temperature,
        entropy=config.loss.entropy_coef is not None,
        reference=states,
    )
    return found


def _surrogate(
    logprobs: Float[Tensor, "batch response"],
    part: Part,
    experience: Experience,
    advantages: Float[Tensor, "replies longest"],
    num_tokens: int,
    now: Updating,
) -> PolicyLoss:
    """PPO-clip (eq. 15) or PPO-penalty (eq. 14)."""
    settings = now.config.loss
    scored = experience.scored
    old = scored.ref_logprobs if settings.ratio_to == "reference" else scored.logprobs
    assert old is not None
    arguments = (logprobs, part.of(old), part.of(advantages), part.mask)
    if now.penalty_coef is not None:
        return kl_penalty_policy_loss(*arguments, kl_coef=now.penalty_coef, num_tokens=num_tokens)
    return clipped_policy_loss(
        *arguments, clip=settings.policy_clip, dual_clip=settings.dual_clip, num_tokens=num_tokens
    )


def _ref_kl(
    out: TargetReading,
    logprobs: Float[Tensor, "batch response"],
    part: Part,
    experience: Experience,
    num_tokens: int,
    config: PPOConfig,
) -> Float[Tensor, ""]:
    """KL to the reference as a loss term."""
    assert config.kl is not None
    if out.ref_kl is not None:
        return exact_kl_loss(part.unflat(out.ref_kl), part.mask, num_tokens=num_tokens)
    assert experience.scored.ref_logprobs is not None
    return ref_kl_loss(
        logprobs,
        part.of(experience.scored.ref_logprobs),
        part.mask,
        estimator="k2" if config.kl.estimator == "k2" else "k3",
        num_tokens=num_tokens,
    )


def _old_kl(
    logprobs: Float[Tensor, "batch response"], part: Part, experience: Experience, num_tokens: int
) -> float:
    """KL from the sampling policy (k3), whatever the ratio's denominator is."""
    old = part.of(experience.scored.logprobs)
    return float(masked_sum(kl_penalty(old, logprobs, part.mask, estimator="k3"), part.mask)) / (
        num_tokens
    )


@torch.no_grad()
def _entropy_mean(
    now: Updating, experience: Experience, minibatch: list[list[int]], num_tokens: int
) -> float | None:
    """Mean entropy of the minibatch under the policy as it is, where a threshold needs its side."""
    if now.entropy_threshold is None:
        return None
    sums = MetricSums()
    for indices, weight in rank_micro_batches(minibatch, now.here):
        part = micro_batch(experience, indices, now)
        with autocast(now.here, now.config.compute_dtype):
            out = now.actors.policy.model(part.batch, now.config.sampling.temperature, entropy=True)
        loss = entropy_loss(part.unflat(out.entropy), part.mask, num_tokens=num_tokens)
        share = int(part.mask.sum()) * weight / num_tokens
        sums.add("entropy", -float(loss) * weight, share)
    return sums.merged(now.here).get("entropy", 0.0)


def _add_lm_term(texts: list[list[int]], now: Updating) -> None:
    """PPO-ptx, eq. 17: gradients of the plain text's NLL beside those of the surrogate."""
    config, policy = now.config, now.actors.policy
    assert config.ptx is not None
    num_tokens = sum(len(piece) - 1 for piece in texts)
    plan = plan_micro_batches([len(piece) for piece in texts], config.micro_tokens, now.here.size)
    for indices, weight in rank_micro_batches(plan, now.here):
        rows = [(texts[i], [False] + [True] * (len(texts[i]) - 1)) for i in indices]
        batch = collate(rows, now.actors.pad, now.here.device)
        with autocast(now.here, config.compute_dtype):
            logprobs = policy.model(batch).logprobs[None]
        loss = lm_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), num_tokens=num_tokens)
        policy.backward(config.ptx.coef * loss * weight)
        share = batch.num_targets * weight / num_tokens
        now.sums.add("ptx/loss", float(loss.detach()) * weight, share)
