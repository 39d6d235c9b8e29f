"""Supervised fine-tuning: the assistant's tokens, token-budget batches, cosine to 10%.

Zheng et al. 2023, §5.1: two epochs, cosine to 10% of the peak.
"""

import math
import re
from pathlib import Path

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppomax.data.batching import collate, derived_seed, plan_micro_batches
from ppomax.data.sources import load_sft
from ppomax.data.template import ChatTemplate, Encoded
from ppomax.distributed import World, state_on_main
from ppomax.losses import lm_loss
from ppomax.metrics import MetricSums
from ppomax.models.blocks import freeze_layers
from ppomax.models.export import Card, export_policy
from ppomax.models.language import LanguageModel, freeze_embeddings, place
from ppomax.models.load import load_policy, load_tokenizer, positions_of
from ppomax.models.lora import add_lora
from ppomax.models.names import licence_of
from ppomax.rollout import EngineSettings, SamplingParams, build_engine
from ppomax.train.loop import StageRun, Trainable, check_positions, opened
from ppomax.train.micro_batches import Watched, autocast, rank_micro_batches
from ppomax.train.optim import OptimSettings
from ppomax.train.supervised import Fitted, StageData, SupervisedSettings, build_data, fit
from ppomax.types import SFTRow

SFTData = StageData[SFTRow, Encoded]
SAMPLING = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1, max_new_tokens=64)
"""How replies for the log are drawn: Zheng et al. 2023, section 6.1; their length is ours."""


class SFTConfig(SupervisedSettings):
    """Teach the model to answer as the dialogues do."""

    epochs: int = Field(2, ge=1)
    """Passes over the data (paper: 2)."""
    eval_by: str | None = "lang"
    """Column by whose values held-out perplexity is given too, where rows have it."""
    optim: OptimSettings = OptimSettings(lr=9.5e-6, schedule="cosine", warmup=0.03, floor=0.1)
    """Learning rate: the paper's 9.5e-6 is for 7B; small models need more."""


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
    return build_data(
        config,
        load_sft(config.data, max_bad_rows=config.max_bad_rows),
        lambda row: encode_dialogue(row, template, config.max_length),
        lambda encoded: len(encoded.ids),
        "dialogue",
    )


def train_sft(config: SFTConfig, *, resume: bool = False) -> Path:
    """Run the stage; returns its run directory, with the model in `export/`."""
    with opened("sft", config, resume=resume) as run:
        return _train(config, run.world, run)


