"""KL(policy || reference) over the whole vocabulary, at target positions only and in chunks."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppomax.models.logprobs import chunk_tokens


class TargetStates(NamedTuple):
    """What a model's next-token distributions at the targets are made of."""

    hidden: Float[Tensor, "tokens hidden"]
    weight: Float[Tensor, "vocab hidden"]
    """The output matrix."""


def token_kl(
    own: TargetStates, reference: TargetStates, *, temperature: float = 1.0
) -> Float[Tensor, " tokens"]:
    """KL(own || reference) of the next-token distributions at each target, in nats, fp32.

    Both at the sampling temperature. Gradient flows to `own` alone; backward makes each chunk's
    logits anew, so that a few chunks over the vocabulary are all that is ever held.
    """
    device = own.hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else own.weight.dtype

    def chunk(hidden: Tensor, weight: Tensor, ref_hidden: Tensor) -> Tensor:
        logits = (hidden.to(dtype) @ weight.to(dtype).T).float() / temperature
        ref_logits = (ref_hidden.to(dtype) @ reference.weight.to(dtype).T).float() / temperature
        return categorical_kl(logits, ref_logits)

    size = chunk_tokens(own.weight)
    with torch.autocast(device, enabled=False):
        parts = [
            checkpoint(
                chunk,
                own.hidden[at : at + size],
                own.weight,
                reference.hidden[at : at + size],
                use_reentrant=False,
            )
            for at in range(0, len(own.hidden), size)
        ]
    return torch.cat(parts) if parts else own.hidden.new_zeros(0, dtype=torch.float32)


def categorical_kl(
    logits: Float[Tensor, "*shape vocab"], ref_logits: Float[Tensor, "*shape vocab"]
) -> Float[Tensor, "*shape"]:
    """KL(policy || reference) of next-token distributions over the whole vocabulary, in nats.

        sum_v pi(v) (log pi(v) - log pi_ref(v))

    Args:
        logits, ref_logits: finite; the reference's are constants.
    """
    log_policy = logits.log_softmax(dim=-1)
    log_reference = ref_logits.detach().log_softmax(dim=-1)
    return (log_policy.exp() * (log_policy - log_reference)).sum(dim=-1)
