"""Fixtures shared by all tests: where the development data is, the tiny model, own processes.

The import hook checks the shapes of the mathematics in every test.
"""

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from jaxtyping import install_import_hook

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")

_MATHS = [
    "ppomax.masked",
    "ppomax.advantages",
    "ppomax.normalise",
    "ppomax.experience",
    "ppomax.losses",
    "ppomax.models.logprobs",
    "ppomax.rollout.sampling",
]
_hook = install_import_hook(_MATHS, "beartype.beartype")

PRELOADED = ["ppomax.cli", "ppomax.pipeline", "transformers.models.llama.modeling_llama", "peft"]


def pytest_configure(config: pytest.Config) -> None:
    """A CUDA device is for the tests that ask for one (`make gpu`); the others know the CPU's."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real development data, beside the checkout or named by PPOMAX_SHARED_DATA."""
    named = os.environ.get("PPOMAX_SHARED_DATA")
    place = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not place.is_dir():
        pytest.skip(f"development data not found at {place}; set PPOMAX_SHARED_DATA")
    return place


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cache that holds the built-in tiny model and nothing else."""
    from ppomax.models.tiny import build_tiny

    cache = tmp_path_factory.mktemp("cache")
    build_tiny(cache)
    return cache


@pytest.fixture(scope="module")
def tiny(tiny_cache: Path) -> Iterator[str]:
    """The tiny model's folder; `tiny` means it while the module's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPOMAX_CACHE", str(tiny_cache))
        yield str(next(tiny_cache.glob("tiny-*")))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of a few short rows: `sft`, `pairs`, `prompts`, `text`."""
    folder = tmp_path_factory.mktemp("small")
    words = ["tea", "rain", "a duck", "the moon", "old songs", "bread", "salt", "a slow train"]
    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": f"Say {w}.", "completion": f"Here is {w} " * 3} for w in words],
        "pairs": [
            {"prompt": f"Say {w}.", "chosen": f"Gladly: {w}, {w}!", "rejected": f"No {w} today."}
            for w in words
        ],
        "prompts": [
            {"prompt": f"What of {w}?", "lang": ("en", "zh")[i % 2]} for i, w in enumerate(words)
        ],
        "text": [{"text": f"{w} and nothing but {w}. " * 6} for w in words],
    }
    for name, found in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in rows}


def _small(kind: str, out: Path, data: dict[str, str], changes: dict[str, Any] | None) -> Any:
    """Settings of a stage that takes a second on the tiny model, with `changes` laid over."""
    from ppomax.config import merge, parse
    from ppomax.eval.policy_config import EvalConfig
    from ppomax.train.ppo_config import PPOConfig
    from ppomax.train.reward import RewardConfig
    from ppomax.train.sft import SFTConfig

    adam = {"lr": 1e-3, "grad_clip": 0.5}
    shared: dict[str, Any] = {"model": "tiny", "out": str(out), "max_length": 128, "optim": adam}
    own: dict[str, dict[str, Any]] = {
        "sft": {
            "data": data["sft"],
            "heldout": 0.3,
            "batch_tokens": 100,
            "max_steps": 2,
            "log": {"samples": 0},
        },
        "reward": {"data": data["pairs"], "heldout": 0.3, "batch_tokens": 150, "max_steps": 2},
        "ppo": {
            "data": data["prompts"],
            "iterations": 2,
            "rollout_size": 4,
            "minibatch_size": 2,
            "max_prompt": 64,
            "sampling": {"max_new_tokens": 6},
            "critic_pretraining": None,
            "critic_optim": adam,
        },
        "eval": {
            "baseline": "tiny",
            "policy": "tiny",
            "data": data["prompts"],
            "sampling": {"temperature": 1.0, "max_new_tokens": 6},
        },
    }
    kinds: dict[str, Any] = {
        "sft": SFTConfig,
        "reward": RewardConfig,
        "ppo": PPOConfig,
        "eval": EvalConfig,
    }
    base = own[kind] | ({"out": str(out)} if kind == "eval" else shared)
    if (changes or {}).get("advantage", {}).get("estimator", "gae") != "gae":
        del base["critic_optim"]  # estimators without a critic refuse it
    return parse(kinds[kind], merge(base, changes or {}))


@pytest.fixture(scope="session")
def small_reward(
    tiny_cache: Path, small_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """An exported reward model on the tiny backbone."""
    from ppomax.train.reward import train_reward

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPOMAX_CACHE", str(tiny_cache))
        out = tmp_path_factory.mktemp("reward") / "run"
        return str(train_reward(_small("reward", out, small_data, None)) / "export")


SMOKE = [
    "sft.max_steps=1",
    "sft.batch_tokens=400",
    "reward.max_steps=1",
    "reward.batch_tokens=600",
    "ppo.iterations=1",
    "ppo.rollout_size=4",
    "ppo.minibatch_size=4",
    "ppo.critic_pretraining=null",
    "eval.limit=4",
]
"""Overrides that leave of the smoke recipe one step of each stage."""


@dataclass(frozen=True)
class SmokeRun:
    """A finished run of every stage; tests look at it and leave it as it is."""

    out: Path
    err: str
    """What `ppomax run` said."""


@pytest.fixture(scope="session")
def smoke_run(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """`ppomax run smoke` with `SMOKE`, once for all tests."""
    from ppomax import cli

    out, err = tmp_path_factory.mktemp("smoke") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.setenv("PPOMAX_CACHE", str(tiny_cache))
        patch.setenv("GLIBC_TUNABLES", "")
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", ["ppomax", "run", "smoke", f"out={out}", *SMOKE])
        with contextlib.suppress(SystemExit):  # typer leaves by one, also when all is well
            cli.main()
    assert (out / "report.html").exists(), err.getvalue()
    return SmokeRun(out, err.getvalue())


@pytest.fixture(scope="session")
def smoke() -> list[str]:
    """`SMOKE`, for a run of one's own that is the same."""
    return SMOKE


