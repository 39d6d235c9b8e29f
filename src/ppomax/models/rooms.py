"""Memory that a block's largest tensors take turns in, instead of asking for it anew."""

import math
import threading

import torch
from torch import Tensor


class Room:
    """Memory for one tensor at a time, whose size changes from call to call."""

    def __init__(self) -> None:
        self.held = torch.empty(0)

    def of(self, like: Tensor, *shape: int) -> Tensor:
        """A tensor of this shape that the next one of this room overwrites."""
        size = math.prod(shape)
        if self.held.dtype != like.dtype or len(self.held) < size:
            with torch.inference_mode(mode=False):  # training may be next to write to it
                self.held = like.new_empty(size)
        return self.held[:size].view(shape)


class Rooms(threading.local):
    """For scores, their gradient and packed matrices, the largest that a block makes and drops.

    Among blocks of what is kept for backward, each would leave a hole of its size.
    """

    def __init__(self) -> None:
        self.shares, self.gradient, self.packed = Room(), Room(), Room()


ROOMS = Rooms()
