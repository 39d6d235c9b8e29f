"""What the three stages share: the run's files, checkpoints, signals."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from ppomax import checkpoint, distributed, rundir
from ppomax.data.formats import BadRow, count_kinds
from ppomax.distributed import World, agree, all_max, barrier
from ppomax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    ModelError,
    TrainingError,
)
from ppomax.metrics import as_row
from ppomax.models import kernels, products
from ppomax.models.compiled import library
from ppomax.monitors import check_keys
from ppomax.train.crowding import Crowding
from ppomax.train.disk import refusals_told
from ppomax.train.progress import Progress, number
from ppomax.train.resuming import differences, environment, open_directory
from ppomax.train.settings import StageSettings
from ppomax.train.stopping import StopAsked, Stopper
from ppomax.train.trackers import Tracker, open_trackers
from ppomax.train.trainable import Trainable as Trainable

DONE = "done.json"
SAVE_RATE = 200e6
"""Bytes per second that a checkpoint is guessed to be written at, until one was."""

T = TypeVar("T")


class StageRun:
    """One stage's run directory, while it trains. Files are rank 0's; every rank calls alike."""

    def __init__(self, name: str, config: StageSettings, world: World, *, resume: bool) -> None:
        self.name, self.config, self.world = name, config, world
        self.stage = name
        """Whose steps are counted in the rows written now (`critic` before `ppo`)."""
        self.path = Path(config.out)
        self.attempt, self.started = 0, time.monotonic()
        self.skipped_in_a_row: dict[str, int] = {}
        """By model: a step taken by one says nothing of the other."""
        self.stopper = Stopper()
        self.micro_tokens = config.micro_tokens
        """The setting, or what was left of it where memory did not suffice."""
        self.saved_at: int | None = None
        """Steps (critic rollouts counted) whose state is in the last checkpoint."""
        self.save_seconds = 0.0
        """How long a save takes: the last one's time, a guess before the first."""
        self._writer = checkpoint.Writer() if config.checkpoint.asynchronous else None
        self.found: checkpoint.Checkpoint | None = None
        self._damaged: list[Path] = []
        """Checkpoints newer than that one."""
        self._lock: IO[str] | None = None
        """Held open: this process alone writes the run."""
        if world.is_main:
            self._lock = open_directory(self.path, config, world, resume=resume)
        barrier(world)
        if resume:
            self.found = checkpoint.latest(self.path / "checkpoints")
            self._damaged = checkpoint.damaged(self.path / "checkpoints", self.found)
        if self._damaged and self.found is None:
            raise CheckpointError(
                f"{self.path}: none of its {len(self._damaged)} checkpoints is whole; nothing was "
                "changed. Bring them back from a copy, or remove the folder checkpoints to begin "
                "again"
            )
        self.trackers: list[Tracker] = (
            open_trackers(config.log.to, name, self.path) if world.is_main else []
        )
        self.progress = Progress(name, enabled=world.is_main)
        self.crowding = Crowding(world)
        if config.dtype == "bfloat16" and not distributed.bfloat16_is_fast(world.device.type):
            self.progress.say(
                "dtype bfloat16: this processor has no units for it and emulates them, several "
                "times slower than float32; dtype: auto chooses for each machine"
            )
        sources = (kernels.SOURCE, products.SOURCE) if world.device.type == "cpu" else ()
        missing = next((why for why in map(library, sources) if isinstance(why, str)), None)
        if missing is not None:
            self.progress.say(f"training with PyTorch's operations, more slowly: {missing}")

    def restore(self, parts: Sequence[Trainable[Any]]) -> dict[str, Any] | None:
        """Put the newest verified checkpoint in place; its state, or None where there is none.

        Raises:
            CheckpointError: the disk has no room for the checkpoints to come.
        """
        self.stopper.nothing_to_save = False
        size = sum(part.checkpoint_bytes for part in parts)
        self.save_seconds = size / SAVE_RATE
        if self.world.is_main:
            kept = self.config.checkpoint
            copies = kept.keep_last + (kept.keep_best or 0) + 1
            checkpoint.check_room(self.path / "checkpoints", size, copies)
        if self.found is None:
            if self.world.is_main:
                for name in rundir.LOGS:
                    rundir.cut_back(self.path / name, {})
            return None
        state = self.found.state
        other = differences(state["environment"], environment(self.config, self.world))
        if other:
            note = f"{'; '.join(other)}: results will differ in the last bits"
            self.event("resume", step=0, note=note)
        for part in parts:
            part.restore(self.found)
        self.attempt = state["attempt"]
        self.skipped_in_a_row = dict(state["skipped_in_a_row"])
        self.saved_at = sum(state["progress"].values())
        if self.world.is_main:
            for name in rundir.LOGS:
                rundir.cut_back(self.path / name, state["progress"], self.attempt)
        for path in self._damaged:
            note = f"{path.name} is not whole; going on from {self.found.path.name}"
            self.event("damaged_checkpoint", step=0, note=note)
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
        began = time.monotonic()
        groups: dict[str, Mapping[str, Tensor]] = dict(more or {})
        for part in parts:
            groups |= part.tensors()
        state = {
            **state,
            "attempt": self.attempt,
            "environment": environment(self.config, self.world),
            "progress": dict(progress),
            "skipped_in_a_row": dict(self.skipped_in_a_row),  # written while training goes on
            **{key: value for part in parts for key, value in part.state().items()},
        }
        if self.world.is_main:
            where = {"number": step}  # counts critic rollouts too; the row's step is its stage's
            row = self._event_row("checkpoint", progress[self.stage], where)
            if self._writer is None:
                self._write(step, groups, state, row, keep)
            else:
                self._writer.wait()
                copied = {  # training changes the tensors while they are written
                    name: {key: value.clone() for key, value in tensors.items()}
                    for name, tensors in groups.items()
                }
                self._writer.start(lambda: self._write(step, copied, state, row, keep))
        barrier(self.world)
        self.saved_at = sum(progress.values())
        self.save_seconds = time.monotonic() - began

    def _write(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: dict[str, Any],
        row: dict[str, Any],
        keep: Sequence[int],
    ) -> None:
        """On rank 0: rows first, so that a checkpoint never knows of steps the rows do not."""
        for name in rundir.LOGS:
            rundir.sync(self.path / name)
        root, kept = self.path / "checkpoints", self.config.checkpoint
        checkpoint.save(root, step, groups, state)
        checkpoint.prune(root, kept.keep_last, kept.keep_best or 0, keep)
        rundir.append_jsonl(self.path / rundir.EVENTS, [row])

    def written(self) -> None:
        """Until every checkpoint is on the disk (collective); raises what its write raised."""
        if self._writer is not None:
            self._writer.wait()
        barrier(self.world)

    def log(self, step: int, values: Mapping[str, float], *, total: int) -> None:
        """One row of metrics.jsonl, checked against the declarations; rank 0 writes.

        What is not finite (of a step that was skipped) is no number and is left out.
        """
        check_keys(self.stage, values)
        if not self.world.is_main:
            return
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        seconds = time.monotonic() - self.started
        rundir.append_jsonl(
            self.path / rundir.METRICS, [as_row(self.stage, step, self.attempt, seconds, values)]
        )
        self.progress.show(self.stage, step, total, values)
        crowded = self.crowding.note()
        if crowded is not None:
            self.event("crowded", step=step, note=crowded)
        for tracker in self.trackers:
            tracker.log(self.stage, step, values)

    def event(self, kind: str, *, step: int, **fields: object) -> None:
        """One row of events.jsonl, and a line on the terminal."""
        text = ", ".join(f"{key} {_shown(value)}" for key, value in fields.items())
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

    def step_taken(
        self,
        name: str,
        taken: bool,
        step: int,
        batch: object,
        *,
        reason: str = "non-finite gradient",
        contents: Callable[[], object] | None = None,
    ) -> None:
        """Count a model's skipped steps; three in a row that were not finite stop the run.

        Args:
            reason: `why_skipped` of the model.
            batch: what names the batch, for events.jsonl.
            contents: all of it, for the file that is left when the run stops.

        Raises:
            TrainingError: three of its optimizer steps in a row were non-finite.
        """
        if taken:
            self.skipped_in_a_row[name] = 0
            return
        self.event("skipped_step", step=step, model=name, reason=reason, batch=batch)
        if not reason.startswith("non-finite"):
            return
        self.skipped_in_a_row[name] = self.skipped_in_a_row.get(name, 0) + 1
        if self.skipped_in_a_row[name] >= 3:
            place = self.keep_batch(name, step, contents() if contents else batch)
            raise TrainingError(
                f"{self.path}: three optimizer steps of the {name} in a row were not finite "
                f"({reason}); what checkpoints there are, are good. Lower the learning rate or "
                f"look at the batch in {place}"
            )

    def keep_batch(self, name: str, step: int, contents: object) -> Path:
        """Leave a batch that could not be learned from as JSON; returns where."""
        place = self.path / f"bad-batch-{name}-{step:06d}.json"
        if self.world.is_main:
            rundir.write_text(place, json.dumps(contents, ensure_ascii=False) + "\n")
        return place

    # --- signals ------------------------------------------------------------------------------

    def stop_asked(self) -> bool:
        """Whether a signal asked any rank to stop (collective)."""
        return agree(self.stopper.asked, self.world)

    def fits(self, seconds: float) -> bool:
        """Whether so much work ends before `grace_s` is over, on every rank (collective)."""
        needed = all_max({"needed": self.stopper.waited + seconds}, self.world)["needed"]
        return needed <= self.config.checkpoint.grace_s

    def watched(self, items: Sequence[T]) -> Iterator[T]:
        """A step's micro-batches, as long as after a signal they can be ended and saved in time.

        Raises:
            StopAsked: they cannot, on any rank; the step is to be dropped.
        """
        began = time.monotonic()
        for done, item in enumerate(items):
            if done and self.stop_asked():
                each = (time.monotonic() - began) / done
                if not self.fits(each * (len(items) - done) + self.save_seconds):
                    raise StopAsked
            yield item

    def until_asked(self, items: Sequence[T]) -> Iterator[T]:
        """Micro-batches of which nothing is kept: as long as no rank is asked to stop.

        Raises:
            StopAsked: one is.
        """
        for item in items:
            if self.stop_asked():
                raise StopAsked
            yield item

    def stopped(self, step: int, save: Callable[[], None], *, within: bool = False) -> Interrupted:
        """Save the state of `step` where that ends in time; the exception to raise then.

        A checkpoint that would not be finished when the process is killed helps nobody.

        Args:
            within: there is more to save than what stands at the end of the step.
        """
        if self.saved_at == step and not within:
            return self.interrupt()
        if self.fits(self.save_seconds):
            save()
            return self.interrupt()
        last = "its beginning" if self.saved_at is None else f"step {self.saved_at}"
        again = step - (self.saved_at or 0)
        return Interrupted(
            f"stopped at a signal; the step in hand took {self.stopper.waited:.0f} s after it and "
            f"a save takes about {self.save_seconds:.0f} s, more than checkpoint.grace_s "
            f"{self.config.checkpoint.grace_s:g} together, so `ppomax resume {self.path}` goes on "
            f"from {last} and does {again} steps again"
        )

    def all_saved(self) -> None:
        """Say that only exports remain: from here on a signal ends one process at once.

        Raises:
            StopAsked: one came before.
        """
        if self.world.size == 1:
            self.stopper.nothing_to_save = True
            if self.stopper.asked:
                raise StopAsked

    def interrupt(self) -> Interrupted:
        """The exception to raise once the state is saved."""
        if self._writer is not None:
            self._writer.wait()
        how = rundir.how_to_go_on(self.path)
        return Interrupted(f"stopped at a signal, state saved; go on with {how}")

    def finish(self) -> Path:
        """Mark the stage done.

        Raises:
            Interrupted: a signal came after the last step; what follows the stage is left.
        """
        if self._writer is not None:
            self._writer.wait()
        if self.world.is_main:
            rundir.write_text(self.path / DONE, "{}\n")
            for tracker in self.trackers:
                tracker.close()
        self.progress.close()
        barrier(self.world)
        if self.stop_asked():
            raise self.interrupt()
        return self.path

    def release(self) -> None:
        """Let another process, or another run of this one, write here."""
        if self._lock is not None:
            self._lock.close()