@pytest.fixture
def small(
    tiny: str, small_data: dict[str, str], small_reward: str
) -> Callable[[str, Path, dict[str, Any] | None], Any]:
    """`small(kind, out, changes)`: settings of a short run; PPO is scored by `small_reward`."""

    def settings(kind: str, out: Path, changes: dict[str, Any] | None = None) -> Any:
        changes = dict(changes or {})
        if kind == "ppo" and "callable" not in changes.get("reward", {}):
            changes["reward"] = {"model": small_reward} | changes.get("reward", {})
        return _small(kind, out, small_data, changes)

    return settings


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (-9: killed) and what it wrote to stdout and stderr."""

    code: int
    log: str


Launch = Callable[..., list[Ended]]


@pytest.fixture(scope="session")
def launch(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """`launch(ranks=1, **job)` runs tests/job.py in fresh processes, one per rank.

    They are forked from a server that has imported everything and done nothing.
    """
    context: Any = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        context.set_forkserver_preload(PRELOADED)
        ensure_running()
    logs = tmp_path_factory.mktemp("logs")
    program = str(Path(__file__).with_name("job.py"))

    def run(ranks: int = 1, **job: Any) -> list[Ended]:
        env = {"PPOMAX_CACHE": str(tiny_cache), "GLIBC_TUNABLES": "", **job.pop("env", {})}
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            env |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        count = len(list(logs.iterdir()))
        processes, files = [], []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            files.append(logs / f"{count}-{rank}.txt")
            settings = {**job, "env": env | own, "log": str(files[-1])}
            processes.append(
                context.Process(
                    target=runpy.run_path,
                    args=(program,),
                    kwargs={"init_globals": {"JOB": settings}},
                )
            )
        for process in processes:
            process.start()
        for process in processes:
            process.join(400)  # a busy machine is slow, a hang is for ever
            if process.is_alive():
                process.kill()
                process.join()
        return [
            Ended(process.exitcode, file.read_text(encoding="utf-8"))
            for process, file in zip(processes, files, strict=True)
        ]

    return run
