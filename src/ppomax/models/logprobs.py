"""Log-probs and entropy of chosen tokens without the [batch, sequence, vocab] tensor.

Hidden states of target positions only, in chunks; backward recomputes each chunk's logits. All sums
over the vocabulary are fp32, whatever dtype the matrix product ran in.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Logits held at once; 64 MB in fp32."""


class TokenLogprobs(NamedTuple):
    """Per target token, fp32."""

    logprobs: Float[Tensor, " tokens"]
    """At the sampling temperature."""
    entropy: Float[Tensor, " tokens"]
    """Of the next-token distribution at the sampling temperature, in nats."""
    plain: Float[Tensor, " tokens"]
    """Log-probs at temperature 1, without gradient."""


def token_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float = 1.0,
) -> TokenLogprobs:
    """Log softmax(hidden @ weight.T / temperature) at the targets, and its entropy.

    Both outputs carry gradient to `hidden` and `weight`.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    with torch.autocast(device, enabled=False):
        logprobs, entropy, plain = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]  # in torch
            hidden, weight, targets, temperature, dtype
        )
    return TokenLogprobs(logprobs, entropy, plain)


def _chunk(vocab: int) -> int:
    return max(1, CHUNK_ELEMENTS // vocab)


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fill the three outputs chunk by chunk."""
        count, size = len(targets), _chunk(len(weight))
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy, plain = torch.empty_like(logprobs), torch.empty_like(logprobs)
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
            logprobs[part] = at_target - normaliser
            probabilities = torch.softmax(logits, 1)
            entropy[part] = normaliser - torch.linalg.vecdot(probabilities, logits)
        if temperature == 1.0:
            plain.copy_(logprobs)
        ctx.save_for_backward(hidden, weight, targets, entropy)
        ctx.temperature, ctx.dtype = temperature, dtype
        ctx.mark_non_differentiable(plain)
        return logprobs, entropy, plain

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - torch gives it no public type
        *grads: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Softmax gradients, logits made anew."""
        hidden, weight, targets, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads[0], grads[1]
        count, size = len(targets), _chunk(len(weight))
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        matrix = weight.to(ctx.dtype)
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            states = hidden[part].to(ctx.dtype)
            logits = torch.mm(states, matrix.T).float()
            logprobs = torch.log_softmax(logits / ctx.temperature, 1)
            probabilities = logprobs.exp()
            # d logprob / d logits = onehot - p;  d entropy / d logits = -p (log p + H)
            grad = -probabilities * grad_logprobs[part, None]
            grad.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            if bool(grad_entropy[part].any()):
                grad -= probabilities * (logprobs + entropy[part, None]) * grad_entropy[part, None]
            grad = (grad / ctx.temperature).to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = torch.mm(grad, matrix).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += torch.mm(grad.T, states)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None
