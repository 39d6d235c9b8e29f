"""What the three stages share: the run's files, checkpoints, signals, micro-batches over ranks."""

import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax import checkpoint, distributed, rundir
from ppomax.config import dump, parse, read_yaml
from ppomax.data.formats import BadRow, count_kinds
from ppomax.distributed import World, agree, barrier, gather
from ppomax.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from ppomax.metrics import as_row
from ppomax.monitors import check_keys
from ppomax.train.optim import OptimSettings, build_optimizer, learning_rate, set_learning_rate
from ppomax.train.progress import Progress
from ppomax.train.settings import StageSettings
from ppomax.train.trackers import Tracker, open_trackers

DONE = "done.json"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a run to stop with its state saved."""

M = TypeVar("M", bound=nn.Module)


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, `handler` gets `SIGNALS`; the handlers before it are restored at the end."""
    try:
        before = {number: signal.signal(number, handler) for number in SIGNALS}
    except ValueError:  # not the main thread: signals are the caller's
        yield
        return
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Trainable(Generic[M]):
    """A model, its optimizer and its schedule: what a step needs and a checkpoint holds."""

    def __init__(
        self, name: str, model: M, settings: OptimSettings, total_steps: int, world: World
    ) -> None:
        self.name, self.model, self.settings, self.world = name, model, settings, world
        self.total_steps, self.step_count = total_steps, 0
        self.lr_factor = 1.0
        """What rollbacks have made of the schedule."""
        self.optimizer = build_optimizer(model, settings)
        self.scale = distributed.loss_scale(model, world)

    @property
    def lr(self) -> float:
        """Rate of the next step."""
        rate = learning_rate(self.settings, self.step_count, max(1, self.total_steps))
        return rate * self.lr_factor

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; losses are sums over a denominator of the whole batch."""
        (loss * self.scale).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def step(self) -> tuple[float, bool]:
        """Clip and update; returns the norm before the clip and whether the step was taken.

        A non-finite gradient reaches neither a parameter nor a moment.
        """
        distributed.sum_gradients(self.model, self.world)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = distributed.clip_gradients(parameters, self.settings.grad_clip)
        taken = math.isfinite(norm)
        if taken:
            set_learning_rate(self.optimizer, self.lr)
            self.optimizer.step()
            self.step_count += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm, taken

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Checkpoint groups: weights and optimizer state."""
        distributed.reshard(self.model)
        return {
            self.name: checkpoint.model_tensors(self.model),
            f"{self.name}_optimizer": checkpoint.optimizer_tensors(self.model, self.optimizer),
        }

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Put a checkpoint's weights and optimizer state in place."""
        checkpoint.load_model_tensors(self.model, found.tensors(self.name))
        tensors = found.tensors(f"{self.name}_optimizer")
        checkpoint.load_optimizer_tensors(self.model, self.optimizer, tensors)
        self.step_count = found.state[f"{self.name}_steps"]
        self.lr_factor = found.state[f"{self.name}_lr_factor"]


