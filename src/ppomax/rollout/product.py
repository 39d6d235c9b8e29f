"""A packed linear layer of the native engine, with the low-rank term of its adapters beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ppomax.models.lora import Factors


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
    """Layers that read the same input as one, outputs in their order.

    Args:
        names: of the layers, without `.weight`; all of them have a bias or none has.
        factors: of the layers with adapters.
    """

    def joined(kind: str) -> Tensor:
        return torch.cat([state[f"{name}.{kind}"].to(device, dtype) for name in names])

    weight = joined("weight")
    bias = joined("bias") if f"{names[0]}.bias" in state else None
    found = [(at, factors[name]) for at, name in enumerate(names) if name in factors]
    if not found:
        return Product(weight, bias)
    ends = torch.tensor([len(state[f"{name}.weight"]) for name in names]).cumsum(0).tolist()
    rank = sum(len(factor.down) for _, factor in found)
    up, taken = torch.zeros(len(weight), rank, dtype=dtype, device=device), 0
    for at, factor in found:
        width, height = len(factor.down), len(factor.up)
        up[ends[at] - height : ends[at], taken : taken + width] = factor.up.to(device, dtype)
        taken += width
    down = torch.cat([factor.down.to(device, dtype) for _, factor in found])
    return Product(weight, bias, down, up)
