"""What SFT and the reward model share: data to batches, the loop over steps, when to stop.

A stage gives its rows, how one is encoded, and two functions: train on a batch, judge what is held
out. Nothing here knows a loss.
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar

from pydantic import Field

from ppomax import checkpoint, distributed
from ppomax.config import Settings
from ppomax.data.batching import token_batches
from ppomax.data.fitting import Limit, check_fitting, fit_row
from ppomax.data.formats import BadRow
from ppomax.data.sources import Loaded, Sources, exchange_overlap, split_by_prompt
from ppomax.errors import CheckpointError, ConfigError
from ppomax.models.lora import LoraSettings
from ppomax.train.loop import StageRun, Trainable
from ppomax.train.memory import fitted, peak_memory_gb
from ppomax.train.settings import StageSettings
from ppomax.train.stopping import StopAsked
from ppomax.types import PreferenceRow, SFTRow

BEST = "best"
"""Folder of a run that holds the weights of least held-out loss, with `early_stop`."""

Row = TypeVar("Row", PreferenceRow, SFTRow)
T = TypeVar("T")
Values = dict[str, float]


class EarlyStopSettings(Settings):
    """When the held-out loss decides how long a stage trains and what it exports."""

    patience: int | None = Field(3, ge=1)
    """Evaluations in a row without a lower held-out loss that end the stage; null trains every step
    and still keeps the best weights. Ours."""
    export: Literal["best", "last"] = "best"
    """Which weights `export/` holds. Both are kept: the best in `best/`, the last in
    `checkpoints/`."""


class SupervisedSettings(StageSettings):
    """Common part of `sft` and `reward`."""

    data: Sources
    """Rows to learn from. `sft` takes dialogues (of preference files the preferred answers),
    `reward` takes preference pairs."""
    heldout: float = Field(0.1, ge=0, lt=1)
    """Share of prompts held out for `eval/loss`; the same share holds out the same prompts in every
    stage."""
    epochs: int = Field(1, ge=1)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps."""
    batch_tokens: int = Field(16384, ge=1)
    """Tokens per optimizer step, over all ranks (of a pair, both answers')."""
    eval_every: int = Field(20, ge=1)
    """Steps between held-out evaluations."""
    early_stop: EarlyStopSettings | None = None
    """Null trains every step and exports the last. Zheng et al. 2023 (section 4) found that a
    reward model of 200 steps had the accuracy of the last and made worse PPO."""
    licence: str | None = None
    """Licence of what is exported, an SPDX id; null takes what the model it starts from says."""
    lora: LoraSettings | None = None
    """Train adapters (and a score head) on a frozen model; null trains all weights."""


@dataclass(frozen=True, slots=True)
class StageData(Generic[Row, T]):
    """Encoded rows and the batches of every step."""

    train: list[T]
    heldout: list[T]
    heldout_rows: list[Row]
    """What `heldout` was encoded from."""
    steps: list[list[int]]
    """Indices into `train`, one list per optimizer step, epoch after epoch."""
    bad: list[BadRow]
    """Rows set aside."""
    notes: list[str]
    """What a user should know of the data."""
    files: dict[str, str]
    """Each source's path and SHA-256."""


class Best(TypedDict):
    """The evaluation of least held-out loss so far."""

    step: int
    loss: float
    waited: int
    """Evaluations since."""


def build_data(
    config: SupervisedSettings,
    loaded: Loaded[Row],
    encode: Callable[[Row], T | None],
    tokens: Callable[[T], int],
    what: str,
    *,
    least: int = 1,
    most: int | None = None,
) -> StageData[Row, T]:
    """Split by prompt, encode what fits, plan every step.

    Args:
        encode: None for a row that does not fit `max_length`.
        what: one row's name in messages.
        least, most: rows in a step.

    Raises:
        DataError: none fits, or more rows than `max_bad_rows` cannot be used (too long, refused by
            the chat template).
    """
    split = split_by_prompt(loaded.rows, config.heldout)
    bad = list(loaded.bad)
    limit = Limit("max_length", config.max_length, what)
    train, heldout = (_fitting(rows, encode, limit, bad) for rows in split)
    check_fitting(loaded, bad, config.max_bad_rows, limit, some=bool(train))
    lengths = [tokens(item) for _, item in train]
    lists = [row.where for row, _ in train]  # the pairs of a ranked list are of one row
    steps: list[list[int]] = []
    for epoch in range(config.epochs):
        order = loaded.order_of([row for row, _ in train], config.seed, epoch)
        steps += token_batches(
            order, lengths, config.batch_tokens, least=least, most=most, together=lists
        )
    kept = [row for row, _ in heldout]
    if config.early_stop and not kept:
        raise ConfigError(
            "setting early_stop: has no effect without held-out rows; set heldout above 0, or "
            "early_stop to null"
        )
    return StageData(
        [item for _, item in train],
        [item for _, item in heldout],
        kept,
        steps[: config.max_steps],
        bad,
        _notes([row for row, _ in train], kept),
        dict(loaded.files),
    )


def _fitting(
    rows: Sequence[Row], encode: Callable[[Row], T | None], limit: Limit, bad: list[BadRow]
) -> list[tuple[Row, T]]:
    """The rows that fit, encoded; the others are added to `bad`."""
    items = [(row, fit_row(row, encode, limit, bad)) for row in rows]
    return [(row, item) for row, item in items if item is not None]


