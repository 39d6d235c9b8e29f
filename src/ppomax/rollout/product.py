"""A linear layer of the native engine, packed for the processor, with its adapters beside it."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ppomax.models.lora import Factors

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

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        result: Tensor
        if self.weight.is_mkldnn:
            result = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            result = F.linear(x, self.weight, self.bias)
        if self.down is None or self.up is None:
            return result
        return result + F.linear(F.linear(x, self.down), self.up)


def pack(
    names: Sequence[str],
    state: Mapping[str, Tensor],
    factors: Mapping[str, Factors],
    device: torch.device,
    dtype: torch.dtype,
) -> Product:
    """Layers that read the same input as one, outputs in their order. Always a copy.

    Args:
        names: of the layers, without `.weight`; all of them have a bias or none has.
        factors: of the layers with adapters.
    """

    def joined(kind: str) -> Tensor:
        return torch.cat([state[f"{name}.{kind}"].to(device, dtype) for name in names])

    weight = joined("weight")
    height = len(weight)
    if packs(device, dtype):
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    bias = joined("bias") if f"{names[0]}.bias" in state else None
    found = [(at, factors[name]) for at, name in enumerate(names) if name in factors]
    if not found:
        return Product(weight, bias)
    ends = torch.tensor([len(state[f"{name}.weight"]) for name in names]).cumsum(0).tolist()
    rank = sum(len(factor.down) for _, factor in found)
    up, taken = torch.zeros(height, rank, dtype=dtype, device=device), 0
    for at, factor in found:
        width, own = len(factor.down), len(factor.up)
        up[ends[at] - own : ends[at], taken : taken + width] = factor.up.to(device, dtype)
        taken += width
    down = torch.cat([factor.down.to(device, dtype) for _, factor in found])
    return Product(weight, bias, down, up)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN holds the weights in a layout of its own (bf16 only where it has units)."""
    tried = platform.machine() in ("x86_64", "AMD64")  # elsewhere nobody has run these kernels
    if device.type != "cpu" or not tried or not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