class StageRun:
    """One stage's run directory, while it trains. Files are rank 0's; every rank calls alike."""

    def __init__(self, name: str, config: StageSettings, world: World, *, resume: bool) -> None:
        self.name, self.config, self.world = name, config, world
        self.stage = name
        """Whose steps are counted in the rows written now (`critic` before `ppo`)."""
        self.path = Path(config.out)
        self.attempt = 0
        self.started = time.monotonic()
        self.skipped_in_a_row: dict[str, int] = {}
        """By model: a step taken by one says nothing of the other."""
        self._stop_signal: int | None = None
        self.found: checkpoint.Checkpoint | None = None
        if world.is_main:
            self._open(resume)
        barrier(world)
        if resume:
            self.found = checkpoint.latest(self.path / "checkpoints")
        self.trackers: list[Tracker] = (
            open_trackers(config.log.to, name, self.path) if world.is_main else []
        )
        self.progress = Progress(name, enabled=world.is_main)
        if config.dtype == "bfloat16" and not distributed.bfloat16_is_fast(world.device.type):
            self.progress.say(
                "dtype bfloat16: this processor has no units for it and emulates them, several "
                "times slower than float32; dtype: auto chooses for each machine"
            )

    def _open(self, resume: bool) -> None:
        text = dump(self.config)
        for leftover in self.path.glob(".export-*"):  # of an export that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        if not resume or not (self.path / rundir.CONFIG).exists():
            rundir.create(self.path, text)
        elif parse(type(self.config), read_yaml(self.path / rundir.CONFIG)) != self.config:
            raise CheckpointError(
                f"{self.path}: its config.yaml differs from this run's; resume needs the same"
            )
        rundir.write_environment(
            self.path,
            {
                "device": str(self.world.device),
                "world_size": self.world.size,
                "seed": self.config.seed,
                "dtype": self.config.dtype,
                "threads": torch.get_num_threads(),
            },
        )

    def restore(self, parts: Sequence[Trainable[Any]]) -> dict[str, Any] | None:
        """Put the newest verified checkpoint in place; its state, or None where there is none."""
        if self.found is None:
            if self.world.is_main:
                for name in rundir.LOGS:
                    rundir.cut_back(self.path / name, {})
            return None
        state = self.found.state
        if state["threads"] != torch.get_num_threads():
            self.event(
                "resume",
                step=0,
                note=f"{state['threads']} threads before, {torch.get_num_threads()} now: "
                "results will differ in the last bits",
            )
        for part in parts:
            part.restore(self.found)
        self.attempt = state["attempt"]
        if self.world.is_main:
            for name in rundir.LOGS:
                rundir.cut_back(self.path / name, state["progress"], self.attempt)
        barrier(self.world)
        return state

    def save(
        self,
        step: int,
        parts: Sequence[Trainable[Any]],
        state: dict[str, Any],
        progress: Mapping[str, int],
        more: Mapping[str, Mapping[str, Tensor]] | None = None,
        keep: Sequence[int] = (),
    ) -> None:
        """Write a checkpoint (collective: sharded tensors are gathered).

        Args:
            step: number in the directory's name.
            progress: last logged step of each stage name; rows past it are cut on resume.
            more: further groups of tensors.
            keep: numbers of checkpoints that stay beside the newest.
        """
        groups: dict[str, Mapping[str, Tensor]] = dict(more or {})
        for part in parts:
            groups |= part.tensors()
        state = {
            **state,
            "attempt": self.attempt,
            "threads": torch.get_num_threads(),
            "progress": dict(progress),
            **{f"{part.name}_steps": part.step_count for part in parts},
            **{f"{part.name}_lr_factor": part.lr_factor for part in parts},
        }
        if self.world.is_main:
            root = self.path / "checkpoints"
            checkpoint.save(root, step, groups, state)
            checkpoint.prune(root, self.config.checkpoint.keep_last, keep)
            where = {"number": step}  # counts critic rollouts too; the row's step is its stage's
            row = self._event_row("checkpoint", progress[self.stage], where)
            rundir.append_jsonl(self.path / rundir.EVENTS, [row])
        barrier(self.world)

    def log(self, step: int, values: Mapping[str, float], *, total: int) -> None:
        """One row of metrics.jsonl, checked against the declarations; rank 0 writes."""
        check_keys(self.stage, values)
        if not self.world.is_main:
            return
        seconds = time.monotonic() - self.started
        rundir.append_jsonl(
            self.path / rundir.METRICS, [as_row(self.stage, step, self.attempt, seconds, values)]
        )
        self.progress.show(self.stage, step, total, values)
        for tracker in self.trackers:
            tracker.log(self.stage, step, values)

    def event(self, kind: str, *, step: int, **fields: object) -> None:
        """One row of events.jsonl, and a line on the terminal."""
        text = ", ".join(f"{key} {value}" for key, value in fields.items())
        self.record(kind, text, step=step, **fields)

    def record(self, kind: str, text: str, *, step: int, **fields: object) -> None:
        """An event whose line on the terminal is the text: its fields are too long for one."""
        if self.world.is_main:
            row = self._event_row(kind, step, fields)
            rundir.append_jsonl(self.path / rundir.EVENTS, [row])
            self.progress.say(f"{kind}: {text}")

    def set_aside(self, bad: Sequence[BadRow], notes: Sequence[str] = ()) -> None:
        """Rows of the data that are not used and what else there is to know of it.

        One event each; on the terminal the rows' counts by kind and the first of them.
        """
        for note in notes:
            self.event("data_warning", step=0, note=note)
        if self.world.is_main and bad:
            found = [
                self._event_row(
                    "quarantined_row",
                    0,
                    {"where": row.where, "defect": row.kind, "reason": row.reason},
                )
                for row in bad
            ]
            rundir.append_jsonl(self.path / rundir.EVENTS, found)
            self.progress.say(
                f"set aside {len(bad)} rows ({count_kinds(bad)}), see events.jsonl; the first: "
                f"{bad[0].where} ({bad[0].reason})"
            )

    def _event_row(self, kind: str, step: int, fields: Mapping[str, object]) -> dict[str, Any]:
        seconds = round(time.monotonic() - self.started, 3)
        row = {"stage": self.stage, "step": step, "attempt": self.attempt, "time": seconds}
        return {**row, "kind": kind, **fields}

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Rows of samples.jsonl."""
        if self.world.is_main and rows:
            rundir.append_jsonl(self.path / rundir.SAMPLES, rows)

    def step_taken(self, name: str, taken: bool, step: int, batch: object) -> None:
        """Count a model's skipped steps; three in a row stop the run.

        Raises:
            TrainingError: three of its optimizer steps in a row were non-finite.
        """
        if taken:
            self.skipped_in_a_row[name] = 0
            return
        self.skipped_in_a_row[name] = self.skipped_in_a_row.get(name, 0) + 1
        self.event(
            "skipped_step",
            step=step,
            model=name,
            reason="non-finite gradient",
            batch=batch,
        )
        if self.skipped_in_a_row[name] >= 3:
            raise TrainingError(
                f"{self.path}: three optimizer steps of the {name} in a row were not finite; the "
                "last checkpoint is good. Lower the learning rate or look at the batch in "
                "events.jsonl"
            )

    def stop_asked(self) -> bool:
        """Whether a signal asked any rank to stop."""
        return agree(self._stop_signal is not None, self.world)

    def interrupt(self) -> Interrupted:
        """The exception to raise once the state is saved."""
        return Interrupted(
            f"stopped at a signal, state saved; go on with `ppomax resume {self.path}`"
        )

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Note `SIGNALS` instead of dying; a second one ends at once."""

        def note(number: int, _frame: FrameType | None) -> None:
            if self._stop_signal is not None:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._stop_signal = number

        with handling(note):
            yield

    def finish(self) -> Path:
        """Mark the stage done.

        Raises:
            Interrupted: a signal came after the last step; what follows the stage is left.
        """
        if self.world.is_main:
            rundir.write_text(self.path / DONE, "{}\n")
            for tracker in self.trackers:
                tracker.close()
        self.progress.close()
        barrier(self.world)
        if self.stop_asked():
            raise self.interrupt()
        return self.path


def is_done(path: Path) -> bool:
    """Whether a stage's directory holds a finished run."""
    return (path / DONE).exists()


def rank_micro_batches(plan: Sequence[list[int]], world: World) -> list[tuple[list[int], float]]:
    """This rank's micro-batches with their weight in the loss.

    Every rank runs the same number of forwards (collectives would hang otherwise): where the plan
    does not divide, the shortest micro-batch is run again with weight 0.
    """
    filler = [(plan[-1], 0.0)] * (-len(plan) % world.size)
    return world.share([(batch, 1.0) for batch in plan] + filler)


def autocast(world: World, dtype: torch.dtype) -> AbstractContextManager[object]:
    """bf16 matrix products on fp32 weights; nothing in fp32."""
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def peak_memory_gb(world: World) -> float:
    """Largest memory so far, of all ranks: device memory on CUDA, resident memory elsewhere."""
    if world.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(world.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(gather(used, world)) / 1e9


def check_positions(config: StageSettings, model: PreTrainedModel) -> None:
    """A sequence of `max_length` tokens must fit the model.

    Raises:
        ConfigError: it does not.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise ConfigError(
            f"setting max_length: {config.max_length} is more than the {positions} positions of "
            f"{config.model}"
        )
