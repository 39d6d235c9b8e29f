"""What the native engine has read of each text: keys and values, in slots of one length."""

from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Float
from torch import Tensor

from ppomax.rollout.kernels import TILE, addresses
from ppomax.rollout.weights import Layer

Slots = int | slice | Tensor


@dataclass(frozen=True, slots=True)
class Cache:
    """A tensor a layer, and what rotates queries and keys."""

    keys: list[Tensor]
    """[slots, kv_heads, dim, length]: scores read along the length, and oneDNN is up to twice as
    fast at a product whose right side lies so (docs/LOG.md)."""
    values: list[Tensor]
    """[slots, kv_heads, length, dim]"""
    cos: Tensor
    """[length, 1, dim]; keys and values may have room for a few positions more."""
    sin: Tensor
    """The same, negative where a rotation subtracts."""
    layers: list[Layer]
    """What it was filled with, and is read with."""
    opening: int
    """Tokens that all prompts begin with: every slot holds them, whoever comes and goes."""
    addresses: Tensor | None
    """Of all that `Kernels.read` reads, a row a layer."""

    def copy(self, source: Slots, target: Slots, length: int) -> None:
        """The first positions of some slots to others."""
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[target, :, :, :length] = keys[source, :, :, :length]
            values[target, :, :length] = values[source, :, :length]


def room(
    layers: list[Layer],
    slots: int,
    kv_heads: int,
    turns: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    opening: int,
) -> Cache:
    """An empty cache; zeros, for what is masked must be finite.

    Args:
        turns: of `rotations`, a row for each position.
        opening: tokens that every slot is to hold.
    """
    length, _, dim = turns[0].shape
    ample = -(-length // TILE) * TILE

    def empty(*shape: int) -> list[Tensor]:
        device = turns[0].device
        return [torch.zeros(slots, kv_heads, *shape, dtype=dtype, device=device) for _ in layers]

    keys, values = empty(dim, ample), empty(ample, dim)
    return Cache(keys, values, *turns, layers, opening, _addresses(layers, keys, values))


def _addresses(layers: list[Layer], keys: list[Tensor], values: list[Tensor]) -> Tensor | None:
    """None where compiled kernels do not read all products."""
    products = [(layer.qkv, layer.out, layer.gate_up, layer.down) for layer in layers]
    if not layers or not all(product.compiled for layer in products for product in layer):
        return None
    rows = []
    for layer, *cached in zip(layers, keys, values, strict=True):
        attention = (layer.attention_norm, *layer.qkv.plain, layer.qk_norm, *layer.out.plain)
        mlp = (layer.mlp_norm, layer.gate_up.weight, layer.down.weight)
        rows.append(addresses(*attention, *mlp, *cached))
    return torch.tensor(rows)


def rotations(
    inv_freq: Float[Tensor, " half"], scale: float, length: int
) -> tuple[Float[Tensor, "length 1 dim"], Float[Tensor, "length 1 dim"]]:
    """Cosines, and sines that are negative where a rotation subtracts (Su et al. 2021, eq. 34).

    Args:
        scale: of both, as some rotary embeddings have it.
    """
    angles = torch.arange(length, device=inv_freq.device)[:, None, None].float() * inv_freq
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def opening_of(prompts: list[list[int]]) -> list[int]:
    """The tokens that all prompts begin with, the last of none among them."""
    least, most = min(prompts), max(prompts)  # what these two share is shared by what lies between
    common = takewhile(lambda pair: pair[0] == pair[1], zip(least, most, strict=False))
    return [token for token, _ in common][: min(map(len, prompts)) - 1]
