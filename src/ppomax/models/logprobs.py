"""Log-probs and entropy of chosen tokens without the [batch, sequence, vocab] tensor.

Hidden states of target positions only, in chunks; backward recomputes each chunk's logits. All sums
over the vocabulary are fp32, whatever dtype the matrix product ran in.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppomax.models.kernels import Kernels, kernels_for

CHUNK_ELEMENTS = 2**22
"""Logits held at once: 16 MB in fp32, so that a chunk's passes stay in cache on a CPU."""
COMPILED_CHUNK_ELEMENTS = 2**25
"""The same where one compiled pass does it all: long chunks for the products' sake."""
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


def chunk_elements(device: str, *, compiled: bool = False) -> int:
    """Logits held at once on a device of this type."""
    if device == "cuda":
        return CUDA_CHUNK_ELEMENTS
    return COMPILED_CHUNK_ELEMENTS if compiled else CHUNK_ELEMENTS


def chunk_tokens(weight: Float[Tensor, "vocab hidden"], *, compiled: bool = False) -> int:
    """Tokens whose logits are made at once."""
    return max(1, chunk_elements(weight.device.type, compiled=compiled) // len(weight))


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps only the hidden states; backward walks the chunks again."""

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
        """Fill the outputs chunk by chunk; only hidden states and normalisers are kept."""
        count, kernels = len(targets), _kernels(weight, dtype)
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        normalisers, plain = torch.empty_like(logprobs), torch.empty_like(logprobs)
        entropy = torch.zeros_like(logprobs)
        read = _read if kernels is None else kernels.logprobs
        for part, _, logits in _chunks(hidden, weight.to(dtype), compiled=kernels is not None):
            found = read(logits, targets[part], temperature, entropy=want_entropy)
            logprobs[part], normalisers[part], plain[part] = found[:3]
            if found[3] is not None:
                entropy[part] = found[3]
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


def _gradients(
    ctx: Any,  # noqa: ANN401 - torch gives it no public type
    *grads: Tensor,
) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
    hidden, weight, targets, normalisers, entropy = ctx.saved_tensors
    want_hidden, want_weight = ctx.needs_input_grad[:2]
    grad_hidden = torch.empty_like(hidden) if want_hidden else None
    grad_weight = None
    matrix, kernels = weight.to(ctx.dtype), _kernels(weight, ctx.dtype)
    slopes = _slopes if kernels is None else kernels.logprobs_backward_
    for part, states, logits in _chunks(hidden, matrix, compiled=kernels is not None):
        to_entropy = grads[1][part] if ctx.want_entropy else None
        if to_entropy is not None and not bool(to_entropy.any()):
            to_entropy = None
        given = (targets[part], normalisers[part], entropy[part], grads[0][part], to_entropy)
        grad = slopes(logits, *given, ctx.temperature)
        if grad_hidden is not None:
            grad_hidden[part] = torch.mm(grad, matrix).to(hidden.dtype)
        if not want_weight:
            continue
        if grad_weight is None:
            grad_weight = torch.mm(grad.T, states).float()
        elif ctx.dtype == torch.float32:  # in place: no fresh [vocab, hidden] for every chunk
            grad_weight.addmm_(grad.T, states)
        else:
            grad_weight += torch.mm(grad.T, states)
    if want_weight:
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight
        grad_weight = grad_weight.to(weight.dtype)
    return grad_hidden, grad_weight, None, None, None, None


def _kernels(weight: Tensor, dtype: torch.dtype) -> Kernels | None:
    return kernels_for(dtype) if weight.device.type == "cpu" else None


def _chunks(
    hidden: Tensor, matrix: Tensor, *, compiled: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tokens that are read together, their states and logits in the matrix's dtype.

    The logits may be written to; the next chunk's are in their place.
    """
    count, size = len(hidden), chunk_tokens(matrix, compiled=compiled)
    room = matrix.new_empty(min(count, size), len(matrix))
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        states = hidden[part].to(matrix.dtype)
        yield part, states, torch.mm(states, matrix.T, out=room[: len(states)])


def _read(
    logits: Tensor, targets: Tensor, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`Kernels.logprobs` in PyTorch's operations; writes over fp32 logits."""
    x = logits.float()
    at_target = x.gather(1, targets[:, None]).squeeze(1)
    plain = None
    if temperature != 1.0:
        plain = at_target - x.logsumexp(1)
        x /= temperature
        at_target = at_target / temperature
    normaliser = x.logsumexp(1)
    logprobs = at_target - normaliser
    entropies = None
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