@contextmanager
def opened(name: str, config: StageSettings, *, resume: bool) -> Iterator[StageRun]:
    """A stage's run inside its process group, with threads, determinism and signals set up."""
    with (
        distributed.world(config.device) as here,
        distributed.deterministic(config.deterministic),
        refusals_told(Path(config.out)),
    ):
        if config.threads:
            torch.set_num_threads(config.threads)
        run = StageRun(name, config, here, resume=resume)
        run.stopper.nothing_to_save = here.size == 1  # while models load; ranks stop together
        try:
            with run.stopper.noting():
                yield run
        except StopAsked:
            raise run.interrupt() from None
        except (ConfigError, DataError, ModelError):
            if here.is_main:
                rundir.forget(run.path)  # the right settings are to find the place free
            raise
        finally:
            run.release()


def is_done(path: Path) -> bool:
    """Whether a stage's directory holds a finished run."""
    return (path / DONE).exists()


def _shown(value: object) -> object:
    """A field of an event as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else value


def check_positions(config: StageSettings, positions: int | None) -> None:
    """A sequence of `max_length` tokens must fit the model.

    Raises:
        ConfigError: it does not.
    """
    if positions is not None and config.max_length > positions:
        raise ConfigError(
            f"setting max_length: {config.max_length} is more than the {positions} positions of "
            f"{config.model}; set it to {positions} or less"
        )
