"""Kills training with SIGKILL at every write of a checkpoint and at random times, and resumes it.

    python benchmarks/crash.py [--points 330] [--seed 0] [--jobs 2] [--part 1/3]

The three stages on the built-in tiny model, and PPO that a signal stops inside an update: killed
while it saves there (`stopped`), or once it was resumed from there (`resumed`). First each runs
undisturbed, with every operation of the checkpoint writer counted (files, fsync, rename, unlink,
rows) and every phase timed. Then one run per point is killed there: before each of the operations,
in the middle of each file of tensors, and at random times within rollout, scoring, update,
evaluation and export. It is resumed in a new process and must end as the undisturbed run did, to
the bit: rows (clock aside), weights, moments, counters, export. Prints a table; exit code 1 where
a single one differs.

Processes are forked from one that has imported everything and computed nothing.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - before the fork

from ppomax import checkpoint, rundir
from ppomax.config import parse
from ppomax.errors import Interrupted
from ppomax.models.tiny import build_tiny
from ppomax.train import ppo, reward, sft
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.reward import RewardConfig
from ppomax.train.sft import SFTConfig
from ppomax.train.trainable import Trainable

STAGES = ("sft", "reward", "ppo")
WAYS = (*STAGES, "stopped", "resumed")
"""How a run is killed; the last two are PPO's."""
SIGNALLED = (4, 8, 18)
"""Optimizer steps in which a signal stops PPO: of the critic's second rollout, of the first and of
the second iteration."""
WORDS = ["tea", "rain", "a duck", "the moon", "old songs", "bread", "salt", "a slow train"]
CLOCK = ("time", "throughput/", "memory/")
PHASES: dict[str, dict[str, tuple[Any, str]]] = {
    "sft": {
        "update": (sft, "train_step"),
        "evaluation": (sft, "evaluate"),
        "export": (sft, "_export"),
    },
    "reward": {
        "update": (reward, "train_step"),
        "evaluation": (reward, "evaluate"),
        "export": (reward, "export"),
    },
    "ppo": {
        "rollout": (ppo, "sample"),
        "scoring": (ppo, "score"),
        "update": (ppo, "update"),
        "export": (ppo, "export"),
    },
}
OPERATIONS: list[tuple[Any, str]] = [
    (checkpoint, "save_file"),
    (checkpoint, "_write"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "mkdir"),
    (os, "unlink"),
    (os, "rmdir"),
    (rundir, "append_jsonl"),
]
"""What a save does to the disk; rows of metrics and events are written around it."""


@dataclass(frozen=True)
class Point:
    """Where a run is killed."""

    stage: str
    kind: str
    """The operation's name, `half a file`, or the phase."""
    number: int
    """Of the operation among all, or of the phase's calls; from 1."""
    delay: float = 0.0
    """Seconds after the phase began."""
    way: str = ""
    """`stopped` or `resumed`; empty where nothing but the kill disturbs the run."""
    signalled: int = 0
    """The optimizer step that a signal meets first."""

    @property
    def is_phase(self) -> bool:
        """Whether a clock decides."""
        return self.kind in PHASES[self.stage]

    @property
    def column(self) -> str:
        """Of the table."""
        return self.way or self.stage


def settings(stage: str, out: Path, root: Path) -> Any:
    """Settings with everything in them that has state; seconds on the tiny model."""
    adam = {"lr": 1e-3, "grad_clip": 0.5, "schedule": "linear"}
    common = {
        "model": "tiny",
        "out": str(out),
        "max_length": 128,
        "optim": adam,
        "threads": 1,
        "checkpoint": {"every": 1, "keep_last": 2},
    }
    supervised = {"heldout": 0.3, "epochs": 2, "max_steps": 4, "eval_every": 2}
    own: dict[str, tuple[Any, dict[str, Any]]] = {
        "sft": (SFTConfig, supervised | {"data": str(root / "sft.jsonl"), "batch_tokens": 100}),
        "reward": (
            RewardConfig,
            supervised | {"data": str(root / "pairs.jsonl"), "batch_tokens": 150},
        ),
        "ppo": (
            PPOConfig,
            {
                "data": str(root / "prompts.jsonl"),
                "iterations": 2,
                "rollout_size": 4,
                "minibatch_size": 2,
                "epochs": 2,
                "max_prompt": 64,
                "sampling": {"max_new_tokens": 6},
                "kl": {"coef": 0.05, "target_per_token": 0.001, "horizon": 20},
                "critic_pretraining": {"max_rollouts": 2, "explained_variance": 1.0},
                "critic_optim": adam,
                "ptx": {"data": str(root / "text.jsonl"), "tokens": 20, "length": 32},
                "reward": {"model": str(root / "reward" / "export")},
                "log": {"samples_every": 1},
            },
        ),
    }
    kind, values = own[stage]
    return parse(kind, common | values)


