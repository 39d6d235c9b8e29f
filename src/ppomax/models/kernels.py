"""What lies between the matrix products of training, compiled: kernels.cpp."""

import ctypes
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ppomax.models.compiled import Compiled, address, library, threads
from ppomax.models.prefixes import Texts

SOURCE = Path(__file__).with_name("kernels.cpp")


class Turns(NamedTuple):
    """Rotary embeddings, fp32, [length or rows, dim]: of the positions, or of each row's."""

    cos: Tensor
    sin: Tensor


class HeadNorms(NamedTuple):
    """RMSNorms of each query and each key head by itself; weights fp32, [dim], or None."""

    q: Tensor | None = None
    k: Tensor | None = None
    eps: float = 0.0


@cache
def kernels_for(dtype: torch.dtype) -> "Kernels | None":
    """The kernels for a compute dtype; None where they cannot be built, or have no such dtype."""
    found = library(SOURCE)
    known = dtype in (torch.float32, torch.bfloat16)
    return Kernels(found, dtype) if known and not isinstance(found, str) else None


class Kernels(Compiled):
    """The functions of kernels.cpp for one compute dtype.

    Residual streams, their gradients, norms and rotations are fp32, all else is in that dtype.
    """

    signatures: ClassVar = {
        "norm": "ppppp nn f i",
        "norm_backward": "ppppppp nn f i",
        "swiglu": "pp nn i",
        "swiglu_backward": "pppp nn i",
        "split_heads": "ppppppppppp nnnnnnn f i",
        "join_heads": "ppppppppppppp nnnnnnn f i",
        "gather_heads": "ppp nnnnn i",
        "scatter_heads": "ppp nnnnn i",
        "softmax": "p nn i",
        "softmax_backward": "pp nn f i",
        "logprobs": "ppp nnnn f i",
        "logprobs_backward": "pppppp nnn f i",
    }

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm, weight · x / sqrt(mean(x²) + eps); [tokens, hidden]."""
        out = x.new_empty(x.shape, dtype=self.dtype)
        given = (x, None, weight, None, out)
        self._norm(*map(address, given), *x.shape, eps, threads())
        return out

    def add_and_norm(
        self, x: Tensor, added: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The sum of the stream and what is added to it, and the norm of that."""
        total, out = torch.empty_like(x), x.new_empty(x.shape, dtype=self.dtype)
        given = (x, added, weight, total, out)
        self._norm(*map(address, given), *x.shape, eps, threads())
        return total, out

    def norm_backward(
        self, x: Tensor, weight: Tensor, gradient: Tensor, around: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a stream that was normed and also went around the norm; [tokens, hidden].

        Args:
            gradient: of the norm's output.
            around: of what went around it, fp32.

        Returns:
            the stream's, fp32 and rounded, and the weight's, fp32.
        """
        out, to_weight = torch.empty_like(x), x.new_empty(x.shape[1])
        rounded = None if self.dtype == torch.float32 else torch.empty_like(gradient)
        given = (x, weight, gradient, around, out, rounded, to_weight)
        self._norm_backward(*map(address, given), *x.shape, eps, threads())
        return out, out if rounded is None else rounded, to_weight

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) · up, [tokens, width], from both side by side, [tokens, 2 width]."""
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._swiglu(*map(address, (gate_up, out)), rows, width, threads())
        return out

    def swiglu_backward(self, gate_up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of gate and up, side by side, and what `swiglu` had made of them."""
        to_gate_up, product = torch.empty_like(gate_up), torch.empty_like(gradient)
        given = (gate_up, gradient, to_gate_up, product)
        self._swiglu_backward(*map(address, given), *gradient.shape, threads())
        return to_gate_up, product

    def split_heads(
        self, qkv: Tensor, turns: Turns, norms: HeadNorms, texts: Texts, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated queries and keys, and values, in every text that has them.

        Each is [batch, heads or kv_heads, length, dim]; 0 where a text has ended.

        Args:
            qkv: all side by side, [rows, (heads + 2 kv_heads) * dim].
        """
        batch, length, *places = texts
        dim = turns.cos.shape[-1]
        q = qkv.new_empty(batch, heads, length, dim)
        k = qkv.new_empty(batch, kv_heads, length, dim)
        v = torch.empty_like(k)
        given = (qkv, *turns, norms.q, norms.k, q, k, v, *places)
        sizes = (batch, length, heads, kv_heads, dim, len(qkv), len(turns.cos))
        self._split_heads(*map(address, given), *sizes, norms.eps, threads())
        return q, k, v

    def join_heads(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qkv: Tensor,
        turns: Turns,
        norms: HeadNorms,
        texts: Texts,
    ) -> tuple[Tensor, Tensor]:
        """The way back: the gradient of `qkv` from those of its heads, and of the norms' weights.

        Args:
            q: of queries; read where a row stands first.
            qkv: what `split_heads` read.

        Returns:
            the weights' is [2, dim], fp32; of no norms it is anything.
        """
        batch, length, *places = texts
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
        to_qkv, to_norms = torch.empty_like(qkv), turns.cos.new_empty(2, dim)
        given = (q, k, v, qkv, *turns, norms.q, norms.k, to_qkv, to_norms, *places)
        sizes = (batch, length, heads, kv_heads, dim, len(qkv), len(turns.cos))
        self._join_heads(*map(address, given), *sizes, norms.eps, threads())
        return to_qkv, to_norms

    def gather_heads(self, heads: Tensor, places: Tensor | None) -> Tensor:
        """Heads side by side, [rows, heads * dim], of [batch, heads, length, dim].

        Args:
            places: of the rows, text * length + position; None: all, in order.
        """
        batch, count, length, dim = heads.shape
        rows = batch * length if places is None else len(places)
        out = heads.new_empty(rows, count * dim)
        given = (heads, out, places)
        self._gather_heads(*map(address, given), batch, length, count, dim, rows, threads())
        return out

    def scatter_heads(self, rows: Tensor, texts: Texts, dim: int, places: Tensor | None) -> Tensor:
        """The way back, to [batch, heads, length, dim]; 0 at every other place."""
        batch, length = texts[:2]
        count = rows.shape[1] // dim
        heads = rows.new_empty(batch, count, length, dim)
        given = (rows, heads, places)
        self._scatter_heads(*map(address, given), batch, length, count, dim, len(rows), threads())
        return heads

    def softmax_(self, scores: Tensor) -> Tensor:
        """Causal, in place; [..., length, length]."""
        length = scores.shape[-1]
        self._softmax(address(scores), scores.numel() // length, length, threads())
        return scores

    def softmax_backward_(self, shares: Tensor, gradient: Tensor, scale: float) -> Tensor:
        """Of the shares' gradient that of the scores before they were scaled, in place."""
        length = shares.shape[-1]
        rows = shares.numel() // length
        self._softmax_backward(address(shares), address(gradient), rows, length, scale, threads())
        return gradient

    def logprobs(
        self,
        parts: Iterable[tuple[int, Tensor]],
        targets: Tensor,
        vocab: int,
        temperature: float,
        *,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs, log normalisers, log-probs at temperature 1 and entropies, fp32, [tokens].

        Args:
            parts: logits of the vocabulary's parts, [tokens, width], each with its first token.
            entropy: False leaves it 0.

        Raises:
            IndexError: a target is no token.
        """
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
            raise IndexError(f"a target is none of the {vocab} tokens")
        temperature = ctypes.c_float(temperature).value  # as the kernel compares it with 1
        sums = torch.zeros(len(targets), 5, dtype=torch.float64)
        sums[:, 0] = -torch.inf
        targets = targets.long().contiguous()
        for first, logits in parts:
            given = (logits, targets, sums)
            sizes = (*logits.shape, first, int(entropy))
            self._logprobs(*map(address, given), *sizes, temperature, threads())
        top, total, plain, weighted, target = sums.unbind(1)
        level = top / temperature + total.log()
        logprobs = target / temperature - level
        entropies = total.log() - weighted / total if entropy else torch.zeros_like(total)
        plain = logprobs if temperature == 1.0 else target - top - plain.log()
        return logprobs.float(), level.float(), plain.float(), entropies.float()

    def logprobs_backward_(
        self,
        logits: Tensor,
        first: int,
        targets: Tensor,
        normaliser: Tensor,
        entropy: Tensor,
        to_logprob: Tensor,
        to_entropy: Tensor | None,
        temperature: float,
    ) -> Tensor:
        """A part's gradient in its place, from that of `logprobs`' log-probs and entropies."""
        given = [t if t is None else t.contiguous() for t in (to_logprob, to_entropy)]
        tensors = (logits, targets.long().contiguous(), normaliser, entropy, *given)
        self._logprobs_backward(
            *map(address, tensors), *logits.shape, first, temperature, threads()
        )
        return logits

    _norm: Any
    _norm_backward: Any
    _swiglu: Any
    _swiglu_backward: Any
    _split_heads: Any
    _join_heads: Any
    _gather_heads: Any
    _scatter_heads: Any
    _softmax: Any
    _softmax_backward: Any
    _logprobs: Any
    _logprobs_backward: Any
