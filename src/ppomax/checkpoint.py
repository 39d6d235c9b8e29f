"""Checkpoints: safetensors and JSON in a directory that appears whole or not at all.

Layout: `checkpoints/step-000100/{policy.safetensors, ..., state.json, manifest.json}`. The manifest
holds the SHA-256 of every other file and is written last; then the temporary directory is renamed.
The latest checkpoint is the newest directory whose manifest verifies.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppomax.distributed import copy_full, full
from ppomax.errors import CheckpointError
from ppomax.process import open_as_umask_says

MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of one group, in memory of their own (adopted memory would change alignment)."""
        try:
            loaded = load_file(self.path / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path}: {name}.safetensors cannot be read ({error})"
            ) from None
        return {key: value.clone() for key, value in loaded.items()}

    def count(self, prefix: str) -> int:
        """Groups whose name begins so."""
        return len(list(self.path.glob(f"{prefix}*.safetensors")))


def save(
    root: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]
) -> Path:
    """Write one checkpoint atomically and durably.

    Args:
        groups: file name (without suffix) to named tensors, whole and on any device.
        state: JSON-ready counters and small state.

    Raises:
        CheckpointError: the disk refuses; earlier checkpoints are untouched.
    """
    final = path_of(root, step)
    temporary = root / f".{final.name}.part"
    try:
        if not root.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            _sync(root.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        _check_space(root, groups)
        temporary.mkdir()
        for name, tensors in groups.items():
            ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(ready, temporary / f"{name}.safetensors")
        open_as_umask_says(temporary)
        _write(temporary / STATE, json.dumps(state))
        manifest = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        for path in temporary.iterdir():
            _sync(path)
        _write(temporary / MANIFEST, _manifest(step, manifest))
        _sync(temporary)
        _put(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = latest(root)
        safe = f"the last good one is {last.path}" if last else "no checkpoint exists yet"
        raise CheckpointError(
            f"{final}: checkpoint not written ({error}); {safe}. Once the disk takes it, go on "
            f"with `ppomax resume {root.parent}`"
        ) from error
    return final


def verify(path: Path) -> Checkpoint | None:
    """The checkpoint at `path` if every file is there and has its recorded digest."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        whole = json.loads(text)
        # the manifest has no digest of its own: it must be what `save` writes, to the byte
        if text != _manifest(whole["step"], whole["files"]) or path_of(
            path.parent, whole["step"]
        ).name != path.name.removesuffix(".old"):
            return None
        manifest = dict(whole["files"])  # a list of names is none
        found = {item.name for item in path.iterdir()} - {MANIFEST}
        names = {name for name in found if not name.startswith(".")}  # a file browser's
        if names != set(manifest):
            return None
        if any(_digest(path / name) != digest for name, digest in manifest.items()):
            return None
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Checkpoint(path, state)


def latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint under `root` that verifies."""
    for path in _newest_first(root):
        found = verify(path)
        if found is not None:
            return found
    return None


def damaged(root: Path, found: Checkpoint | None) -> list[Path]:
    """The checkpoints newer than the one found, newest first: they did not verify."""
    paths = [path for path in _newest_first(root) if path.is_dir()]
    return list(takewhile(lambda path: found is None or path != found.path, paths))


def path_of(root: Path, step: int) -> Path:
    """Where the checkpoint of this number lies."""
    return root / f"step-{step:06d}"


def prune(root: Path, keep_last: int, keep_best: int = 0, keep: Collection[int] = ()) -> None:
    """Remove all but the newest `keep_last` checkpoints and those numbered in `keep`.

    The last that verifies always stays.

    Args:
        keep_best: so many of the others stay too: those whose state has the highest `quality`.
    """
    good, kept = latest(root), {path_of(root, step) for step in keep}
    older = [path for path in _newest_first(root)[max(1, keep_last) :] if path not in kept]
    rated = [(found, path) for path in older if (found := _quality(path)) is not None]
    rated.sort(key=lambda pair: pair[0], reverse=True)  # stable: of equals the newer comes first
    best = {path for _, path in rated[:keep_best]}
    for path in older:
        if path not in best and (good is None or path != good.path):
            shutil.rmtree(path, ignore_errors=True)


def drop_after(root: Path, step: int) -> None:
    """Remove the checkpoints of larger numbers: their stretch of the run was abandoned."""
    for path in _newest_first(root):
        if path.name.removesuffix(".old") > path_of(root, step).name:
            shutil.rmtree(path, ignore_errors=True)


def _quality(path: Path) -> float | None:
    """The number a checkpoint is judged by, where its stage wrote one."""
    try:
        found = json.loads((path / STATE).read_text(encoding="utf-8")).get("quality")
    except (OSError, ValueError, AttributeError):
        return None
    return float(found) if isinstance(found, int | float) else None


class Writer:
    """Does writes in a thread of its own, one after the other, so that training goes on.

    An error of a write is raised by the next call: nothing fails in silence.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin a write once the one before is done."""
        self.wait()
        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Until the last write is done; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def check_room(root: Path, size: int, copies: int) -> None:
    """See before the first step that `copies` checkpoints of `size` bytes will fit.

    Raises:
        CheckpointError: they will not.
    """
    held = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    place = next(path for path in (root, *root.parents) if path.exists())
    free, need = shutil.disk_usage(place).free, size * copies
    if free + held < need:
        raise CheckpointError(
            f"{root}: {copies} checkpoints of {_size(size)} each are to be held (the one "
            f"being written counts), {_size(free + held)} are free; free some, lower "
            "checkpoint.keep_last or give another out"
        )


def model_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Trainable parameters by name, whole, on the CPU (collective under sharding).

    Args:
        keep: off, this rank takes part and holds nothing: one whole tensor at a time at most.
    """
    found: dict[str, Tensor] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            whole = full(value.detach())
            if keep:
                found[name] = whole.cpu()
    return found


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors saved by `model_tensors` into the model's own memory.

    Raises:
        CheckpointError: names or shapes differ from the model's trainable parameters.
    """
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if set(own) != set(tensors):
        odd = sorted(set(own) ^ set(tensors))[0]
        raise CheckpointError(f"checkpoint does not fit the model: {odd} stands on one side only")
    for name, parameter in own.items():
        _check_shape(name, tensors[name], parameter.shape)
    for name, parameter in own.items():
        copy_full(parameter, tensors[name])


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool = True
) -> dict[str, Tensor]:
    """Optimizer state as `{slot}.{parameter name}`, as `model_tensors` gives the weights."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            whole = full(value.detach())
            if keep:
                found[f"{slot}.{name}"] = whole.cpu()
    return found


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put tensors saved by `optimizer_tensors` back, sharded like their parameters.

    Raises:
        CheckpointError: a name or shape is none of the model's parameters.
    """
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        slot, _, name = key.partition(".")
        if name not in parameters:
            raise CheckpointError(f"checkpoint does not fit the model: it has no parameter {name}")
        _check_shape(key, value, torch.Size() if slot == "step" else parameters[name].shape)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    optimizer.state.clear()  # a checkpoint from before the first step holds none
    for key, value in tensors.items():
        slot, _, name = key.partition(".")
        parameter = parameters[name]
        if slot == "step":  # a fused optimizer counts on the parameter's device, others on the CPU
            place = value.to(parameter.device if fused else value.device, copy=True)
        else:
            place = torch.zeros_like(parameter)
            copy_full(place, value)
        optimizer.state[parameter][slot] = place


def _check_shape(name: str, found: Tensor, wanted: torch.Size) -> None:
    if found.shape != wanted:
        raise CheckpointError(
            f"checkpoint does not fit the model: {name} has shape {tuple(found.shape)}, "
            f"the model's is {tuple(wanted)}"
        )


def _newest_first(root: Path) -> list[Path]:
    """Checkpoints by step; one set aside stands behind the one that is to replace it."""
    found = [
        (int(match[1]), not match[2], path)
        for path in root.glob("step-*")
        if (match := re.fullmatch(r"step-([0-9]+)(\.old)?", path.name))
    ]
    return [path for *_, path in sorted(found, reverse=True)]


def _put(temporary: Path, final: Path) -> None:
    """Give a finished directory its name; one of that name is set aside until then."""
    aside = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _manifest(step: int, files: dict[str, str]) -> str:
    return json.dumps({"step": step, "files": files}, indent=1)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(root: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    need = sum(
        t.numel() * t.element_size() for tensors in groups.values() for t in tensors.values()
    )
    free = shutil.disk_usage(root).free
    if free < need * 1.05 + 2**20:
        raise OSError(28, f"needs {_size(need)}, {_size(free)} are free")


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
