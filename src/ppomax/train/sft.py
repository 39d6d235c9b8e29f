"""Supervised fine-tuning: the assistant's tokens, token-budget batches, cosine to 10%.

Zheng et al. 2023, §5.1: two epochs, cosine to 10% of the peak.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppomax.data.batching import collate, plan_micro_batches, token_batches
from ppomax.data.formats import BadRow
from ppomax.data.sources import Sources, load_sft, split_by_prompt
from ppomax.data.template import ChatTemplate, Encoded
from ppomax.distributed import World, state_on_main
from ppomax.errors import DataError
from ppomax.losses import lm_loss
from ppomax.metrics import MetricSums
from ppomax.models.export import Card, export_policy
from ppomax.models.language import LanguageModel, freeze_embeddings, place
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.models.lora import LoraSettings, add_lora
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
from ppomax.train.settings import StageSettings
from ppomax.train.stepping import run_steps
from ppomax.types import SFTRow


class SFTConfig(StageSettings):
    """Teach the model to answer as the dialogues do."""

    data: Sources
    """Dialogues; preference files give their preferred answers."""
    heldout: float = Field(0.1, ge=0, lt=1)
    """Share of prompts held out for `eval/loss`; the same share as `reward` holds out the same."""
    epochs: int = Field(2, ge=1)
    """Passes over the data (paper: 2)."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps."""
    batch_tokens: int = Field(16384, ge=1)
    """Tokens per optimizer step, over all ranks."""
    eval_every: int = Field(20, ge=1)
    """Steps between held-out evaluations."""
    optim: OptimSettings = OptimSettings(lr=9.5e-6, schedule="cosine", warmup=0.03, floor=0.1)
    """Learning rate: the paper's 9.5e-6 is for 7B; small models need more."""
    lora: LoraSettings | None = None
    """Train adapters on a frozen model; null trains all weights."""


@dataclass(frozen=True, slots=True)
class SFTData:
    """Encoded dialogues and the batches of every step."""

    train: list[Encoded]
    heldout: list[Encoded]
    steps: list[list[int]]
    """Indices into `train`, one list per optimizer step, epoch after epoch."""
    bad: list[BadRow]
    """Rows set aside."""


def encode_dialogue(row: SFTRow, template: ChatTemplate, max_length: int) -> Encoded | None:
    """Ids and mask, older turns dropped until the dialogue fits; None if it cannot."""
    answer = row.messages[-1]
    fitted = template.fit(row.messages[:-1], max_length - len(template.answer(answer["content"])))
    return None if fitted is None else template.encode([*fitted[0], answer])


def load_data(config: SFTConfig, template: ChatTemplate) -> SFTData:
    """Read, split and encode; plan every step.

    Raises:
        DataError: no dialogue fits `max_length`.
    """
    loaded = load_sft(config.data, max_bad_rows=config.max_bad_rows)
    split = split_by_prompt(loaded.rows, config.heldout)
    bad = list(loaded.bad)
    train, heldout = (encode_fitting(rows, template, config.max_length, bad) for rows in split)
    if not train:
        raise DataError(f"setting max_length: no dialogue fits {config.max_length} tokens")
    lengths = [len(encoded.ids) for _, encoded in train]
    steps: list[list[int]] = []
    for epoch in range(config.epochs):
        order = loaded.order_of([row for row, _ in train], config.seed, epoch)
        steps += token_batches(order, lengths, config.batch_tokens)
    return SFTData(
        [encoded for _, encoded in train],
        [encoded for _, encoded in heldout],
        steps[: config.max_steps],
        bad,
    )


def encode_fitting(
    rows: list[SFTRow], template: ChatTemplate, max_length: int, bad: list[BadRow]
) -> list[tuple[SFTRow, Encoded]]:
    """The rows that fit, encoded; the others are added to `bad`."""
    found = []
    for row in rows:
        encoded = encode_dialogue(row, template, max_length)
        if encoded is None:
            bad.append(BadRow(row.where, "too-long", f"does not fit max_length {max_length}"))
        else:
            found.append((row, encoded))
    return found