def _train(config: SFTConfig, here: World, run: StageRun) -> Path:
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    template = ChatTemplate(tokenizer, config.system)
    base = config.compute_dtype if config.lora else torch.float32
    lm = load_policy(config.model, dtype=base, trust_remote_code=config.trust_remote_code)
    check_positions(config, positions_of(lm.config))
    data = load_data(config, template)
    if config.lora:
        add_lora(lm, config.lora, config.seed, freeze_layers=config.freeze_layers or 0)
    model = LanguageModel(lm)
    if config.freeze_embeddings:
        freeze_embeddings(model)
    if config.freeze_layers:
        freeze_layers(model, config.freeze_layers)
    place(model, here, checkpointing=config.gradient_checkpointing)
    policy = Trainable("policy", model, config.optim, len(data.steps), here)
    state = run.restore([policy])
    if state is None:
        run.set_aside(data.bad, data.notes)
    pad = int(tokenizer.pad_token_id)

    def train(step: int, micro_tokens: int) -> dict[str, float]:
        rows = [data.train[index] for index in data.steps[step]]
        sized = config.model_copy(update={"micro_tokens": micro_tokens})
        return train_step(policy, rows, pad, sized, here, run, step + 1)

    def judge(step: int) -> dict[str, float]:
        found = evaluate(model, data, pad, config, here, run.watched)
        write_samples(lm, data, template, config, here, run, step)
        return found

    fitted = fit(run, policy, len(data.steps), config, state, train=train, evaluate=judge)
    _export(config, lm, tokenizer, run, fitted)
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
    values["sft/perplexity"] = perplexity(values["sft/loss"])
    values |= {"sft/grad_norm": norm} if taken else {}
    return values | {"sft/lr": lr, "batch/tokens": float(num_tokens)}


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    data: SFTData,
    pad: int,
    config: SFTConfig,
    here: World,
    watched: Watched = iter,
) -> dict[str, float]:
    """Held-out NLL per assistant token and perplexities; nothing without held-out rows."""
    rows = data.heldout
    if not rows:
        return {}
    groups = [language_of(row, config.eval_by) for row in data.heldout_rows]
    plan = plan_micro_batches([len(row.ids) for row in rows], config.micro_tokens, here.size)
    sums = MetricSums()
    for key in sorted({"", *groups}):  # every rank merges the same keys
        sums.add(key, 0.0, 0.0)
    for indices, weight in watched(rank_micro_batches(plan, here)):
        batch = collate([(rows[i].ids, rows[i].mask) for i in indices], pad, here.device)
        with autocast(here, config.compute_dtype):
            logprobs = model(batch).logprobs
        parts = logprobs.double().split([rows[i].num_targets for i in indices])
        for index, part in zip(indices, parts, strict=True):
            for key in {"", groups[index]}:
                sums.add(key, -float(part.sum()) * weight, len(part) * weight)
    found = sums.merged(here)
    loss = found.pop("")
    return {
        "eval/loss": loss,
        "eval/perplexity": perplexity(loss),
        **{f"eval/perplexity_{name}": perplexity(value) for name, value in found.items()},
    }


def language_of(row: SFTRow, column: str | None) -> str:
    """The row's value in the column, as a metric key writes it; empty where it has none."""
    value = row.meta.get(column) if column else None
    return "" if value is None else re.sub(r"\W", "_", str(value).lower())


def perplexity(loss: float) -> float:
    """The exponential of a mean NLL, kept finite."""
    return math.exp(min(loss, 80.0))


def write_samples(
    lm: PreTrainedModel,
    data: SFTData,
    template: ChatTemplate,
    config: SFTConfig,
    here: World,
    run: StageRun,
    step: int,
) -> None:
    """What the model answers to the first held-out prompts, into samples.jsonl."""
    chosen = range(min(config.log.samples, len(data.heldout)))
    if not chosen:
        return
    settings = EngineSettings(slots=len(chosen))
    engine = build_engine(settings, lm, template, here, config.compute_dtype)  # collective
    if not here.is_main:
        return
    rows, prompts = [data.heldout_rows[i] for i in chosen], []
    for encoded in (data.heldout[i] for i in chosen):
        start = len(encoded.ids) - encoded.mask[::-1].index(False)
        prompts.append(encoded.ids[:start])
    seeds = [derived_seed(config.seed, "sft", row.id) for row in rows]
    rollout = engine.generate(prompts, SAMPLING, seeds)
    run.samples(
        [
            {
                "stage": "sft",
                "step": step,
                "attempt": run.attempt,
                "id": row.id,
                "prompt": list(row.messages[:-1]),
                "response": template.decode(reply),
                "wanted": row.messages[-1]["content"],
                "length": len(reply),
                "truncated": not done,
            }
            for row, reply, done in zip(rows, rollout.responses, rollout.finished, strict=True)
        ]
    )


def _export(
    config: SFTConfig,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: StageRun,
    fitted: Fitted,
) -> None:
    state = state_on_main(lm, run.world)  # collective
    if run.world.is_main:
        licence = config.licence or licence_of(config.model)
        card = Card(
            title="SFT model",
            summary=f"Supervised fine-tuning with ppomax. {fitted.said}",
            source_model=config.model,
            datasets=[source.path for source in config.data],
            **({"licence": licence} if licence else {}),
        )
        export_policy(
            lm, tokenizer, run.path / "export", card=card, state=state, system=config.system
        )
