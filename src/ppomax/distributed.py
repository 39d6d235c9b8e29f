"""The only module that names a process group.

Everything else asks three questions of it: who am I (`World`), what is the sum over all ranks,
and what is the full tensor behind a sharded one. With one process every answer is the identity.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ppomax.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among all that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item, from this rank's on."""
        return list(items[self.rank :: self.size])


def rank_in_environment() -> int:
    """RANK as torchrun, accelerate or srun set it; 0 without them."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the process group that `RANK` and `WORLD_SIZE` describe; leave it at the end.

    Raises:
        ConfigError: the device asked for is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = _device(device, local_rank)
    if place.type == "cpu":
        keep_freed_memory()
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    mine = not dist.is_initialized()
    if mine:
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, rank=rank_in_environment(), world_size=size, timeout=timedelta(minutes=30)
        )
    try:
        yield World(dist.get_rank(), size, place)
    finally:
        if mine:
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Let the C allocator keep freed blocks instead of handing them back to the system.

    A training step frees and takes hundreds of large tensors; getting each as new pages costs more
    than the arithmetic on some machines (docs/LOG.md). glibc only; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("setting device: cuda asked for, no CUDA device found; use cpu")
        return torch.device("cuda", local_rank)
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"setting device: {name!r} is no device; use auto, cpu or cuda") from None


def shard(model: nn.Module, world: World, blocks: Iterable[nn.Module]) -> None:
    """Shard a finished model over all ranks in place (FSDP2); nothing happens with one rank.

    Args:
        blocks: the repeated layers, each its own unit of communication.
    """
    if world.size == 1:
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def loss_scale(model: nn.Module, world: World) -> float:
    """Factor on the local loss that turns the ranks' *average* gradient into their sum.

    FSDP averages gradients; `sum_gradients` (replicated models) sums them.
    """
    return float(world.size) if is_sharded(model) else 1.0


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are spread over the ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def sum_gradients(model: nn.Module, world: World) -> None:
    """Sum the gradients of a replicated model over ranks; sharded models have done so already."""
    if world.size == 1 or is_sharded(model):
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> float:
    """Clip the global gradient norm in place; returns the norm *before* clipping."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = full(torch.nn.utils.get_total_norm(gradients))
    if max_norm is not None and torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor behind a sharded one (collective), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_full(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded, keeping `target`'s memory."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            whole = source.to(target.device, target.dtype)
            target.copy_(distribute_tensor(whole, target.device_mesh, target.placements))
        else:
            target.copy_(source)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, whole, by name (collective)."""
    return {name: full(value.detach()) for name, value in model.state_dict().items()}


def all_sum(values: Mapping[str, float], world: World) -> dict[str, float]:
    """Sum of each value over all ranks, in float64; all ranks pass the same keys."""
    return _reduce(values, world, dist.ReduceOp.SUM)


def all_max(values: Mapping[str, float], world: World) -> dict[str, float]:
    """Largest of each value over all ranks."""
    return _reduce(values, world, dist.ReduceOp.MAX)


def _reduce(
    values: Mapping[str, float], world: World, op: dist.ReduceOp.RedOpType
) -> dict[str, float]:
    if world.size == 1 or not values:
        return dict(values)
    keys = sorted(values)
    packed = torch.tensor([values[key] for key in keys], dtype=torch.float64, device=world.device)
    dist.all_reduce(packed, op)
    return dict(zip(keys, packed.tolist(), strict=True))


def gather(item: T, world: World) -> list[T]:
    """The objects of all ranks, in rank order, on every rank (pickled between own processes)."""
    if world.size == 1:
        return [item]
    items: list[T | None] = [None] * world.size
    dist.all_gather_object(items, item)
    return items  # type: ignore[return-value]  # every place is filled


def sum_tensor(tensor: Tensor, world: World) -> Tensor:
    """Elementwise sum over ranks; where all but one hold zeros, that one's bits."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()


def agree(flag: bool, world: World) -> bool:
    """True on every rank when it is true on any."""
    return all_max({"flag": float(flag)}, world)["flag"] > 0
