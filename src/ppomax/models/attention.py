"""Attention on a processor in bfloat16, as plain batched products with query heads in groups.

PyTorch's fused kernel is slow in bfloat16 at the lengths of dialogues, its backward most of all
(docs/LOG.md has the ratios). Everything else goes to `transformers`' own `sdpa`.
"""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ppomax-grouped"
"""Under which `transformers` knows it."""
MODEL_TYPES = frozenset({"llama", "mistral", "qwen3", "smollm3"})
"""Architectures that attend so: tried, and their scores stay small enough to be rounded to bf16
(those of SmolLM2 below 60), which the kernel does not do. Some of the others choose their masks by
the name `sdpa`."""
LONGEST = 512
"""Tokens; the square of scores is written to memory, and longer ones cost more than they save."""
MOST_SCORES = 2**25
"""Of all rows and heads of a call: 64 MB in bfloat16 (of blocks that run as one operation, 128 in
fp32), and backward holds three such at once."""


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model attend this way where it is known to be right and faster; no export names it."""
    if model.config.model_type in MODEL_TYPES:
        model.set_attn_implementation(NAME)


def grouped_attention(
    q: Float[Tensor, "batch heads sequence dim"],
    k: Float[Tensor, "batch groups sequence dim"],
    v: Float[Tensor, "batch groups sequence dim"],
    mask: Shaped[Tensor, "#batch 1 sequence sequence"] | None,
    scale: float,
) -> Float[Tensor, "batch heads sequence dim"]:
    """softmax(scale q k' + mask) v, the keys and values of a group shared by its query heads.

    Heads and mask alone are kept for backward, which computes the scores again.

    Args:
        mask: additive, or true where a query sees a key; a query that sees none gets the mean
            value. None: every token sees itself and those before it.
    """
    mixed: Tensor = _Grouped.apply(q, k, v, mask, scale)  # type: ignore[no-untyped-call]
    return mixed


def _stacked(heads: Tensor, groups: int) -> Tensor:
    """[batch, heads, sequence, dim] as [batch * groups, heads / groups * sequence, dim]."""
    return heads.reshape(len(heads) * groups, -1, heads.shape[-1])


def _additive(mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask in the dtype of the scores, its lowest finite number where nothing is seen."""
    lowest = torch.finfo(like.dtype).min
    if mask is None:
        length = like.shape[2]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=like.device).tril_()
    if mask.dtype == torch.bool:
        return like.new_zeros(mask.shape).masked_fill_(~mask, lowest)
    return mask.clamp(min=lowest).to(like.dtype)


def _shares(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax of the scores, stacked: [batch * groups, heads / groups * sequence, sequence]."""
    batch, groups, length, _ = k.shape
    rows, keys = _stacked(q, groups), _stacked(k, groups).mT
    scores = torch.baddbmm(q.new_empty(()), rows, keys, beta=0, alpha=scale)
    scores.view(batch, -1, length, length).add_(_additive(mask, q))
    return torch.softmax(scores, -1)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return torch.bmm(_shares(q, k, mask, scale), _stacked(v, k.shape[1])).view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        q, k, v, mask = ctx.saved_tensors
        groups = k.shape[1]
        shares = _shares(q, k, mask, ctx.scale)
        mixed = _stacked(gradient, groups)
        to_shares = torch.bmm(mixed, _stacked(v, groups).mT)
        to_scores = torch._softmax_backward_data(to_shares, shares, -1, shares.dtype)
        to_scores *= ctx.scale
        to_q = torch.bmm(to_scores, _stacked(k, groups)).view(q.shape)
        to_k = torch.bmm(to_scores.mT, _stacked(q, groups)).view(k.shape)
        to_v = torch.bmm(shares.mT, mixed).view(v.shape)
        return to_q, to_k, to_v, None, None


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,  # noqa: ANN401 - what an architecture adds
) -> tuple[Tensor, None]:
    """What `transformers` calls: heads in, [batch, sequence, heads, dim] out."""
    causal = rest.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not (causal and _fits(query, key, value, attention_mask, dropout, rest)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    q, k, v = (part.to(torch.bfloat16) for part in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return grouped_attention(q, k, v, attention_mask, scale).transpose(1, 2).contiguous(), None


def _fits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    rest: dict[str, Any],
) -> bool:
    """Whether a call is plain attention of a whole short sequence, in bfloat16, on a processor."""
    length = query.shape[2]
    bf16 = query.dtype == torch.bfloat16 or (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    return (
        bf16
        and query.device.type == "cpu"
        and 1 < length <= LONGEST
        and query.shape[:2].numel() * length**2 <= MOST_SCORES
        and key.shape[2] == length
        and key.shape == value.shape
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or mask.shape[1:] == (1, length, length))
        and not dropout
        and not rest.get("output_attentions")
        and all(rest.get(name) is None for name in ("softcap", "cache", "position_bias"))
    )


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
