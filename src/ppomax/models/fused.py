"""A Llama block in training as one operation: its products, and compiled kernels between them.

What `transformers` computes, with the same rounding in bf16 but for the sums of norms and softmax.
Kept for backward are the residual stream, heads as they were projected and after they are mixed,
gate and up; backward casts weights, and computes norms, rotations, shares and the MLP's product,
again. After attention the last block goes on with those tokens alone whose states are asked for.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ppomax.models.attention import LONGEST, MOST_SCORES, NAME
from ppomax.models.blocks import decoder_blocks
from ppomax.models.kernels import HeadNorms, Kernels, Turns, kernels_for
from ppomax.models.lean import GatedMLP, Norm, is_known

FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen3DecoderLayer")
"""Whose heads are rotated and mixed with nothing in between but, of Qwen 3, a norm of each."""
HEAD_NORMS = ("q_norm", "k_norm")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{name}") for name in HOOKS]
"""Of all modules: torch's own tables."""


def use_fused_blocks(model: PreTrainedModel) -> None:
    """Let blocks with lean parts, of a known family, run as one operation wherever they can.

    Their class becomes a subclass of what it was, so that names, hooks, checkpointing and sharding
    stay; calls that are not plain training go to the class it had.
    """
    for block in decoder_blocks(model):
        known = type(block).__name__ in FAMILIES and not isinstance(block, _Fused)
        if known and isinstance(getattr(block, "mlp", None), GatedMLP):
            kind: Any = type(block)
            block.__class__ = _fused(kind)


def is_fused(model: PreTrainedModel) -> bool:
    """Whether its blocks are of a known family, and there are kernels for them."""
    blocks = [block for block in decoder_blocks(model) if isinstance(block, _Fused)]
    plain = all(getattr(part, "bias", None) is None for block in blocks for part in _parts(block))
    return bool(blocks) and plain and kernels_for(torch.float32) is not None


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Whose states a caller reads."""

    last: nn.Module
    """The block that heeds it: what others make of a token, later ones read."""
    tokens: Int[Tensor, " asked"]
    """Of all texts, one after the other."""


def asked_of(
    backbone: Any,  # noqa: ANN401 - each architecture's class
    asked: Bool[Tensor, "batch length"],
) -> dict[str, Asked]:
    """An argument for a backbone's forward, whose states of other tokens then mean nothing.

    Empty, which is without effect, where its last block is none of these, where that is watched, on
    another device, and of a model that is not `transformers`' own and may not pass it on.
    """
    blocks = getattr(backbone, "layers", None)
    last = blocks[-1] if isinstance(blocks, nn.ModuleList) and blocks else None
    if asked.device.type != "cpu" or not isinstance(last, _Fused) or "forward" in vars(last):
        return {}
    if last._forward_hooks or not type(backbone).__module__.startswith("transformers.models."):
        return {}
    return {"asked": Asked(last, asked.flatten().nonzero().flatten())}


class _Fused:
    """Marks the subclasses, which no module holds: a copy or a pickle makes its class anew."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:  # noqa: ANN401 - as object's
        reduced: Any = super().__reduce_ex__(protocol)
        _, (kind, *_), *state = reduced
        return _again, (kind.__bases__[1],), *state


def _again(family: Any) -> Any:  # noqa: ANN401 - each architecture's class
    kind = _fused(family)
    return kind.__new__(kind)


