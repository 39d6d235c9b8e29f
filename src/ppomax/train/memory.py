"""How much memory was taken, and what to do when it does not suffice for a micro-batch."""

import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ppomax.distributed import World, gather
from ppomax.errors import TrainingError
from ppomax.train.loop import StageRun, Trainable

T = TypeVar("T")
LEAST = 16
"""Micro-batches of fewer tokens than this are not tried."""


def fitted(
    run: StageRun, parts: Sequence[Trainable[Any]], step: int, work: Callable[[int], T]
) -> T:
    """`work` with the run's micro-batch size, halved and begun again while memory runs out.

    Micro-batches add up to the same step whatever their size, so the result stays the same.

    Raises:
        TrainingError: the smallest does not fit, or ranks wait for this one (there the size must
            change on all of them).
    """
    while True:
        try:
            return work(run.micro_tokens)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # outside the handler: its traceback holds the tensors that are to be freed
        for part in parts:
            part.drop_gradients()
        if run.world.device.type == "cuda":
            torch.cuda.empty_cache()
        halve(run, step)


def halve(run: StageRun, step: int) -> None:
    """Half the tokens in a micro-batch from here on.

    Raises:
        TrainingError: see `fitted`.
    """
    smaller = run.micro_tokens // 2
    if run.world.size > 1 or smaller < LEAST:
        raise TrainingError(
            f"{run.path}: out of memory with micro_tokens {run.micro_tokens}; the last checkpoint "
            f"is good. Go on with `ppomax resume` and {run.name}.micro_tokens={max(smaller, 1)}, "
            "gradient_checkpointing=true, or more ranks"
        )
    run.event("out_of_memory", step=step, micro_tokens=run.micro_tokens, now=smaller)
    run.micro_tokens = smaller


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: CUDA's, PyTorch's on the CPU, or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def peak_memory_gb(world: World) -> float:
    """Largest memory so far, of all ranks: device memory on CUDA, resident memory elsewhere."""
    if world.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(world.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(gather(used, world)) / 1e9
