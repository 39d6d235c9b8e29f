"""The reward model: ranking loss plus imitation, token-balanced batches.

Zheng et al. 2023, eq. 2 and §4. A pair is never split: its two answers share a micro-batch. The
ranking term is a mean over pairs, the imitation term a mean over the preferred answers' tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from ppomax.data.batching import TokenBatch, collate, plan_micro_batches, token_batches
from ppomax.data.formats import BadRow
from ppomax.data.sources import Sources, load_preferences, split_by_prompt
from ppomax.data.template import ChatTemplate, Encoded
from ppomax.distributed import World, state_on_main, sum_tensor
from ppomax.errors import DataError
from ppomax.losses import RankingLoss, lm_loss, pairwise_ranking_loss
from ppomax.metrics import MetricSums
from ppomax.models.export import Card, RewardCard, export_reward, template_hash, tokenizer_hash
from ppomax.models.heads import ScalarModel, read_scores
from ppomax.models.language import freeze_embeddings, place
from ppomax.models.load import load_reward_model, load_tokenizer
from ppomax.models.logprobs import token_logprobs
from ppomax.models.lora import LoraSettings, add_lora, merged_copy
from ppomax.train.loop import (
    StageRun,
    Trainable,
    Watched,
    autocast,
    check_positions,
    opened,
    rank_micro_batches,
)
from ppomax.train.optim import OptimSettings
from ppomax.train.probes import probe_messages, score_dialogues
from ppomax.train.settings import StageSettings
from ppomax.train.stepping import run_steps
from ppomax.types import PreferenceRow


class RewardConfig(StageSettings):
    """Learn a score from preferences."""

    data: Sources
    """Preference pairs."""
    heldout: float = Field(0.1, ge=0, lt=1)
    """Share of prompts held out for `eval/accuracy`."""
    lm_coef: float = Field(1.0, ge=0)
    """β_rm of eq. 2: weight of the imitation loss (paper: 1; its released scripts: 0)."""
    ranking_coef: float = Field(1.0, gt=0)
    """λ of eq. 2 (paper: 1)."""
    margin: float = Field(0.0, ge=0)
    """Score difference asked for; a pair's own `strength` multiplies it where the data has one."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of wrong labels."""
    epochs: int = Field(1, ge=1)
    """Passes over the pairs (paper: 1.06)."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps."""
    batch_tokens: int = Field(16384, ge=1)
    """Tokens per optimizer step, both answers counted, over all ranks."""
    min_pairs: int = Field(4, ge=1)
    """Fewest pairs in a step (paper: 4)."""
    max_pairs: int = Field(128, ge=1)
    """Most pairs in a step (paper: 128)."""
    eval_every: int = Field(20, ge=1)
    """Steps between held-out evaluations."""
    eval_pairs: int | None = Field(500, ge=1)
    """Held-out pairs in each evaluation, the first of them; null takes all."""
    optim: OptimSettings = OptimSettings(lr=5e-6, schedule="inverse_sqrt", warmup=0.1)
    """The paper's 5e-6 is for 7B; small models need more."""
    lora: LoraSettings | None = None
    """Train adapters (and the score head) on a frozen model; null trains all weights."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference, encoded."""

    row: PreferenceRow
    chosen: Encoded
    rejected: Encoded

    @property
    def tokens(self) -> int:
        """Tokens of both dialogues."""
        return len(self.chosen.ids) + len(self.rejected.ids)


@dataclass(frozen=True, slots=True)
class RewardData:
    """Encoded pairs and the batches of every step."""

    train: list[Pair]
    heldout: list[Pair]
    steps: list[list[int]]
    bad: list[BadRow]
    """Rows set aside."""


def encode_pair(row: PreferenceRow, template: ChatTemplate, max_length: int) -> Pair | None:
    """Both dialogues with the same prompt, older turns dropped until the longer one fits.

    Only the last answer is a target: earlier assistant turns are part of the prompt.
    """
    answers = [template.answer(text) for text in (row.chosen, row.rejected)]
    fitted = template.fit(row.prompt, max_length - max(map(len, answers)))
    if fitted is None:
        return None
    prompt = fitted[1]
    sides = [
        Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer)) for answer in answers
    ]
    return Pair(row, *sides)


