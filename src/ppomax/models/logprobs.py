"""Log-probs and entropy of chosen tokens without the [batch, sequence, vocab] tensor.

Hidden states of target positions only: a few tokens with the whole vocabulary at a time or, where
there are compiled kernels, all tokens with a part of the vocabulary, so that nothing of the output
matrix's size is made beside its gradient. Backward makes the logits anew. All sums over the
vocabulary are fp32 or finer, whatever dtype the matrix product ran in.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppomax.models import products
from ppomax.models.kernels import Kernels, kernels_for

CHUNK_ELEMENTS = 2**22
"""Logits held at once: 16 MB in fp32, so that a chunk's passes stay in cache on a CPU."""
PART_ELEMENTS = 2**22
"""The same of a part of the vocabulary."""
NARROWEST = 512
"""Tokens of a part, at least, for the products' sake; its width is a multiple of that."""
CUDA_CHUNK_ELEMENTS = 2**26
"""The same on CUDA, where few large kernels are sooner done than many small ones."""


class TokenLogprobs(NamedTuple):
    """Per target token, fp32."""

    logprobs: Float[Tensor, " tokens"]
    """At the sampling temperature."""
    entropy: Float[Tensor, " tokens"]
    """Of the next-token distribution at the sampling temperature, in nats; zeros if not wanted."""
    plain: Float[Tensor, " tokens"]
    """Log-probs at temperature 1, without gradient."""


