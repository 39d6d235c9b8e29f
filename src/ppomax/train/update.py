"""One optimizer step of policy and critic on one minibatch, whatever its cut into micro-batches."""

import torch

from ppomax.data.batching import collate, plan_micro_batches
from ppomax.distributed import World
from ppomax.losses import clipped_policy_loss, clipped_value_loss, entropy_loss, lm_loss
from ppomax.masked import masked_max, masked_mean, masked_whiten
from ppomax.metrics import MetricSums
from ppomax.models.language import values_before_targets
from ppomax.train.actors import Actors
from ppomax.train.experience_batch import Experience, reply_batch, unflatten
from ppomax.train.loop import StageRun, autocast, rank_micro_batches
from ppomax.train.ppo_config import PPOConfig


def update_policy(
    experience: Experience,
    minibatch: list[list[int]],
    texts: list[list[int]],
    actors: Actors,
    config: PPOConfig,
    here: World,
    run: StageRun,
    sums: MetricSums,
    *,
    step: int,
    first: bool,
) -> float:
    """Clipped surrogate, entropy and LM terms in one step; returns KL to the sampling policy.

    Args:
        first: the parameters are still those that scored the rollout, so the ratio must be 1.
    """
    scored, loss_settings = experience.scored, config.loss
    rows = [index for micro in minibatch for index in micro]
    num_tokens = max(1, int(scored.mask[rows].sum()))
    advantages = prepared_advantages(experience, rows, config)
    entropy_mean = float(masked_mean(scored.entropy[rows], scored.mask[rows]))
    old = scored.ref_logprobs if loss_settings.ratio_to == "reference" else scored.logprobs
    assert old is not None
    with_entropy = loss_settings.entropy_coef is not None
    kl_old = 0.0
    for indices, weight in rank_micro_batches(minibatch, here):
        batch = reply_batch(experience.rollout, indices, actors.pad, here.device)
        mask = scored.mask[indices][:, : int(batch.targets.sum(1).max())]
        width = mask.shape[1]
        with autocast(here, config.compute_dtype):
            out = actors.policy.model(batch, config.sampling.temperature, entropy=with_entropy)
        full = batch_mask(experience, indices, width)
        logprobs = unflatten(out.logprobs, full)
        surrogate = clipped_policy_loss(
            logprobs,
            old[indices, :width],
            advantages[indices, :width],
            mask,
            clip=loss_settings.policy_clip,
            dual_clip=loss_settings.dual_clip,
            num_tokens=num_tokens,
        )
        loss = surrogate.loss
        if loss_settings.entropy_coef is not None:
            bonus = entropy_loss(
                unflatten(out.entropy, full),
                mask,
                threshold=loss_settings.entropy_threshold,
                num_tokens=num_tokens,
                batch_mean=entropy_mean,
            )
            loss = loss + loss_settings.entropy_coef * bonus
        actors.policy.backward(loss * weight)
        tokens = int(mask.sum()) * weight
        share = tokens / num_tokens
        kl_old += float(surrogate.approx_kl) * weight
        for key, value in {
            "policy/loss": surrogate.loss.detach(),
            "policy/clip_fraction": surrogate.clip_fraction,
            "policy/ratio_mean": surrogate.ratio_mean,
            "kl/old_k3": surrogate.approx_kl,
        }.items():
            sums.add(key, float(value) * weight, share)
        sums.maximum("policy/ratio_max", float(surrogate.ratio_max))
        if first and loss_settings.ratio_to == "policy":
            error = (logprobs.detach() - old[indices, :width]).exp().sub(1).abs()
            sums.maximum("policy/first_ratio_error", float(masked_max(error, mask, empty=0.0)))
            sums.add("kl/first_old_k3", float(surrogate.approx_kl) * weight, share)
    if texts:
        _add_lm_term(texts, actors, config, here, sums)
    sums.add("policy/lr", actors.policy.lr, 1.0)
    norm, taken = actors.policy.step()
    run.step_taken("policy", taken, step, rows)
    sums.add("policy/grad_norm", norm if taken else 0.0, float(taken))
    total = MetricSums()
    total.add("kl", kl_old, 1.0 / here.size)
    return total.merged(here)["kl"]


def update_critic(
    experience: Experience,
    minibatch: list[list[int]],
    actors: Actors,
    config: PPOConfig,
    here: World,
    run: StageRun,
    sums: MetricSums,
    *,
    step: int,
    clip: float | None,
) -> None:
    """Clipped squared error to the returns, one step."""
    scored = experience.scored
    rows = [index for micro in minibatch for index in micro]
    num_tokens = max(1, int(scored.mask[rows].sum()))
    for indices, weight in rank_micro_batches(minibatch, here):
        batch = reply_batch(experience.rollout, indices, actors.pad, here.device)
        width = int(batch.targets.sum(1).max())
        mask = scored.mask[indices, :width]
        with autocast(here, config.compute_dtype):
            flat = values_before_targets(actors.critic.model, batch)
        found = clipped_value_loss(
            unflatten(flat, batch_mask(experience, indices, width)),
            scored.values[indices, :width],
            experience.returns[indices, :width],
            mask,
            clip=clip,
            num_tokens=num_tokens,
        )
        actors.critic.backward(found.loss * weight)
        share = int(mask.sum()) * weight / num_tokens
        sums.add("value/loss", float(found.loss.detach()) * weight, share)
        if clip is not None:
            sums.add("value/clip_fraction", float(found.clip_fraction) * weight, share)
    sums.add("value/lr", actors.critic.lr, 1.0)
    norm, taken = actors.critic.step()
    run.step_taken("critic", taken, step, rows)
    sums.add("value/grad_norm", norm if taken else 0.0, float(taken))


def batch_mask(experience: Experience, indices: list[int], width: int) -> torch.Tensor:
    """Where the micro-batch's target tokens stand, replies set aside included."""
    lengths = torch.tensor([len(experience.rollout.responses[index]) for index in indices])
    return (torch.arange(width)[None] < lengths[:, None]).to(experience.scored.mask.device)


def prepared_advantages(experience: Experience, rows: list[int], config: PPOConfig) -> torch.Tensor:
    """Advantages of the minibatch's rows, whitened over it and clipped where asked (detail 6)."""
    settings = config.advantage
    if not settings.whiten and settings.clip is None:
        return experience.advantages
    part = experience.advantages[rows]
    if settings.whiten:
        part = masked_whiten(part, experience.scored.mask[rows])
    if settings.clip is not None:
        part = part.clamp(-settings.clip, settings.clip)
    result = experience.advantages.clone()
    result[rows] = part
    return result


def _add_lm_term(
    texts: list[list[int]], actors: Actors, config: PPOConfig, here: World, sums: MetricSums
) -> None:
    """PPO-ptx, eq. 17: gradients of the plain text's NLL beside those of the surrogate."""
    assert config.ptx is not None
    num_tokens = sum(len(piece) - 1 for piece in texts)
    plan = plan_micro_batches([len(piece) for piece in texts], config.micro_tokens, here.size)
    for indices, weight in rank_micro_batches(plan, here):
        rows = [(texts[i], [False] + [True] * (len(texts[i]) - 1)) for i in indices]
        batch = collate(rows, actors.pad, here.device)
        with autocast(here, config.compute_dtype):
            logprobs = actors.policy.model(batch).logprobs[None]
        loss = lm_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), num_tokens=num_tokens)
        actors.policy.backward(config.ptx.coef * loss * weight)
        sums.add("ptx/loss", float(loss.detach()) * weight, batch.num_targets * weight / num_tokens)
