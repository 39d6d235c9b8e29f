"""The three matrix products of training: products.cpp in bf16 where a processor has tiles.

Elsewhere, in other dtypes, and of what does not fit, PyTorch's. Both have fp32 sums; gradients of
weights, which are added up in fp32, are rounded to bf16 on the way by PyTorch's alone. Callers are
autograd's functions: nothing here is recorded.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ppomax.models.compiled import Compiled, address, library, threads
from ppomax.models.rooms import ROOMS

SOURCE = Path(__file__).with_name("products.cpp")
STRIP, DEEP = 32, 32
"""Rows or columns, and numbers of each, that are packed together."""
FEWEST = 32
"""Tokens for whose sake a matrix is packed."""
MOST = 3
"""Matrices that are read side by side without a copy."""
KEPT = 2**22
"""Numbers of a packed side whose memory is kept for the next one: 8 MB."""


def forward(
    x: Float[Tensor, "tokens inputs"],
    *weights: Float[Tensor, "outputs inputs"],
    out: Float[Tensor, "tokens outputs"] | None = None,
) -> Float[Tensor, "tokens outputs"]:
    """X W' in the dtype of X, for matrices below one another."""
    shape = len(x), sum(map(len, weights))
    fits = all(weight.shape[1:] == x.shape[1:] for weight in weights)
    if out is not None:
        fits &= out.shape == shape and out.dtype == x.dtype
    tiles = _tiles(x, weights, out) if fits else None
    if tiles is None:
        return torch.mm(x, _side_by_side(weights, x.dtype).T, out=out)
    return tiles.forward(x, weights, x.new_empty(shape) if out is None else out)


def to_input(
    gradient: Float[Tensor, "tokens outputs"], *weights: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "tokens inputs"]:
    """What `forward` read, from the gradient of what it gave."""
    alike = {weight.shape[1:] for weight in weights}
    fits = len(alike) == 1 and gradient.shape[1] == sum(map(len, weights))
    tiles = _tiles(gradient, weights) if fits else None
    if tiles is None:
        return torch.mm(gradient, _side_by_side(weights, gradient.dtype))
    return tiles.to_input(gradient, weights)


def to_weight(
    gradient: Float[Tensor, "tokens outputs"],
    x: Float[Tensor, "tokens inputs"],
    out: Float[Tensor, "outputs inputs"] | None = None,
) -> Float[Tensor, "outputs inputs"]:
    """What `forward` read it with, in fp32 or the dtype of `out`."""
    shape = gradient.shape[1], x.shape[1]
    fits = len(gradient) == len(x) and gradient.dtype == x.dtype
    if out is not None:
        fits &= out.shape == shape and out.dtype == torch.float32
    tiles = _tiles(x, [x], gradient, out) if fits else None
    if tiles is None:
        found = torch.mm(gradient.T, x)
        return found.float() if out is None else out.copy_(found)
    out = x.new_empty(shape, dtype=torch.float32) if out is None else out
    return tiles.to_weight(gradient, x, out)


def _side_by_side(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices below one another in the compute dtype."""
    if len(weights) == 1:
        return weights[0].to(dtype)
    whole = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype)
    for place, weight in zip(torch.split(whole, list(map(len, weights))), weights, strict=True):
        place.copy_(weight)
    return whole


def _tiles(x: Tensor, weights: Sequence[Tensor], *others: Tensor | None) -> "Tiles | None":
    """What multiplies such matrices, where that is not PyTorch."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or len(x) < FEWEST:
        return None
    matrices = [each for each in (x, *weights, *others) if each is not None]
    if not all(each.dim() == 2 and each.numel() and each.is_contiguous() for each in matrices):
        return None
    kinds = {weight.dtype for weight in weights}
    return tiles_for(kinds.pop()) if len(kinds) == 1 and len(weights) <= MOST else None


@cache
def tiles_for(dtype: torch.dtype) -> "Tiles | None":
    """The products of bf16 with weights of this dtype; None where there are no tiles."""
    found = library(SOURCE)
    if dtype not in (torch.float32, torch.bfloat16) or isinstance(found, str):
        return None
    return Tiles(found, dtype) if found.may_use() else None


class Tiles(Compiled):
    """The functions of products.cpp for one dtype of weights; all else is bf16."""

    signatures: ClassVar = {
        "forward": "p ppp pp nnn nn i",
        "to_input": "p ppp pp nnn nn i",
        "to_weight": "pppp nnn i",
    }
    alike = frozenset({"to_weight"})

    def forward(self, x: Tensor, weights: Sequence[Tensor], out: Tensor) -> Tensor:
        """X W' to `out`."""
        room = _room(x, out.shape[1], x.shape[1])
        self._forward(*_given(x, weights, out, room), *x.shape, *_ends(weights), threads())
        return out

    def to_input(self, gradient: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The gradient of X."""
        tokens, outputs = gradient.shape
        inputs = weights[0].shape[1]
        out, room = gradient.new_empty(tokens, inputs), _room(gradient, inputs, outputs)
        given = _given(gradient, weights, out, room)
        self._to_input(*given, tokens, inputs, *_ends(weights), threads())
        return out

    def to_weight(self, gradient: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """The gradient of W, fp32, to `out`."""
        room = _room(x, x.shape[1], len(x))
        sizes = (*x.shape, gradient.shape[1])
        self._to_weight(*map(address, (gradient, x, out, room)), *sizes, threads())
        return out

    _forward: Any
    _to_input: Any
    _to_weight: Any


def _given(x: Tensor, weights: Sequence[Tensor], out: Tensor, room: Tensor) -> list[int | None]:
    padded = (*weights, *[None] * (MOST - len(weights)))
    return list(map(address, (x, *padded, out, room)))


def _ends(weights: Sequence[Tensor]) -> tuple[int, int, int]:
    """How many outputs there are, and where those of the first and second matrix end."""
    ends = list(accumulate(map(len, weights)))
    return ends[-1], ends[0], ends[min(1, len(ends) - 1)]


def _room(like: Tensor, columns: int, depth: int) -> Tensor:
    """For the right side, packed, and a strip of the left one for each thread."""
    strips = -(-columns // STRIP) + threads()
    size = strips * STRIP * -(-depth // DEEP) * DEEP
    return ROOMS.packed.of(like, size) if size <= KEPT else like.new_empty(size)
