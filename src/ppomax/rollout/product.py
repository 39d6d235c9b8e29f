"""A linear layer of the native engine, packed for the processor, with its adapters beside it."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ppomax.models.lora import Factors
from ppomax.rollout.kernels import Kernels

ROWS = 32
"""Rows of a typical decoding step, for which oneDNN chooses its layout; any number may come."""


@dataclass(frozen=True, slots=True)
class Product:
    """x W + b + (x A) B, all in the compute dtype, as training computes it under autocast.

    Merged into bf16 weights, W + A B would lose most of a young update.
    """

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
    """x W + b, for weights as they lie in `weight`."""
    compiled: bool = False
    """Whether that is all, and compiled kernels read them."""

    @property
    def plain(self) -> tuple[Tensor, Tensor | None]:
        """W, as it lies there, and b."""
        return self.weight, self.bias

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] to [rows, out]."""
        result = self.multiply(x, self.weight, self.bias)
        if self.down is None or self.up is None:
            return result
        return result + F.linear(F.linear(x, self.down), self.up)


def pack(
    names: Sequence[str],
    state: Mapping[str, Tensor],
    factors: Mapping[str, Factors],
    device: torch.device,
    dtype: torch.dtype,
    kernels: Kernels | None = None,
    *,
    logits: bool = False,
) -> Product:
    """Layers that read the same input as one, outputs in their order. Always a copy.

    Args:
        names: of the layers, without `.weight`; all of them have a bias or none has.
        factors: of the layers with adapters.
        kernels: compiled ones, if there are any; else oneDNN's where `packs` says so.
        logits: what comes out is read in fp32; it may come so at once.
    """

    def joined(kind: str) -> Tensor:
        return torch.cat([state[f"{name}.{kind}"].to(device, dtype) for name in names])

    parts = [state[f"{name}.weight"] for name in names]
    height = sum(map(len, parts))
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
    packed = kernels.pack(parts) if kernels is not None else None
    if kernels is not None and packed is not None:
        weight, multiply = packed, partial(kernels.logits if logits else kernels.product, height)
    else:
        weight = joined("weight")
        if packs(device, dtype):
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            multiply = _onednn
    bias = joined("bias") if f"{names[0]}.bias" in state else None
    found = [(at, factors[name]) for at, name in enumerate(names) if name in factors]
    if not found:
        return Product(weight, bias, multiply=multiply, compiled=packed is not None)
    ends = torch.tensor([len(state[f"{name}.weight"]) for name in names]).cumsum(0).tolist()
    rank = sum(len(factor.down) for _, factor in found)
    up, taken = torch.zeros(height, rank, dtype=dtype, device=device), 0
    for at, factor in found:
        width, own = len(factor.down), len(factor.up)
        up[ends[at] - own : ends[at], taken : taken + width] = factor.up.to(device, dtype)
        taken += width
    down = torch.cat([factor.down.to(device, dtype) for _, factor in found])
    return Product(weight, bias, down, up, multiply)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN holds the weights in a layout of its own (bf16 only where it has units)."""
    tried = platform.machine() in ("x86_64", "AMD64")  # elsewhere nobody has run these kernels
    if device.type != "cpu" or not tried or not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