def _notes(train: Sequence[Row], heldout: Sequence[Row]) -> list[str]:
    """Held-out rows whose last exchange was trained on, after another beginning."""
    found = exchange_overlap(train, heldout)
    if not found:
        return []
    exact = sum(one.how == "exact" for one in found)
    return [
        f"{len(found)} of {len(heldout)} held-out rows repeat the last exchange of a training row "
        f"({exact} exactly, {len(found) - exact} but for case, spaces and character width), the "
        f"first: {found[0].heldout} and {found[0].train}"
    ]


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a stage ended."""

    steps: int
    """Optimizer steps taken."""
    exported: int
    """The step whose weights the model holds now."""
    loss: float | None
    """Held-out loss of that step, where `early_stop` watched it."""

    @property
    def said(self) -> str:
        """One sentence for the card and the log."""
        if self.loss is None:
            return f"Weights of the last step, {self.steps}."
        which = "last" if self.exported == self.steps else "best"
        return (
            f"Weights of step {self.exported} of {self.steps} (the {which}), held-out loss "
            f"{self.loss:.4g}."
        )


def fit(
    run: StageRun,
    part: Trainable[Any],
    num_steps: int,
    config: SupervisedSettings,
    state: dict[str, Any] | None,
    *,
    train: Callable[[int, int], Values],
    evaluate: Callable[[int], Values],
) -> Fitted:
    """The loop of a stage: step, evaluate, log, save; ends at the last step or out of patience.

    A signal that meets a step drops it where it cannot be ended in time; one that meets an
    evaluation drops that, and the step's own numbers wait in the checkpoint for it.

    Args:
        state: of the checkpoint to go on from.
        train: metrics of the step of an index (from 0) with so many `micro_tokens`.
        evaluate: metrics after the step of a number (from 1).

    Raises:
        Interrupted: a signal asked to stop; the state is saved.
    """
    step = state["step"] if state else 0
    best: Best | None = state.get("best") if state else None
    trained: Values | None = state.get("trained") if state else None
    loss: float | None = state.get("loss") if state else None

    def save(number: int, values: Values | None = None, rating: float | None = None) -> None:
        kept = {"step": step, "best": best, "trained": values, "quality": rating, "loss": loss}
        run.save(number, [part], kept, {run.name: step})
        _prune_best(run, best)

    while step < num_steps and not _out_of_patience(best, config):
        try:
            work = partial(fitted, run, [part], step + 1, partial(train, step))
            values = trained or _timed(run, work)
        except StopAsked:
            part.drop_gradients()
            raise run.stopped(step, partial(save, step)) from None
        judged: Values = {}
        try:
            if step + 1 == num_steps or (step + 1) % config.eval_every == 0:
                judged = evaluate(step + 1)
        except StopAsked:
            raise run.stopped(step, partial(save, step + 1, values), within=True) from None
        step, trained = step + 1, None
        if "eval/loss" in judged:
            loss = judged["eval/loss"]
            if config.early_stop:
                best = _noted(best, step, loss, part, run)
        done = step == num_steps or _out_of_patience(best, config)
        run.log(step, values | judged, total=num_steps)
        rating = quality(judged)
        if run.stop_asked() and not done:
            raise run.stopped(step, partial(save, step, None, rating))
        if done or step % config.checkpoint.every == 0:
            save(step, None, rating)
    run.all_saved()
    if config.early_stop is None or best is None:
        return Fitted(step, step, None)
    ended = Fitted(step, step, loss)
    if config.early_stop.export == "best" and best["step"] != step:
        ended = Fitted(step, best["step"], best["loss"])
        _load_best(run, part, best)
    run.event("export", step=step, note=ended.said)
    return ended


def _timed(run: StageRun, step: Callable[[], Values]) -> Values:
    """A step's metrics with its time, its rate, and the memory so far (collective)."""
    began = time.perf_counter()
    values = step()
    seconds = time.perf_counter() - began
    return values | {
        "time/step": seconds,
        "throughput/train_tokens_per_s": values["batch/tokens"] / max(seconds, 1e-9),
        "memory/peak_gb": peak_memory_gb(run.world),
    }


def quality(judged: Mapping[str, float]) -> float | None:
    """What `checkpoint.keep_best` goes by, higher is better: accuracy, else the negative loss."""
    if "eval/loss" not in judged:
        return None
    found = judged.get("eval/accuracy", -judged["eval/loss"])
    return found if math.isfinite(found) else None


def _out_of_patience(best: Best | None, config: SupervisedSettings) -> bool:
    patience = config.early_stop.patience if config.early_stop else None
    return patience is not None and best is not None and best["waited"] >= patience


def _noted(best: Best | None, step: int, loss: float, part: Trainable[Any], run: StageRun) -> Best:
    """The best so far; new best weights are written down (collective under sharding)."""
    if best is not None and not loss < best["loss"]:
        return {**best, "waited": best["waited"] + 1}
    distributed.reshard(part.model)
    tensors = checkpoint.model_tensors(part.model, keep=run.world.is_main)
    found: Best = {"step": step, "loss": loss, "waited": 0}
    if run.world.is_main:
        checkpoint.save(run.path / BEST, step, {part.name: tensors}, dict(found))
    distributed.barrier(run.world)
    return found


def _prune_best(run: StageRun, best: Best | None) -> None:
    """Keep only what the checkpoint just saved speaks of: a resumed run may need no other."""
    if best is None:
        return
    run.written()
    if not run.world.is_main:
        return
    for path in (run.path / BEST).iterdir():
        if path != _best_path(run, best):
            shutil.rmtree(path, ignore_errors=True)


def _best_path(run: StageRun, best: Best) -> Path:
    return run.path / BEST / f"step-{best['step']:06d}"


def _load_best(run: StageRun, part: Trainable[Any], best: Best) -> None:
    """Put the best weights in place.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    found = checkpoint.verify(_best_path(run, best))
    if found is None:
        raise CheckpointError(f"{_best_path(run, best)}: missing or damaged")
    checkpoint.load_model_tensors(part.model, found.tensors(part.name))