def load_data(config: RewardConfig, template: ChatTemplate) -> RewardData:
    """Read, split and encode; plan every step.

    Raises:
        DataError: no pair fits `max_length`.
    """
    loaded = load_preferences(config.data, max_bad_rows=config.max_bad_rows)
    split = split_by_prompt(loaded.rows, config.heldout)
    bad = list(loaded.bad)
    train, heldout = (encode_fitting(rows, template, config.max_length, bad) for rows in split)
    if not train:
        raise DataError(f"setting max_length: no pair fits {config.max_length} tokens")
    lengths = [pair.tokens for pair in train]
    steps: list[list[int]] = []
    for epoch in range(config.epochs):
        order = loaded.order_of([pair.row for pair in train], config.seed, epoch)
        steps += token_batches(
            order, lengths, config.batch_tokens, least=config.min_pairs, most=config.max_pairs
        )
    heldout = heldout[: config.eval_pairs]
    return RewardData(train, heldout, steps[: config.max_steps], bad)


def encode_fitting(
    rows: list[PreferenceRow], template: ChatTemplate, max_length: int, bad: list[BadRow]
) -> list[Pair]:
    """The rows that fit, encoded; the others are added to `bad`."""
    found = []
    for row in rows:
        pair = encode_pair(row, template, max_length)
        if pair is None:
            bad.append(BadRow(row.where, "too-long", f"does not fit max_length {max_length}"))
        else:
            found.append(pair)
    return found


def train_reward(config: RewardConfig, *, resume: bool = False) -> Path:
    """Run the stage; returns its run directory, with the model in `export/`."""
    with opened("reward", config, resume=resume) as run:
        return _train(config, run.world, run)


def _train(config: RewardConfig, here: World, run: StageRun) -> Path:
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    template = ChatTemplate(tokenizer, config.system)
    base = config.compute_dtype if config.lora else torch.float32
    model = load_reward_model(
        config.model, dtype=base, seed=config.seed, trust_remote_code=config.trust_remote_code
    )
    check_positions(config, model.backbone)
    data = load_data(config, template)
    if config.lora:
        add_lora(model, config.lora, config.seed)
    elif config.freeze_embeddings:
        freeze_embeddings(model)
    place(model, here, checkpointing=config.gradient_checkpointing)
    reward = Trainable("reward", model, config.optim, len(data.steps), here)
    state = run.restore([reward])
    if state is None:
        run.set_aside(data.bad)
    pad = int(tokenizer.pad_token_id)

    def train(step: int, micro_tokens: int) -> dict[str, float]:
        pairs = [data.train[index] for index in data.steps[step]]
        sized = config.model_copy(update={"micro_tokens": micro_tokens})
        return train_step(reward, pairs, pad, sized, here, run, step + 1)

    def judge() -> dict[str, float]:
        if not data.heldout:
            return {}
        return evaluate(model, data.heldout, pad, config, here, run.watched)

    run_steps(
        run,
        reward,
        state,
        len(data.steps),
        train=train,
        judge=judge,
        judge_every=config.eval_every,
        quality=lambda found: found["eval/accuracy"],
    )
    _export(config, model, tokenizer, template, data, here, run)
    return run.finish()


def stack(pairs: list[Pair], pad: int, here: World, *, imitate: bool) -> TokenBatch:
    """Preferred dialogues first, then the others in the same order; targets on the preferred."""
    rows = [(pair.chosen.ids, pair.chosen.mask if imitate else []) for pair in pairs]
    rows += [(pair.rejected.ids, []) for pair in pairs]
    return collate([(ids, mask or [False] * len(ids)) for ids, mask in rows], pad, here.device)


def train_step(
    reward: Trainable[ScalarModel],
    pairs: list[Pair],
    pad: int,
    config: RewardConfig,
    here: World,
    run: StageRun,
    step: int,
) -> dict[str, float]:
    """One optimizer step on the pairs; its metrics. Independent of `micro_tokens` and ranks."""
    num_pairs = sum(pair.row.weight for pair in pairs)
    num_tokens = sum(pair.chosen.num_targets for pair in pairs)
    imitate = config.lm_coef > 0
    sums = MetricSums()
    for indices, weight in run.watched(rank_micro_batches(_plan(pairs, config, here), here)):
        part = [pairs[index] for index in indices]
        batch = stack(part, pad, here, imitate=imitate)
        with autocast(here, config.compute_dtype):
            output = reward.model(batch.input_ids)
            ranking = _ranking(output.values, batch, part, config, num_pairs)
            loss = config.ranking_coef * ranking.loss
            if imitate:
                logprobs = _imitation_logprobs(reward.model, output.hidden, batch)
                nll = lm_loss(
                    logprobs, torch.ones_like(logprobs, dtype=torch.bool), num_tokens=num_tokens
                )
                loss = loss + config.lm_coef * nll
                sums.add(
                    "reward/lm_loss", float(nll.detach()) * weight, weight / len(pairs) * len(part)
                )
        reward.backward(loss * weight)
        share = weight * len(part) / len(pairs)
        sums.add("reward/loss", float(loss.detach()) * weight, share)
        sums.add("reward/pair_loss", float(ranking.loss.detach()) * weight, share)
        sums.add("reward/accuracy", float(ranking.accuracy) * weight, share)
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
    values = sums.merged(here)
    tokens = float(sum(pair.tokens for pair in pairs))
    values |= {"reward/grad_norm": norm} if taken else {}
    return values | {
        "reward/lr": lr,
        "batch/pairs": float(len(pairs)),
        "batch/tokens": tokens,
    }