def train_sft(config: SFTConfig, *, resume: bool = False) -> Path:
    """Run the stage; returns its run directory, with the model in `export/`."""
    with opened("sft", config, resume=resume) as run:
        return _train(config, run.world, run)


def _train(config: SFTConfig, here: World, run: StageRun) -> Path:
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    template = ChatTemplate(tokenizer, config.system)
    base = config.compute_dtype if config.lora else torch.float32
    lm = load_policy(config.model, dtype=base, trust_remote_code=config.trust_remote_code)
    check_positions(config, lm)
    data = load_data(config, template)
    if config.lora:
        add_lora(lm, config.lora, config.seed)
    model = LanguageModel(lm)
    if config.freeze_embeddings:
        freeze_embeddings(model)
    place(model, here, checkpointing=config.gradient_checkpointing)
    policy = Trainable("policy", model, config.optim, len(data.steps), here)
    state = run.restore([policy])
    if state is None:
        run.set_aside(data.bad)
    pad = int(tokenizer.pad_token_id)

    def train(step: int, micro_tokens: int) -> dict[str, float]:
        rows = [data.train[index] for index in data.steps[step]]
        sized = config.model_copy(update={"micro_tokens": micro_tokens})
        return train_step(policy, rows, pad, sized, here, run, step + 1)

    run_steps(
        run,
        policy,
        state,
        len(data.steps),
        train=train,
        judge=lambda: evaluate(model, data.heldout, pad, config, here, run.watched),
        judge_every=config.eval_every,
        quality=lambda found: -found["eval/loss"],
    )
    _export(config, lm, tokenizer, run)
    return run.finish()


def train_step(
    policy: Trainable[LanguageModel],
    rows: list[Encoded],
    pad: int,
    config: SFTConfig,
    here: World,
    run: StageRun,
    step: int,
) -> dict[str, float]:
    """One optimizer step on the rows; its metrics."""
    num_tokens = sum(row.num_targets for row in rows)
    plan = plan_micro_batches([len(row.ids) for row in rows], config.micro_tokens, here.size)
    sums = MetricSums()
    for indices, weight in run.watched(rank_micro_batches(plan, here)):
        batch = collate([(rows[i].ids, rows[i].mask) for i in indices], pad, here.device)
        with autocast(here, config.compute_dtype):
            logprobs = policy.model(batch).logprobs[None]
        loss = lm_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), num_tokens=num_tokens)
        policy.backward(loss * weight)
        sums.add("sft/loss", float(loss.detach()) * num_tokens * weight, batch.num_targets * weight)
    lr = policy.lr
    norm, taken = policy.step()
    run.step_taken(
        "policy",
        taken,
        step,
        [len(row.ids) for row in rows],
        reason=policy.why_skipped,
        contents=lambda: [{"ids": row.ids, "mask": row.mask} for row in rows],
    )
    values = sums.merged(here)
    values["sft/perplexity"] = math.exp(min(values["sft/loss"], 80.0))
    values |= {"sft/grad_norm": norm} if taken else {}
    return values | {"sft/lr": lr, "batch/tokens": float(num_tokens)}


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    rows: list[Encoded],
    pad: int,
    config: SFTConfig,
    here: World,
    watched: Watched = iter,
) -> dict[str, float]:
    """Held-out NLL per assistant token; nothing without held-out rows."""
    if not rows:
        return {}
    plan = plan_micro_batches([len(row.ids) for row in rows], config.micro_tokens, here.size)
    sums = MetricSums()
    for indices, weight in watched(rank_micro_batches(plan, here)):
        batch = collate([(rows[i].ids, rows[i].mask) for i in indices], pad, here.device)
        with autocast(here, config.compute_dtype):
            logprobs = model(batch).logprobs
        sums.add("eval/loss", -float(logprobs.double().sum()) * weight, batch.num_targets * weight)
    return sums.merged(here)


def _export(
    config: SFTConfig, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: StageRun
) -> None:
    state = state_on_main(lm, run.world)  # collective
    if run.world.is_main:
        card = Card(
            title="SFT model",
            summary="Supervised fine-tuning with ppomax.",
            source_model=config.model,
            datasets=[source.path for source in config.data],
        )
        export_policy(lm, tokenizer, run.path / "export", card=card, state=state)
