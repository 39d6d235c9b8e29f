"""The compiled parts of a block as the engine reads it: kernels.cpp.

On a processor the small operations between a decoding step's matrix products take as long as the
products, and products of few rows reach two thirds of what the processor can. Where no C++ compiler
is found the native engine uses PyTorch's operations.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppomax.models.compiled import Compiled, address, threads
from ppomax.rollout.sampling import Draw, Likely

SOURCE = Path(__file__).with_name("kernels.cpp")
TILE = 32
"""Positions whose keys are read together: a cache holds a multiple of it."""


def addresses(*tensors: Tensor | None) -> list[int]:
    """A row of what `Kernels.read` reads, in the order of `Layer` in kernels.cpp; 0 is nothing."""
    return [address(tensor) or 0 for tensor in tensors]


class Kernels(Compiled):
    """The functions of kernels.cpp for one compute dtype.

    Residual streams, norms and rotations are fp32, all else is in the compute dtype.
    """

    signatures: ClassVar = {
        "norm": "pppp nn f i",
        "swiglu": "pp nn i",
        "attend": "pppp ppppp nnnnn f i",
        "read": "pppppp nnnnnnnn f i",
        "pack": "pp nnn i",
        "pack_rounded": "pp nnn i",
        "product": "pppp nnn i",
        "logits": "pppp nnn i",
        "most_likely": "pppp nnn i",
        "draw_plain": "ppppp nnn f i",
    }
    alike: ClassVar = frozenset({"most_likely", "draw_plain"})

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        super().__init__(library, dtype)
        self.panel = int(getattr(library, f"panel_{self.kind}")()) if self._product else 0
        """Outputs of a product that are packed together; 0 where kernels.cpp has none for this
        processor, whose bf16 units are none that it knows, or may not be used."""
        self.step = int(getattr(library, f"step_{self.kind}")()) if self._product else 1
        """Inputs are packed as a multiple of it."""

    def norm(self, stream: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of the stream, to which `added` is added in place first; [tokens, hidden].

        Args:
            stream: [tokens, hidden].
            added: the same in the compute dtype.
            weight: [hidden].
        """
        out = stream.new_empty(stream.shape, dtype=self.dtype)
        self._norm(
            address(stream),
            address(added),
            address(weight),
            address(out),
            *stream.shape,
            eps,
            threads(),
        )
        return out

    def pack(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Matrices [outputs, inputs] below one another as `product` reads them, a copy.

        In panels of outputs, [panels, inputs / depth, panel, depth], the last panel and the last
        step of inputs filled up with zeros. None where `product` cannot read such.
        """
        outputs, inputs = sum(map(len, weights)), weights[0].shape[1]
        depth = 1 if self.dtype == torch.float32 else 2
        if not self.panel or inputs % depth:
            return None
        padded = -(-inputs // self.step) * self.step
        shape = (-(-outputs // self.panel), padded // depth, self.panel, depth)
        packed = torch.empty(shape, dtype=self.dtype)
        packed[-1] = 0
        packed[:, inputs // depth :] = 0
        first = 0
        for weight in weights:
            exact = weight.dtype == torch.float32
            function = self._pack if exact else self._pack_rounded
            given = weight.to("cpu", torch.float32 if exact else self.dtype).contiguous()
            function(address(given), address(packed), first, *given.shape, threads())
            first += len(given)
        return packed

    def product(self, outputs: int, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """X W + b, [rows, outputs].

        Args:
            x: [rows, inputs].
            packed: of `pack`.
            bias: [outputs].
        """
        return self._multiplied(self._product, self.dtype, outputs, x, packed, bias)

    def logits(self, outputs: int, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """The same, rounded as `product` rounds and kept in fp32."""
        return self._multiplied(self._logits, torch.float32, outputs, x, packed, bias)

    def _multiplied(
        self,
        function: Callable[..., None],
        dtype: torch.dtype,
        outputs: int,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        out = x.new_empty(len(x), outputs, dtype=dtype)
        function(*map(address, (x, packed, bias, out)), *x.shape, outputs, threads())
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, [tokens, width], from both side by side, [tokens, 2 width]."""
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._swiglu(address(gate_up), address(out), rows, width, threads())
        return out

    def attend(
        self,
        qkv: Tensor,
        qk_norm: Tensor | None,
        turns: tuple[Tensor, Tensor],
        positions: Tensor,
        slots: Tensor | None,
        keys: Tensor,
        values: Tensor,
        eps: float,
    ) -> Tensor:
        """Write each token's key and value to the cache, then read it so far; [n, heads * dim].

        Args:
            qkv: queries, keys and values side by side, not rotated yet,
                [n, (heads + 2 kv_heads) * dim].
            qk_norm: weights of the norm of each query and key head, [heads + kv_heads, dim].
            turns: cosines, and sines that are negative where a rotation subtracts,
                [length, 1, dim].
            positions: where each token stands in its text, [n].
            slots: of its text, [n]; without them token i is of slot i.
            keys: [slots, kv_heads, dim, length], the length a multiple of `TILE`.
            values: [slots, kv_heads, length, dim].
        """
        count, width = qkv.shape
        _, kv_heads, dim, length = keys.shape
        if length % TILE or turns[0].shape[-1] != dim:
            raise ValueError(f"a cache of {length} positions of {dim} numbers is not read")
        heads = width // dim - 2 * kv_heads
        out = qkv.new_empty(count, heads * dim)
        given = (qkv, qk_norm, *turns, positions, slots, keys, values, out)
        self._attend(*map(address, given), count, heads, kv_heads, dim, length, eps, threads())
        return out

    def read(
        self,
        layers: Tensor,
        stream: Tensor,
        turns: tuple[Tensor, Tensor],
        positions: Tensor,
        slots: Tensor | None,
        heads: int,
        cache: tuple[int, int, int],
        inner: int,
        eps: float,
    ) -> None:
        """Take the residual stream, [n, hidden], through all blocks in place.

        Args:
            layers: of `addresses`, a row each.
            heads: of queries.
            cache: key and value heads, their dimension, and positions, a multiple of `TILE`.
            inner: width of the MLP.
            turns, positions, slots: as for `attend`.
        """
        if cache[2] % TILE or turns[0].shape[-1] != cache[1]:
            raise ValueError(f"a cache of {cache[2]} positions of {cache[1]} numbers is not read")
        given = (layers, stream, *turns, positions, slots)
        rows, hidden = stream.shape
        sizes = (len(layers), rows, heads, *cache, hidden, inner)
        self._read(*map(address, given), *sizes, eps, threads())

    def most_likely(self, logits: Tensor, count: int) -> Likely:
        """As `sampling.look`; equals come in the order of their ids.

        Args:
            logits: fp32, [batch, vocab].
        """
        batch, vocab = logits.shape
        values, normaliser = logits.new_empty(batch, count), logits.new_empty(batch)
        ids = logits.new_empty(batch, count, dtype=torch.long)
        given = (logits.contiguous(), values, ids, normaliser)
        self._most_likely(*map(address, given), batch, vocab, count, threads())
        return Likely(values, ids, normaliser)

    def draw_plain(
        self, logits: Tensor, seeds: Tensor, steps: Tensor, temperature: float, count: int
    ) -> Draw:
        """A draw from softmax(logits / temperature), that of `sampling.sample`.

        Of equal logits at the last candidate's place another may be one.

        Args:
            logits: fp32, [batch, vocab].
            count: tokens that are perturbed one by one.
        """
        batch, vocab = logits.shape
        tokens, logprobs = torch.empty_like(seeds), logits.new_empty(batch)
        given = (logits.contiguous(), seeds.contiguous(), steps.contiguous(), tokens, logprobs)
        sizes = (batch, vocab, min(count, vocab))
        self._draw_plain(*map(address, given), *sizes, temperature, threads())
        return Draw(tokens, logprobs)

    _norm: Any
    _swiglu: Any
    _attend: Any
    _pack: Any
    _pack_rounded: Any
    _product: Any
    _read: Any
    _logits: Any
    _most_likely: Any
    _draw_plain: Any
