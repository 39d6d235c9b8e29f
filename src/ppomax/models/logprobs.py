"""Log-probs and entropy of chosen tokens without the [batch, sequence, vocab] tensor.

Hidden states of target positions only, in chunks; backward recomputes each chunk's logits. All sums
over the vocabulary are fp32, whatever dtype the matrix product ran in.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Logits held at once: 16 MB in fp32, so that a chunk's passes stay in cache on a CPU."""
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
        count, size = len(targets), chunk_tokens(weight)
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        normalisers, plain = torch.empty_like(logprobs), torch.empty_like(logprobs)
        entropy = torch.zeros_like(logprobs)
        matrix = weight.to(dtype).T
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            logits = torch.mm(hidden[part].to(dtype), matrix).float()
            at_target = logits.gather(1, targets[part, None]).squeeze(1)
            if temperature != 1.0:
                plain[part] = at_target - logits.logsumexp(1)
                logits /= temperature
                at_target = at_target / temperature
            normaliser = logits.logsumexp(1)
            normalisers[part] = normaliser
            logprobs[part] = at_target - normaliser
            if want_entropy:
                logits -= normaliser[:, None]  # log-probs; p times the logits would cancel
                entropy[part] = -torch.linalg.vecdot(logits.exp(), logits)
        if temperature == 1.0:
            plain.copy_(logprobs)
        ctx.save_for_backward(hidden, weight, targets, normalisers, entropy)
        ctx.temperature, ctx.dtype, ctx.want_entropy = temperature, dtype, want_entropy
        ctx.mark_non_differentiable(plain)
        return logprobs, entropy, plain

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - torch gives it no public type
        *grads: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """Softmax gradients, logits made anew; passes over the vocabulary are in place."""
        hidden, weight, targets, normalisers, entropy = ctx.saved_tensors
        count, size = len(targets), chunk_tokens(weight)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        matrix = weight.to(ctx.dtype)
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            states = hidden[part].to(ctx.dtype)
            grad_logprobs = grads[0][part, None] / ctx.temperature
            x = torch.mm(states, matrix.T).float()
            if ctx.temperature != 1.0:
                x /= ctx.temperature
            x -= normalisers[part, None]
            # d logprob / d logits = onehot - p;  d entropy / d logits = -p (log p + H)
            if ctx.want_entropy and bool(grads[1][part].any()):
                grad_entropy = grads[1][part, None] / ctx.temperature
                slope = grad_logprobs + (x + entropy[part, None]) * grad_entropy
                x.exp_().mul_(slope).neg_()
            else:
                x.exp_().mul_(-grad_logprobs)
            x.scatter_add_(1, targets[part, None], grad_logprobs)
            grad = x.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = torch.mm(grad, matrix).to(hidden.dtype)
            if grad_weight is None:
                continue
            if ctx.dtype == torch.float32:  # in place: no fresh [vocab, hidden] for every chunk
                grad_weight.addmm_(grad.T, states)
            else:
                grad_weight += torch.mm(grad.T, states)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None