def write_data(root: Path) -> None:
    """Rows for all stages, and the tiny model in a cache of its own."""
    rows = {
        "sft": [{"prompt": f"Say {w}.", "completion": f"Here is {w} " * 3} for w in WORDS],
        "pairs": [
            {"prompt": f"Say {w}.", "chosen": f"Gladly: {w}, {w}!", "rejected": f"No {w} today."}
            for w in WORDS
        ],
        "prompts": [{"prompt": f"What of {w}?"} for w in WORDS],
        "text": [{"text": f"{w} and nothing but {w}. " * 6} for w in WORDS],
    }
    for name, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (root / f"{name}.jsonl").write_text(text, encoding="utf-8")
    os.environ["PPOMAX_CACHE"] = str(root / "cache")
    forked(lambda: build_tiny(root / "cache"), root / "log.txt").wait()


class Child:
    """A forked process and the file its output goes to."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    def wait(self) -> int:
        """Its exit code; minus the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def forked(work: Callable[[], object], log: Path) -> Child:
    """Do `work` in a process of its own."""
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the parent reads it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def train(stage: str, out: Path, root: Path, *, resume: bool) -> None:
    """The stage by its Python entry."""
    module, name = {
        "sft": (sft, "train_sft"),
        "reward": (reward, "train_reward"),
        "ppo": (ppo, "train_ppo"),
    }[stage]
    getattr(module, name)(settings(stage, out, root), resume=resume)


def wrap(owner: Any, name: str, before: Callable[[str, tuple[Any, ...]], None]) -> None:
    """Call `before` with the name and the arguments, then the function."""
    inner = getattr(owner, name)

    def wrapper(*args: Any, **keywords: Any) -> Any:
        before(name, args)
        return inner(*args, **keywords)

    setattr(owner, name, wrapper)


def undisturbed(stage: str, root: Path) -> None:
    """In a child: run, and leave the operations in order and the phases' seconds."""
    operations: list[str] = []
    seconds: dict[str, list[float]] = {}
    for owner, name in OPERATIONS:
        wrap(owner, name, lambda name, _: operations.append(name))
    for phase, (owner, name) in PHASES[stage].items():
        inner = getattr(owner, name)

        def timed(*args: Any, inner: Any = inner, phase: str = phase, **keywords: Any) -> Any:
            began = time.monotonic()
            result = inner(*args, **keywords)
            seconds.setdefault(phase, []).append(time.monotonic() - began)
            return result

        setattr(owner, name, timed)
    train(stage, root / stage, root, resume=False)
    (root / f"{stage}-points.json").write_text(json.dumps([operations, seconds]))


def die() -> None:
    """The process is gone before the next instruction."""
    os.kill(os.getpid(), signal.SIGKILL)


def signal_at(number: int, then: Callable[[], None] = lambda: None) -> None:
    """SIGTERM in the number-th optimizer step of PPO, followed by `then`."""
    count = 0

    def met(_name: str, _args: tuple[Any, ...]) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGTERM)
            then()

    wrap(Trainable, "step", met)


def stopped(out: Path, root: Path, number: int) -> None:
    """In a child: PPO until it has saved inside the update that the signal met."""
    signal_at(number)
    try:
        train("ppo", out, root, resume=False)
    except Interrupted:
        last = checkpoint.latest(out / "checkpoints")
        assert last is not None
        assert last.state["update"], "the save fell between two updates"
        return
    raise SystemExit("the signal did not stop it")