def _plan(pairs: list[Pair], config: RewardConfig, here: World) -> list[list[int]]:
    widths = [2 * max(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in pairs]
    return plan_micro_batches(widths, config.micro_tokens, here.size)


def _ranking(
    values: torch.Tensor,
    batch: TokenBatch,
    part: list[Pair],
    config: RewardConfig,
    num_pairs: float,
) -> RankingLoss:
    chosen, rejected = read_scores(values, batch.lengths).chunk(2)
    device = chosen.device
    strength = torch.tensor(
        [1.0 if pair.row.strength is None else pair.row.strength for pair in part], device=device
    )
    return pairwise_ranking_loss(
        chosen,
        rejected,
        num_pairs=num_pairs,
        margin=config.margin * strength if config.margin else None,
        label_smoothing=config.label_smoothing,
        weights=torch.tensor([pair.row.weight for pair in part], device=device),
    )


def _imitation_logprobs(
    model: ScalarModel, hidden: torch.Tensor, batch: TokenBatch
) -> torch.Tensor:
    at = batch.targets[:, 1:]
    logprobs = token_logprobs(
        hidden[:, :-1][at], model.output_weight(), batch.input_ids[:, 1:][at], entropy=False
    ).logprobs
    return logprobs[None]


@torch.no_grad()
def score_pairs(
    model: ScalarModel,
    pairs: list[Pair],
    pad: int,
    config: RewardConfig,
    here: World,
    watched: Watched = iter,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [pairs] of the preferred and of the other answers, on every rank."""
    scores = torch.zeros(2, len(pairs), device=here.device)
    for indices, weight in watched(rank_micro_batches(_plan(pairs, config, here), here)):
        batch = stack([pairs[index] for index in indices], pad, here, imitate=False)
        with autocast(here, config.compute_dtype):
            found = model.scores(batch.input_ids, batch.lengths)
        if weight:
            scores[:, indices] = found.view(2, -1)
    scores = sum_tensor(scores, here).cpu()
    return scores[0], scores[1]


def evaluate(
    model: ScalarModel,
    pairs: list[Pair],
    pad: int,
    config: RewardConfig,
    here: World,
    watched: Watched = iter,
) -> dict[str, float]:
    """Held-out ranking loss and accuracy over all pairs at once."""
    chosen, rejected = score_pairs(model, pairs, pad, config, here, watched)
    found = pairwise_ranking_loss(chosen, rejected, num_pairs=len(pairs))
    return {"eval/loss": float(found.loss), "eval/accuracy": float(found.accuracy)}


def _export(
    config: RewardConfig,
    model: ScalarModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    data: RewardData,
    here: World,
    run: StageRun,
) -> None:
    pad = int(tokenizer.pad_token_id)
    # adapters are merged into what is written, and the merged weights round differently
    scorer = merged_copy(model).to(config.compute_dtype) if config.lora else model
    sample = data.train[:512]
    chosen, rejected = score_pairs(scorer, sample, pad, config, here)
    everything = torch.cat([chosen, rejected])
    accuracy = {}
    if data.heldout:
        accuracy["all"] = evaluate(scorer, data.heldout, pad, config, here)["eval/accuracy"]
    probes = score_dialogues(scorer, list(probe_messages()), template, here, config.compute_dtype)
    state = state_on_main(model, here)  # collective
    if not here.is_main:
        return
    export_reward(
        model,
        tokenizer,
        run.path / "export",
        card=Card(
            title="Reward model",
            summary="A reward model trained with ppomax: one score, read at the answer's last "
            "token.",
            source_model=config.model,
            datasets=[source.path for source in config.data],
            numbers={f"held-out accuracy ({name})": value for name, value in accuracy.items()},
        ),
        reward_card=RewardCard(
            tokenizer_hash=tokenizer_hash(tokenizer),
            template_hash=template_hash(tokenizer),
            probes=[
                {"messages": list(messages), "score": score}
                for messages, score in zip(probe_messages(), probes, strict=True)
            ],
            score_mean=float(everything.mean()),
            score_std=float(everything.std()) if len(everything) > 1 else 1.0,
            accuracy=accuracy,
            counts={
                "train": len(data.train),
                "heldout": len(data.heldout),
                "quarantined": len(data.bad),
            },
            source_model=config.model,
        ),
        state=state,
    )
