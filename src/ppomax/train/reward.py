"""The reward model: ranking loss plus imitation, token-balanced batches.

Zheng et al. 2023, eq. 2 and §4. A pair is never split: its two answers share a micro-batch. The
ranking term is a mean over pairs, the imitation term a mean over the preferred answers' tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, gather
from ppomax.errors import TrainingError
from ppomax.losses import centring_loss, lm_loss, pairwise_ranking_loss
from ppomax.metrics import MetricSums
from ppomax.models.blocks import freeze_layers
from ppomax.models.heads import ScalarModel, classifier_shell
from ppomax.models.language import freeze_embeddings, place
from ppomax.models.load import load_reward_model, load_tokenizer, positions_of
from ppomax.models.lora import add_lora
from ppomax.train.ensemble import train_members
from ppomax.train.loop import StageRun, Trainable, check_positions, opened
from ppomax.train.micro_batches import autocast, rank_micro_batches
from ppomax.train.pair_forward import PairOutput, forward_pairs, plan_pairs, settle_sharing
from ppomax.train.pairs import Pair
from ppomax.train.reward_card import export
from ppomax.train.reward_data import RewardConfig, load_data
from ppomax.train.scoring import PairScores, score_pairs
from ppomax.train.supervised import fit

__all__ = ["RewardConfig", "load_data", "train_reward"]


def train_reward(config: RewardConfig, *, resume: bool = False) -> Path:
    """Run the stage; returns its run directory, with the model in `export/`."""
    with opened("reward", config, resume=resume) as run:
        if config.ensemble is None:
            return _train(config, run.world, run)
        return train_members(config, run.world, run, _train_one, resume=resume)


def _train_one(config: RewardConfig, resume: bool) -> Path:
    return train_reward(config, resume=resume)


def _train(config: RewardConfig, here: World, run: StageRun) -> Path:
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    template = ChatTemplate(tokenizer, config.system)
    base = config.compute_dtype if config.lora else torch.float32
    model = load_reward_model(
        config.model, dtype=base, seed=config.seed, trust_remote_code=config.trust_remote_code
    )
    check_positions(config, positions_of(model.config))
    classifier_shell(model.config)  # refuses what could not be exported in the end
    data = load_data(config, template)
    if config.lora:
        add_lora(model, config.lora, config.seed, freeze_layers=config.freeze_layers or 0)
    elif config.freeze_embeddings:
        freeze_embeddings(model)
    if config.freeze_layers:
        freeze_layers(model, config.freeze_layers)
    place(model, here, checkpointing=config.gradient_checkpointing)
    reward = Trainable("reward", model, config.optim, len(data.steps), here)
    state = run.restore([reward])
    pad = int(tokenizer.pad_token_id)
    with autocast(here, config.compute_dtype):
        steps = [[data.train[index] for index in step] for step in data.steps]
        share = settle_sharing(config.share_prompts, model, steps, config.micro_tokens, pad, here)
    config = config.model_copy(update={"share_prompts": share})
    if state is None:
        run.set_aside(data.bad, data.notes)

    def train(step: int, micro_tokens: int) -> dict[str, float]:
        pairs = [data.train[index] for index in data.steps[step]]
        sized = config.model_copy(update={"micro_tokens": micro_tokens})
        return train_step(reward, pairs, pad, sized, here, run, step + 1)

    judged: dict[int, PairScores] = {}  # by step, the last alone

    def judge(step: int) -> dict[str, float]:
        judged.clear()
        if not data.heldout:
            return {}
        judged[step] = score_pairs(
            model, data.heldout, pad, config, here, run.watched, share_prompts=share
        )
        return evaluate(*judged[step])

    fitted = fit(run, reward, len(data.steps), config, state, train=train, evaluate=judge)
    run.progress.say("writes the export and its card: scores, accuracy by subset, probe texts")
    scores = judged.get(fitted.exported)
    export(config, model, template, data, fitted, here, run.path / "export", scores)
    return run.finish()


def train_step(
    reward: Trainable[ScalarModel],
    pairs: list[Pair],
    pad: int,
    config: RewardConfig,
    here: World,
    run: StageRun,
    step: int,
) -> dict[str, float]:
    """One optimizer step on the pairs; its metrics. Independent of `micro_tokens` and ranks.

    Raises:
        TrainingError: a score is not finite; the text names the pair.
    """
    num_pairs = sum(pair_weight(pair, config) for pair in pairs) or 1.0
    num_tokens = sum(pair.row.weight * pair.chosen.num_targets for pair in pairs)
    imitate = config.lm_coef > 0
    sums = MetricSums()
    lost: list[str] = []
    share_prompts = bool(config.share_prompts)
    plan = plan_pairs(pairs, config.micro_tokens, here, share_prompts=share_prompts)
    for indices, weight in run.watched(rank_micro_batches(plan, here)):
        part = [pairs[index] for index in indices]
        with autocast(here, config.compute_dtype):
            output = forward_pairs(
                reward.model,
                part,
                pad,
                here,
                imitate=imitate,
                share_prompts=share_prompts,
            )
            losses = step_losses(output, part, config, num_pairs, num_tokens)
        lost += _not_finite(output, part)
        reward.backward(losses["reward/loss"] * weight)
        share = weight * len(part) / len(pairs)
        for key, value in losses.items():
            sums.add(key, float(value.detach()) * weight, share)
    _stop_if_lost([name for names in gather(lost, here) for name in names], step)
    lr = reward.lr
    norm, taken = reward.step()
    run.step_taken(
        "reward",
        taken,
        step,
        [pair.row.id for pair in pairs],
        reason=reward.why_skipped,
        contents=lambda: [
            {"id": pair.row.id, "chosen": pair.chosen.ids, "rejected": pair.rejected.ids}
            for pair in pairs
        ],
    )
    values = sums.merged(here) | ({"reward/grad_norm": norm} if taken else {})
    return values | {
        "reward/lr": lr,
        "batch/pairs": float(len(pairs)),
        "batch/tokens": float(sum(pair.tokens for pair in pairs)),
    }


def step_losses(
    output: PairOutput,
    part: Sequence[Pair],
    config: RewardConfig,
    num_pairs: float,
    num_tokens: float,
) -> dict[str, Tensor]:
    """Eq. 2 of a micro-batch and its terms, each the micro-batch's share of the whole step's.

    A ranked list counts once in both: its pairs, and the tokens of their preferred answers, have
    weights that sum to one pair's.
    """
    device = output.chosen.device
    weights = torch.tensor([pair_weight(pair, config) for pair in part], device=device)
    ranking = pairwise_ranking_loss(
        output.chosen,
        output.rejected,
        num_pairs=num_pairs,
        margin=_margins(part, config, device),
        label_smoothing=config.label_smoothing,
        weights=weights,
    )
    found = {"reward/pair_loss": ranking.loss, "reward/accuracy": ranking.accuracy}
    loss = config.ranking_coef * ranking.loss
    if output.logprobs is not None:
        each = torch.tensor([pair.row.weight for pair in part], device=device)
        sizes = torch.tensor([pair.chosen.num_targets for pair in part], device=device)
        logprobs = (output.logprobs * each.repeat_interleave(sizes))[None]
        everything = torch.ones_like(logprobs, dtype=torch.bool)
        found["reward/lm_loss"] = lm_loss(logprobs, everything, num_tokens=num_tokens)
        loss = loss + config.lm_coef * found["reward/lm_loss"]
    if config.centre_coef:
        found["reward/centre_loss"] = centring_loss(
            output.chosen, output.rejected, num_pairs=num_pairs, weights=weights
        )
        loss = loss + config.centre_coef * found["reward/centre_loss"]
    return found | {"reward/loss": loss}


def pair_weight(pair: Pair, config: RewardConfig) -> float:
    """A pair's part in the ranking loss; without a strength in the data that of strength 1."""
    strength = pair.row.strength if config.strength == "weight" else None
    return pair.row.weight * (1.0 if strength is None else strength)


def _margins(
    part: Sequence[Pair], config: RewardConfig, device: torch.device
) -> Tensor | float | None:
    if not config.margin:
        return None
    if config.strength == "weight":
        return config.margin
    strengths = [1.0 if pair.row.strength is None else pair.row.strength for pair in part]
    return config.margin * torch.tensor(strengths, device=device)


def _not_finite(output: PairOutput, part: Sequence[Pair]) -> list[str]:
    good = (output.chosen + output.rejected).isfinite().tolist()
    return [
        f"{pair.row.id!r} ({pair.row.where})"
        for pair, fine in zip(part, good, strict=True)
        if not fine
    ]


def _stop_if_lost(names: list[str], step: int) -> None:
    if names:
        raise TrainingError(
            f"reward model: a score in step {step} is not finite, pair {names[0]}; the last "
            "checkpoint is good. Look at the pair, lower the learning rate or set dtype float32"
        )


def evaluate(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """Held-out ranking loss and accuracy over all pairs at once."""
    found = pairwise_ranking_loss(chosen, rejected, num_pairs=len(chosen))
    return {"eval/loss": float(found.loss), "eval/accuracy": float(found.accuracy)}
