"""Going on with a run: which settings may differ, and what of the machine changes the last bits."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from ppomax import rundir
from ppomax.config import Settings, dump, parse, read_yaml
from ppomax.distributed import World
from ppomax.errors import CheckpointError
from ppomax.models import kernels as training
from ppomax.models.compiled import library
from ppomax.models.products import tiles_for
from ppomax.rollout import EngineSettings
from ppomax.rollout import kernels as decoding
from ppomax.train.settings import StageSettings

HARMLESS = (
    "micro_tokens",
    "threads",
    "gradient_checkpointing",
    "checkpoint",
    "log",
    "engine.slots",
    "engine.cuda_graphs",
    "engine.kernels",
    "licence",
)
"""Settings of a stage that may change when it is resumed: what is learned stays the same, up to
rounding. Everything else is another run (`monitor` too: it can stop or roll back)."""


def changed_keys(before: Settings, now: Settings) -> list[str]:
    """Paths of the settings in which the two differ."""
    one, other = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    return sorted(key for key in {**one, **other} if one.get(key) != other.get(key))


def harmful(keys: list[str], *, prefixes: tuple[str, ...] = ()) -> list[str]:
    """Those of the keys with which a run cannot be resumed.

    Args:
        prefixes: names of stages that may stand before a setting's own path.
    """
    return [key for key in keys if not _is_harmless(key, prefixes)]


def _is_harmless(key: str, prefixes: tuple[str, ...]) -> bool:
    first, _, rest = key.partition(".")
    own = rest if first in prefixes else key
    return any(own == name or own.startswith(name + ".") for name in HARMLESS)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def environment(config: StageSettings, world: World) -> dict[str, str | int]:
    """What decides the last bits of a result beside settings and data; a checkpoint holds it."""
    engine: EngineSettings | None = getattr(config, "engine", None)  # of stages that write replies
    cpu = world.device.type == "cpu"
    return {
        "torch": torch.__version__,
        "device": world.device.type,
        "processor": _processor(world),
        "decoding": _built(decoding.SOURCE, cpu and engine is not None and engine.kernels),
        "training": _built(training.SOURCE, cpu),
        "products": "tiles" if cpu and tiles_for(torch.float32) is not None else "plain",
        "dtype": config.dtype,
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "micro_tokens": config.micro_tokens,
    }


def _built(source: Path, used: bool) -> str:
    return "compiled" if used and not isinstance(library(source), str) else "plain"


def _processor(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return torch.backends.cpu.get_cpu_capability()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, in what the two environments differ."""
    if before:
        before = {"training": "plain", "products": "plain", **before}  # of older checkpoints
    return [
        f"{before[name]} {name} before, {value} now"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def open_directory(
    path: Path, config: StageSettings, world: World, *, resume: bool
) -> IO[str] | None:
    """Make a run directory, or check the one there; for rank 0. Returns its lock, to be kept.

    Raises:
        CheckpointError: it holds a run with other settings, or another process writes it.
    """
    text = dump(config)
    place = path / rundir.CONFIG
    if not resume or not place.exists():
        rundir.create(path, text)
        lock = rundir.lock(path)
    else:
        changed = changed_keys(parse(type(config), read_yaml(place)), config)
        if harmful(changed):
            raise CheckpointError(
                f"{path}: its config.yaml differs from this run's in "
                f"{', '.join(harmful(changed))}; resume needs the same, or give another out"
            )
        lock = rundir.lock(path)
        if changed:
            rundir.write_text(place, text)
    for leftover in path.glob(".export-*"):  # of an export that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    rundir.write_environment(
        path,
        {
            "device": str(world.device),
            "world_size": world.size,
            "seed": config.seed,
            "dtype": config.dtype,
            "threads": torch.get_num_threads(),
        },
    )
    return lock
