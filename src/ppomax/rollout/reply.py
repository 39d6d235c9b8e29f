"""Replies that are being written, and what a step of decoding needs to know of them."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(slots=True)
class Reply:
    """A reply being written."""

    index: int
    prompt: list[int]
    seed: int
    group: int
    """Index of the first reply with the same prompt."""
    most: int
    """Tokens it may have."""
    ids: list[int]
    logprobs: list[float]

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included."""
        return len(self.prompt) + len(self.ids)


def columns_of(replies: list[Reply]) -> Int[Tensor, "4 replies"]:
    """Of each reply its newest token, where that stands, its seed, and how many there are.

    Where there are none yet, the prompt's last. On the CPU.
    """
    rows = [
        (
            reply.ids[-1] if reply.ids else reply.prompt[-1],
            len(reply.prompt) + len(reply.ids) - 1,
            reply.seed,
            len(reply.ids),
        )
        for reply in replies
    ]
    return torch.tensor(rows).T


def columns_after(
    columns: Int[Tensor, "4 replies"], tokens: Int[Tensor, " replies"]
) -> Int[Tensor, "4 replies"]:
    """`columns_of` of the same replies with one token more each."""
    _, places, seeds, counts = columns
    return torch.stack([tokens, places + 1, seeds, counts + 1])
