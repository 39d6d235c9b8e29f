"""Micro-batches over ranks: who computes which, and what all of them found as one table."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ppomax.distributed import World, sum_tensor

Watched = Callable[[Sequence[tuple[list[int], float]]], Iterator[tuple[list[int], float]]]
"""`StageRun.watched`, or `iter` where nobody asks to stop."""


def rank_micro_batches(plan: Sequence[list[int]], world: World) -> list[tuple[list[int], float]]:
    """This rank's micro-batches with their weight in the loss.

    Every rank runs the same number of forwards (collectives would hang otherwise): where the plan
    does not divide, the shortest micro-batch is run again with weight 0.
    """
    if not plan:
        return []
    filler = [(plan[-1], 0.0)] * (-len(plan) % world.size)
    return world.share([(batch, 1.0) for batch in plan] + filler)


def autocast(world: World, dtype: torch.dtype) -> AbstractContextManager[object]:
    """bf16 matrix products on fp32 weights; nothing in fp32."""
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def table_of(
    shape: Sequence[int],
    plan: Sequence[list[int]],
    read: Callable[[list[int]], Tensor],
    here: World,
    *,
    dtype: torch.dtype = torch.float32,
    watched: Watched = iter,
) -> Tensor:
    """What `read` says of the rows of each micro-batch, on every rank; 0 where no plan leads.

    Args:
        shape: of the table, rows first.
        read: rows' values from their indices.
    """
    table = torch.zeros(tuple(shape), dtype=dtype, device=here.device)
    for indices, weight in watched(rank_micro_batches(plan, here)):
        found = read(indices)
        if weight:
            table[indices] = found
    return sum_tensor(table, here)