def token_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float = 1.0,
    entropy: bool = True,
) -> TokenLogprobs:
    """Log softmax(hidden @ weight.T / temperature) at the targets, and its entropy.

    Log-probs and entropy carry gradient to `hidden` and `weight`.

    Args:
        entropy: False saves its pass over the vocabulary, for losses that do not need it.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    with torch.autocast(device, enabled=False):
        outputs = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            hidden, weight, targets, temperature, dtype, entropy
        )
    return TokenLogprobs(*outputs)


def chunk_elements(device: str) -> int:
    """Logits held at once on a device of this type."""
    return CUDA_CHUNK_ELEMENTS if device == "cuda" else CHUNK_ELEMENTS


def chunk_tokens(weight: Float[Tensor, "vocab hidden"]) -> int:
    """Tokens whose logits are made at once."""
    return max(1, chunk_elements(weight.device.type) // len(weight))


def part_width(tokens: int) -> int:
    """Tokens of the vocabulary whose logits are made at once for so many targets."""
    return max(1, PART_ELEMENTS // max(1, tokens) // NARROWEST) * NARROWEST


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps only the hidden states; backward makes logits again."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch gives it no public type
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        dtype: torch.dtype,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Only hidden states, normalisers and entropies are kept."""
        found = _forward(hidden, weight, targets, temperature, dtype, entropy=want_entropy)
        logprobs, normalisers, plain, entropy = found
        ctx.save_for_backward(hidden, weight, targets, normalisers, entropy)
        ctx.temperature, ctx.dtype, ctx.want_entropy = temperature, dtype, want_entropy
        ctx.mark_non_differentiable(plain)
        return logprobs, entropy, plain

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401 - torch gives it no public type
        *grads: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """Softmax gradients, logits made anew; passes over the vocabulary are in place."""
        with torch.autocast(grads[0].device.type, enabled=False):
            return _gradients(ctx, *grads)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    dtype: torch.dtype,
    *,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, log normalisers, log-probs at temperature 1 and entropies (or zeros)."""
    kernels = _kernels(weight, dtype)
    if kernels is not None:
        parts = ((part.start, logits) for part, _, logits in _parts(hidden.to(dtype), weight))
        return kernels.logprobs(parts, targets, len(weight), temperature, entropy=entropy)
    found = hidden.new_empty(4, len(targets), dtype=torch.float32)
    for part, _, logits in _chunks(hidden, weight.to(dtype)):
        read = _read(logits, targets[part], temperature, entropy=entropy)
        for row, numbers in zip(found, read, strict=True):
            row[part] = numbers
    logprobs, normalisers, plain, entropies = found
    return logprobs, normalisers, plain, entropies


def _gradients(
    ctx: Any,  # noqa: ANN401 - torch gives it no public type
    to_logprobs: Tensor,
    to_entropy: Tensor | None,
    *_: Tensor,
) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
    hidden, weight, targets, normalisers, entropy = ctx.saved_tensors
    if not ctx.want_entropy or (to_entropy is not None and not bool(to_entropy.any())):
        to_entropy = None
    of_tokens = _OfTokens(targets, normalisers, entropy, to_logprobs, to_entropy)
    kernels = _kernels(weight, ctx.dtype)
    given = (hidden, weight, of_tokens, ctx.temperature, ctx.dtype, ctx.needs_input_grad[:2])
    if kernels is None:
        found = _gradients_by_tokens(*given)
    else:
        found = _gradients_by_parts(kernels, *given)
    return *found, None, None, None, None


class _OfTokens(NamedTuple):
    """What backward knows of each target token."""

    targets: Tensor
    normalisers: Tensor
    entropy: Tensor
    to_logprobs: Tensor
    to_entropy: Tensor | None
    """None where none of them has a gradient."""

    def of(self, rows: slice) -> "_OfTokens":
        targets, normalisers, entropy, to_logprobs = (part[rows] for part in self[:4])
        to_entropy = None if self.to_entropy is None else self.to_entropy[rows]
        return _OfTokens(targets, normalisers, entropy, to_logprobs, to_entropy)


def _gradients_by_parts(
    kernels: Kernels,
    hidden: Tensor,
    weight: Tensor,
    of_tokens: _OfTokens,
    temperature: float,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Of hidden states, summed over the vocabulary's parts, and of the output matrix."""
    states = hidden.to(dtype)
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    for part, matrix, logits in _parts(states, weight):
        grad = kernels.logprobs_backward_(logits, part.start, *of_tokens, temperature)
        if grad_hidden is not None and dtype == torch.float32:
            grad_hidden.addmm_(grad, matrix)
        elif grad_hidden is not None:
            grad_hidden += products.to_input(grad, matrix)
        if grad_weight is not None:
            products.to_weight(grad, states, out=grad_weight[part])
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def _gradients_by_tokens(
    hidden: Tensor,
    weight: Tensor,
    of_tokens: _OfTokens,
    temperature: float,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Of hidden states, and of the output matrix, summed over chunks of tokens."""
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = None
    matrix = weight.to(dtype)
    for part, states, logits in _chunks(hidden, matrix):
        grad = _slopes(logits, *of_tokens.of(part), temperature)
        if grad_hidden is not None:
            grad_hidden[part] = torch.mm(grad, matrix).to(hidden.dtype)
        if not wanted[1]:
            continue
        if grad_weight is None:
            grad_weight = torch.mm(grad.T, states).float()
        elif dtype == torch.float32:  # in place: no fresh [vocab, hidden] for every chunk
            grad_weight.addmm_(grad.T, states)
        else:
            grad_weight += torch.mm(grad.T, states)
    if wanted[1]:
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight
        grad_weight = grad_weight.to(weight.dtype)
    return grad_hidden, grad_weight


def _kernels(weight: Tensor, dtype: torch.dtype) -> Kernels | None:
    return kernels_for(dtype) if weight.device.type == "cpu" else None


def _chunks(hidden: Tensor, matrix: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tokens that are read together, their states and logits in the matrix's dtype.

    The logits may be written to; the next chunk's are in their place.
    """
    count, size = len(hidden), chunk_tokens(matrix)
    room = matrix.new_empty(min(count, size), len(matrix))
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        states = hidden[part].to(matrix.dtype)
        yield part, states, torch.mm(states, matrix.T, out=room[: len(states)])


def _parts(states: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A part of the vocabulary, its rows of the matrix and all tokens' logits, in states' dtype.

    The logits may be written to; the next part's are in their place.
    """
    count, vocab = len(states), len(weight)
    width = min(part_width(count), vocab)
    room = states.new_empty(count * width)
    for start in range(0, vocab, width):
        part = slice(start, min(start + width, vocab))
        matrix = weight[part].to(states.dtype)
        logits = room[: count * len(matrix)].view(count, len(matrix))
        yield part, matrix, products.forward(states, matrix, out=logits)


def _read(
    logits: Tensor, targets: Tensor, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Kernels.logprobs` of whole rows in PyTorch's operations; writes over fp32 logits."""
    x = logits.float()
    at_target = x.gather(1, targets[:, None]).squeeze(1)
    plain = None
    if temperature != 1.0:
        plain = at_target - x.logsumexp(1)
        x /= temperature
        at_target = at_target / temperature
    normaliser = x.logsumexp(1)
    logprobs = at_target - normaliser
    entropies = torch.zeros_like(logprobs)
    if entropy:
        x -= normaliser[:, None]  # log-probs; p times the logits would cancel
        entropies = -torch.linalg.vecdot(x.exp(), x)
    return logprobs, normaliser, logprobs if plain is None else plain, entropies


def _slopes(
    logits: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    to_logprob: Tensor,
    to_entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """`Kernels.logprobs_backward_` in PyTorch's operations."""
    x = logits.float()
    if temperature != 1.0:
        x /= temperature
    x -= normaliser[:, None]
    slope = to_logprob[:, None] / temperature
    # d logprob / d logits = onehot - p;  d entropy / d logits = -p (log p + H)
    if to_entropy is None:
        x.exp_().mul_(-slope)
    else:
        more = (x + entropy[:, None]) * (to_entropy[:, None] / temperature)
        x.exp_().mul_(more.add_(slope)).neg_()
    x.scatter_add_(1, targets[:, None], slope)
    return x.to(logits.dtype)