@cache
def _fused(family: Any) -> Any:  # noqa: ANN401 - each architecture's class
    def forward(
        self: Any,  # noqa: ANN401 - a block of the family
        hidden_states: Tensor,
        *args: Any,  # noqa: ANN401 - as the family's
        **kwargs: Any,  # noqa: ANN401 - as the family's
    ) -> Any:  # noqa: ANN401 - as the family's
        asked: Asked | None = kwargs.pop("asked", None)
        parts = _parts(self)
        layout = None if args else _layout(self, parts, hidden_states, kwargs)
        if layout is None:
            return family.forward(self, hidden_states, *args, **kwargs)
        tokens = asked.tokens if asked is not None and asked.last is self else None
        weights = [part.weight for part in parts]
        return _Block.apply(layout, tokens, hidden_states, *weights)  # type: ignore[no-untyped-call]

    return type(
        family.__name__, (_Fused, family), {"forward": forward, "__module__": family.__module__}
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """How a batch is read."""

    kernels: Kernels
    heads: int
    kv_heads: int
    scale: float
    turns: Turns
    attention_eps: float
    mlp_eps: float
    heads_eps: float

    def norms(self, weights: Sequence[Tensor]) -> HeadNorms:
        """Of heads, where they have any."""
        if not weights:
            return HeadNorms()
        q, k = (weight.float() for weight in weights)
        return HeadNorms(q, k, self.heads_eps)


def _parts(block: Any) -> tuple[Any, ...]:  # noqa: ANN401 - each architecture's class
    """What has weights, in the order of the operation."""
    attention, mlp = block.self_attn, block.mlp
    return (
        *(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj),
        *(attention.o_proj, block.post_attention_layernorm),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        *(attention._modules[name] for name in HEAD_NORMS if name in attention._modules),
    )


def _layout(
    block: Any,  # noqa: ANN401 - each architecture's class
    parts: Sequence[Any],
    x: Tensor,
    rest: dict[str, Any],
) -> Layout | None:
    """How to read this batch; None where it is not plain causal text on a processor."""
    attention = block.self_attn
    turns: tuple[Tensor, ...] = rest.get("position_embeddings") or ()
    config = attention.config
    heads = int(config.num_attention_heads)
    plain = (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and 1 < x.shape[1] <= LONGEST
        and x.shape[0] * heads * x.shape[1] ** 2 <= MOST_SCORES
        and len(turns) == 2
        and all(turn.dtype == torch.float32 for turn in turns)
        and rest.get("attention_mask") is None
        and rest.get("past_key_values") is None
        and not rest.get("output_attentions")
        and rest.get("is_causal") in (None, True)
        and getattr(attention, "is_causal", True)
        and not (attention.training and attention.attention_dropout)
        and config._attn_implementation == NAME
    )
    if not plain:
        return None
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
    kv_heads = int(config.num_key_value_heads)
    kernels = kernels_for(dtype)
    if kernels is None or not _is_plain(block, parts, dtype):
        return None
    dim = turns[0].shape[-1]
    sizes = [len(part.weight) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    if sizes != [heads * dim, kv_heads * dim, kv_heads * dim]:
        return None
    if not all(t.shape in ((1, x.shape[1], dim), (*x.shape[:2], dim)) for t in turns):
        return None
    return Layout(
        kernels,
        heads,
        kv_heads,
        float(attention.scaling),
        Turns(*(turn.contiguous() for turn in turns)),
        block.input_layernorm.variance_epsilon,
        block.post_attention_layernorm.variance_epsilon,
        parts[-1].variance_epsilon if parts[9:] else 0.0,
    )


def _is_plain(
    block: Any,  # noqa: ANN401 - each architecture's class
    parts: Sequence[Any],
    dtype: torch.dtype,
) -> bool:
    """Whether weights are all there is to its parts, fp32 or in the compute dtype.

    No adapter, no bias, nobody who watches or replaces a call.
    """
    if any(GLOBAL_HOOKS):
        return False
    for part in parts:
        kind = type(part)
        known = kind is Norm or (kind is nn.Linear and part.bias is None)
        if not (known or is_known(part, "RMSNorm")):
            return False
        if part.weight.dtype not in (torch.float32, dtype):
            return False
    watched = (*parts, block.self_attn, block.mlp)
    return not any(getattr(part, name) for part in watched for name in HOOKS) and not any(
        "forward" in vars(part) for part in watched
    )


def _side_by_side(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices below one another in the compute dtype."""
    if len(weights) == 1:
        return weights[0].to(dtype)
    whole = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype)
    for place, weight in zip(torch.split(whole, list(map(len, weights))), weights, strict=True):
        place.copy_(weight)
    return whole


def _product(x: Tensor, *weights: Tensor) -> Tensor:
    """X W', for matrices that read the same."""
    return torch.mm(x, _side_by_side(weights, x.dtype).T)


def _to_input(gradient: Tensor, *weights: Tensor) -> Tensor:
    """What `_product` read."""
    return torch.mm(gradient, _side_by_side(weights, gradient.dtype))


def _to_weights(
    gradient: Tensor, x: Tensor, weights: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """What `_product` read it with; None for those that want no gradient."""
    if not any(wanted):
        return [None] * len(weights)
    found = torch.split(torch.mm(gradient.T, x).float(), list(map(len, weights)))
    return [one if want else None for one, want in zip(found, wanted, strict=True)]


def _split(
    qkv: Tensor, layout: Layout, head_norms: Sequence[Tensor], batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they are mixed."""
    norms, heads = layout.norms(head_norms), (layout.heads, layout.kv_heads)
    return layout.kernels.split_heads(qkv, layout.turns, norms, batch, *heads)


def _groups(heads: Tensor, groups: int) -> Tensor:
    """[batch, heads, length, dim] as [batch * groups, heads / groups * length, dim]."""
    return heads.view(len(heads) * groups, -1, heads.shape[-1])


def _shares(q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """Causal softmax of the scaled scores, [batch * groups, heads / groups * length, length]."""
    groups = k.shape[1]
    rows, keys = _groups(q, groups), _groups(k, groups).mT
    scores = ROOMS.shares.of(q, *rows.shape[:2], keys.shape[2])
    torch.baddbmm(q.new_empty(()), rows, keys, beta=0, alpha=layout.scale, out=scores)
    return layout.kernels.softmax_(scores)


def _only(asked: Tensor | None, rows: Tensor) -> Tensor:
    """The tokens that are asked for; None: all are."""
    return rows if asked is None else rows[asked]


def _among_all(asked: Tensor | None, rows: Tensor, like: Tensor) -> Tensor:
    """The way back, to as many tokens as `like` has; 0 for the others."""
    if asked is None:
        return rows
    return rows.new_zeros(len(like), rows.shape[1]).index_copy_(0, asked, rows)


class _Room:
    """Memory for one tensor at a time, whose size changes from call to call."""

    def __init__(self) -> None:
        self.held = torch.empty(0)

    def of(self, like: Tensor, *shape: int) -> Tensor:
        """A tensor of this shape that the next one of this room overwrites."""
        size = math.prod(shape)
        if self.held.dtype != like.dtype or len(self.held) < size:
            with torch.inference_mode(mode=False):  # training may be next to write to it
                self.held = like.new_empty(size)
        return self.held[:size].view(shape)


class _Rooms(threading.local):
    """For scores and their gradient, the largest tensors that a block makes and drops.

    Among blocks of what is kept for backward, each would leave a hole of its size.
    """

    def __init__(self) -> None:
        self.shares, self.gradient = _Room(), _Room()


ROOMS = _Rooms()


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        layout: Layout,
        asked: Int[Tensor, " asked"] | None,
        hidden: Float[Tensor, "batch length hidden"],
        *weights: Tensor,
    ) -> Float[Tensor, "batch length hidden"]:
        with torch.autocast("cpu", enabled=False):  # every dtype is said
            return _forward(ctx, layout, asked, hidden, *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        with torch.autocast("cpu", enabled=False):
            return _backward(ctx, gradient)


def _forward(
    ctx: Any,  # noqa: ANN401 - autograd's
    layout: Layout,
    asked: Tensor | None,
    hidden: Tensor,
    *weights: Tensor,
) -> Tensor:
    norm, query, key, value, out, mlp_norm, gate, up, down, *head_norms = weights
    kernels, batch = layout.kernels, len(hidden)
    x = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    normed = kernels.norm(x, norm.float(), layout.attention_eps)
    qkv = _product(normed, query, key, value)
    q, k, v = _split(qkv, layout, head_norms, batch)
    shares = _shares(q, k, layout)
    mixed = torch.bmm(shares, _groups(v, k.shape[1])).view(q.shape)
    mixed = mixed.transpose(1, 2).reshape(len(x), -1)
    around, mixed = _only(asked, x), _only(asked, mixed)
    between, mlp_normed = kernels.add_and_norm(
        around, _product(mixed, out), mlp_norm.float(), layout.mlp_eps
    )
    gate_up = _product(mlp_normed, gate, up)
    total = between + _product(kernels.swiglu(gate_up), down)
    ctx.save_for_backward(asked, x, qkv, mixed, between, gate_up, *weights)
    ctx.layout = layout
    return _among_all(asked, total, x).view(hidden.shape)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
    asked, x, qkv, mixed, between, gate_up, *weights = ctx.saved_tensors
    norm, query, key, value, out, mlp_norm, gate, up, down, *head_norms = weights
    layout, wanted = ctx.layout, ctx.needs_input_grad[3:]
    kernels, groups = layout.kernels, layout.kv_heads
    around = _only(asked, gradient.reshape(x.shape).contiguous())

    rounded = around.to(qkv.dtype)
    to_gate_up, product = kernels.swiglu_backward(gate_up, _to_input(rounded, down))
    to_down = _to_weights(rounded, product, [down], wanted[8:9])
    mlp_normed = kernels.norm(between, mlp_norm.float(), layout.mlp_eps)
    to_gate = _to_weights(to_gate_up, mlp_normed, [gate, up], wanted[6:8])
    around, rounded, to_mlp_norm = kernels.norm_backward(
        between, mlp_norm.float(), _to_input(to_gate_up, gate, up), around, layout.mlp_eps
    )
    to_out = _to_weights(rounded, mixed, [out], wanted[4:5])
    around, to_mixed = _among_all(asked, around, x), _among_all(asked, _to_input(rounded, out), x)
    q, k, v = _split(qkv, layout, head_norms, len(gradient))
    to_mixed = to_mixed.view(len(q), q.shape[2], -1, q.shape[3])
    mixing = _groups(to_mixed.transpose(1, 2).contiguous(), groups)
    shares = _shares(q, k, layout)
    to_scores = ROOMS.gradient.of(v, *shares.shape)
    torch.bmm(mixing, _groups(v, groups).mT, out=to_scores)
    kernels.softmax_backward_(shares, to_scores, layout.scale)
    to_qkv, to_head_norms = kernels.join_heads(
        torch.bmm(to_scores, _groups(k, groups)).view(q.shape),
        torch.bmm(to_scores.mT, _groups(q, groups)).view(k.shape),
        torch.bmm(shares.mT, mixing).view(k.shape),
        qkv,
        layout.turns,
        layout.norms(head_norms),
    )
    normed = kernels.norm(x, norm.float(), layout.attention_eps)
    to_query = _to_weights(to_qkv, normed, [query, key, value], wanted[1:4])
    to_x, _, to_norm = kernels.norm_backward(
        x, norm.float(), _to_input(to_qkv, query, key, value), around, layout.attention_eps
    )
    to_weights = (to_norm, *to_query, *to_out, to_mlp_norm, *to_gate, *to_down)
    if head_norms:
        to_weights += (*to_head_norms,)
    return None, None, to_x.view(gradient.shape), *to_weights
