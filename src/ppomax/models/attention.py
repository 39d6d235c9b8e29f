"""Attention on a processor in bfloat16, as plain batched products with query heads in groups.

PyTorch's fused kernel is slow in bfloat16 at the lengths of dialogues, its backward most of all
(docs/LOG.md has the ratios). Everything else goes to `transformers`' own `sdpa`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ppomax-grouped"
"""Under which `transformers` knows it."""
LONGEST = 512
"""Tokens; the square of scores is written to memory, and longer ones cost more than they save."""


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model that has `sdpa` attend this way where it is faster; no export names it."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def grouped_attention(
    q: Float[Tensor, "batch heads sequence dim"],
    k: Float[Tensor, "batch groups sequence dim"],
    v: Float[Tensor, "batch groups sequence dim"],
    mask: Float[Tensor, "#batch 1 sequence sequence"],
    scale: float,
) -> Float[Tensor, "batch heads sequence dim"]:
    """softmax(scale q k' + mask) v, the keys and values of a group shared by its query heads.

    Nothing of the size sequence x sequence is kept for backward: it computes the scores again.

    Args:
        mask: additive; minus infinity hides a key, and every query sees one at least.
    """
    mixed: Tensor = _Grouped.apply(q, k, v, mask, scale)  # type: ignore[no-untyped-call]
    return mixed


def _stacked(heads: Tensor, groups: int) -> Tensor:
    """[batch, heads, sequence, dim] as [batch * groups, heads / groups * sequence, dim]."""
    return heads.reshape(len(heads) * groups, -1, heads.shape[-1])


def _shares(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax of the scores, stacked: [batch * groups, heads / groups * sequence, sequence]."""
    batch, groups, length, _ = k.shape
    rows, keys = _stacked(q, groups), _stacked(k, groups).mT
    scores = torch.baddbmm(q.new_empty(()), rows, keys, beta=0, alpha=scale)
    scores.view(batch, -1, length, length).add_(mask)
    return torch.softmax(scores, -1)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:  # noqa: ANN401 - autograd's
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
    mask = _additive(attention_mask, q)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return grouped_attention(q, k, v, mask, scale).transpose(1, 2).contiguous(), None


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
        and key.shape[2] == length
        and key.shape == value.shape
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or mask.shape[1:] == (1, length, length))
        and not dropout
        and not any(rest.get(name) for name in ("softcap", "output_attentions", "cache"))
        and rest.get("position_bias") is None
    )


def causal_mask(
    heads: Float[Tensor, "batch heads sequence dim"],
) -> Float[Tensor, "1 1 sequence sequence"]:
    """Additive, in the dtype of the heads: what comes later is hidden."""
    length = heads.shape[2]
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu_(1)
    return heads.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask in the dtype of the scores; causal where none is given."""
    if mask is None:
        return causal_mask(like)
    if mask.dtype == torch.bool:
        return like.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return mask.clamp(min=torch.finfo(like.dtype).min).to(like.dtype)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