def stopping(root: Path) -> None:
    """In a child: leave the operations of the saves inside updates, and of the runs after them."""
    found: dict[str, dict[int, list[str]]] = {"stopped": {}, "resumed": {}}
    now: list[str] = []
    for owner, name in OPERATIONS:
        wrap(owner, name, lambda name, _: now.append(name))
    for number in SIGNALLED:
        out = root / f"stopped-{number}"
        step = Trainable.step
        signal_at(number, now.clear)
        with suppress(Interrupted):
            train("ppo", out, root, resume=False)
        found["stopped"][number] = list(now)
        Trainable.step = step  # type: ignore[method-assign]
        now.clear()
        train("ppo", out, root, resume=True)
        found["resumed"][number] = list(now)
    (root / "stopping.json").write_text(json.dumps(found))


def killed(point: Point, out: Path, root: Path) -> None:
    """In a child: run until the point."""
    count = 0
    counting = point.way != "stopped"
    if point.is_phase:
        owner, name = PHASES[point.stage][point.kind]

        def at_phase(_name: str, _args: tuple[Any, ...]) -> None:
            nonlocal count
            count += 1
            if count == point.number:
                threading.Timer(point.delay, die).start()

        wrap(owner, name, at_phase)
    else:

        def at_operation(name: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            count += counting
            if counting and count == point.number:
                if point.kind == "half a file":
                    Path(args[1]).write_bytes(b"half a file" * 100)
                die()

        for owner, name in OPERATIONS:
            wrap(owner, name, at_operation)
    if point.way == "stopped":

        def begin() -> None:
            nonlocal counting
            counting = True

        signal_at(point.signalled, begin)
    train(point.stage, out, root, resume=point.way == "resumed")


def points_at(operations: list[str], stage: str, way: str = "", signalled: int = 0) -> list[Point]:
    """Before every operation, and in the middle of every file of tensors."""
    named = list(enumerate(operations, start=1))
    found = [Point(stage, name, number, 0.0, way, signalled) for number, name in named]
    return found + [
        Point(stage, "half a file", number, 0.0, way, signalled)
        for number, name in named
        if name == "save_file"
    ]


def points_of_stops(root: Path, rng: random.Random) -> list[Point]:
    """Every operation of a save inside an update; of the runs after it a third."""
    written = json.loads((root / "stopping.json").read_text())
    found: list[Point] = []
    for way, by_signal in written.items():
        for number, operations in by_signal.items():
            points = points_at(operations, "ppo", way, int(number))
            found += points if way == "stopped" else rng.sample(points, len(points) // 3)
    return found


def points_of(stage: str, root: Path, rng: random.Random, spare: int) -> list[Point]:
    """Every operation, and `spare` random times spread over the phases."""
    operations, seconds = json.loads((root / f"{stage}-points.json").read_text())
    found = points_at(operations, stage)
    phases = list(PHASES[stage])
    for index in range(spare):
        phase = phases[index % len(phases)]
        number = rng.randrange(len(seconds[phase]))
        found.append(Point(stage, phase, number + 1, rng.uniform(0, seconds[phase][number])))
    return found


def outcome(run: Path) -> dict[str, Any]:
    """All that must come out the same."""
    found: dict[str, Any] = {}
    for name in (rundir.METRICS, rundir.SAMPLES, rundir.EVENTS):
        found[name] = [
            {key: value for key, value in row.items() if not key.startswith(CLOCK)}
            for row in rundir.read_jsonl(run / name)
            if row.get("kind") != "checkpoint"  # the kill may fall between a save and its row
        ]
    last = checkpoint.latest(run / "checkpoints")
    assert last is not None
    found["state"] = last.state
    files = [*last.path.glob("*.safetensors"), run / "export" / "model.safetensors"]
    return found | {file.name: file.read_bytes() for file in files}


def judge(point: Point, out: Path, root: Path, expected: dict[str, Any]) -> str:
    """Kill, resume, compare; what was wrong, or "missed" where the run ended before the point."""
    log = out.with_suffix(".txt")
    if point.way == "resumed":
        code = forked(lambda: stopped(out, root, point.signalled), log).wait()
        if code:
            return f"the signal ended with {code}: {log.read_text()[-2000:]}"
    code = forked(lambda: killed(point, out, root), log).wait()
    if code == 0 and point.is_phase:
        return "missed"
    if code != -signal.SIGKILL:
        return f"ended with {code} before the point: {log.read_text()[-2000:]}"
    code = forked(lambda: train(point.stage, out, root, resume=True), log).wait()
    if code:
        return f"resuming ended with {code}: {log.read_text()[-2000:]}"
    found = outcome(out)
    return ", ".join(key for key in {**expected, **found} if expected.get(key) != found.get(key))


def judge_all(points: list[Point], root: Path, jobs: int) -> dict[Point, str]:
    """Every point's verdict, in `jobs` processes."""
    expected = {stage: outcome(root / stage) for stage in STAGES}
    shares = [points[job::jobs] for job in range(jobs)]

    def work(job: int) -> None:
        with (root / f"verdicts-{job}.jsonl").open("w") as file:
            for number, point in enumerate(shares[job]):
                out = root / f"run-{job}"
                wrong = judge(point, out, root, expected[point.stage])
                file.write(json.dumps([number, wrong]) + "\n")
                file.flush()
                shutil.rmtree(out, ignore_errors=True)

    children = [forked(lambda job=job: work(job), root / f"job-{job}.txt") for job in range(jobs)]
    verdicts: dict[Point, str] = {}
    for job, child in enumerate(children):
        if child.wait():
            raise SystemExit(child.log.read_text())
        for line in (root / f"verdicts-{job}.jsonl").read_text().splitlines():
            number, wrong = json.loads(line)
            verdicts[shares[job][number]] = wrong
    return verdicts


def show(verdicts: dict[Point, str], seconds: float) -> int:
    """The table; returns how many failed."""
    tried: Counter[tuple[str, str]] = Counter()
    good: Counter[tuple[str, str]] = Counter()
    missed = [point for point, wrong in verdicts.items() if wrong == "missed"]
    for point, wrong in verdicts.items():
        if wrong != "missed":
            tried[point.column, point.kind] += 1
            good[point.column, point.kind] += not wrong
            if wrong:
                print(f"FAILED {point}: {wrong}")
    kinds = list(dict.fromkeys(kind for _, kind in tried))
    print("| killed at | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for kind in kinds:
        cells = [
            f"{good[way, kind]} of {tried[way, kind]}" if tried[way, kind] else "" for way in WAYS
        ]
        print(f"| {kind} | " + " | ".join(cells) + " |")
    failed = tried.total() - good.total()
    print(
        f"{tried.total()} kills, {failed} failures, {len(missed)} times past the end; "
        f"{seconds / 60:.1f} minutes"
    )
    return failed


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=330, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--part", default="1/1", help="only these of the kills: 2/3 is every third")
    chosen = parser.parse_args()
    part, parts = (int(number) for number in chosen.part.split("/"))
    began = time.monotonic()
    rng = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root)
        for stage in STAGES:
            child = forked(lambda stage=stage: undisturbed(stage, root), root / "log.txt")
            if child.wait():
                raise SystemExit(child.log.read_text())
        child = forked(lambda: stopping(root), root / "log.txt")
        if child.wait():
            raise SystemExit(child.log.read_text())
        stops = points_of_stops(root, rng)
        written = [point for stage in STAGES for point in points_of(stage, root, rng, 0)]
        spare = max(24, -(-(chosen.points - len(written)) // len(STAGES)) + 8)
        points = [point for stage in STAGES for point in points_of(stage, root, rng, spare)]
        points += stops
        if chosen.points < len(written):
            points = rng.sample(points, chosen.points)
        points = points[part - 1 :: parts]
        return 1 if show(judge_all(points, root, chosen.jobs), time.monotonic() - began) else 0


if __name__ == "__main__":
    sys.exit(main())
