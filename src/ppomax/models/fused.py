"""A Llama block in training as one operation: its products, and compiled kernels between them.

What `transformers` computes, with the same rounding in bf16 but for the sums of norms and softmax,
and for gradients of weights where products are computed in tiles.
Kept for backward are the residual stream, heads as they were projected and after they are mixed,
gate and up; backward rounds weights, and computes norms, rotations, shares and the MLP's product,
again.

Where a caller says whose states it reads, blocks read a batch as its distinct prefixes
(`Reading`), and the last one goes on, after attention, with those alone that are asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ppomax.models import products
from ppomax.models.attention import LONGEST, MOST_SCORES, NAME
from ppomax.models.blocks import decoder_blocks
from ppomax.models.kernels import HeadNorms, Kernels, Turns, kernels_for
from ppomax.models.lean import GatedMLP, Norm, is_known
from ppomax.models.prefixes import Reading, Texts
from ppomax.models.rooms import ROOMS

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
        known = type(block).__name__ in FAMILIES and not isinstance(block, Fused)
        if known and isinstance(getattr(block, "mlp", None), GatedMLP):
            kind: Any = type(block)
            block.__class__ = _fused(kind)


def is_fused(model: PreTrainedModel) -> bool:
    """Whether its blocks are of a known family, and there are kernels for them."""
    blocks = [block for block in decoder_blocks(model) if isinstance(block, Fused)]
    plain = all(getattr(part, "bias", None) is None for block in blocks for part in parts_of(block))
    return bool(blocks) and plain and kernels_for(torch.float32) is not None


class Fused:
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
        reading: Reading | None = kwargs.pop("reading", None)
        parts = parts_of(self)
        layout = None if args else _layout(self, parts, hidden_states, kwargs, reading)
        if layout is None:
            assert reading is None, "whoever gives one has asked before"
            return family.forward(self, hidden_states, *args, **kwargs)
        rows = reading.rows if reading is not None and reading.last is self else None
        weights = [part.weight for part in parts]
        return _Block.apply(layout, rows, hidden_states, *weights)  # type: ignore[no-untyped-call]

    return type(
        family.__name__, (Fused, family), {"forward": forward, "__module__": family.__module__}
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """How a batch is read."""

    kernels: Kernels
    texts: Texts
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


def parts_of(block: Any) -> tuple[Any, ...]:  # noqa: ANN401 - each architecture's class
    """What has weights, in the order of the operation."""
    attention, mlp = block.self_attn, block.mlp
    return (
        *(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj),
        *(attention.o_proj, block.post_attention_layernorm),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        *(attention._modules[name] for name in HEAD_NORMS if name in attention._modules),
    )


def fits(batch: int, length: int, config: Any) -> bool:  # noqa: ANN401 - each architecture's class
    """Whether attention of such texts is read this way."""
    scores = batch * int(config.num_attention_heads) * length**2
    return 1 < length <= LONGEST and scores <= MOST_SCORES


def compute_dtype() -> torch.dtype:
    """Of matrix products: autocast's where that is on."""
    autocast = torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if autocast else torch.float32


def _layout(
    block: Any,  # noqa: ANN401 - each architecture's class
    parts: Sequence[Any],
    x: Tensor,
    rest: dict[str, Any],
    reading: Reading | None,
) -> Layout | None:
    """How to read this batch; None where it is not plain causal text on a processor."""
    turns: tuple[Tensor, ...] = rest.get("position_embeddings") or ()
    dtype = compute_dtype()
    kernels = kernels_for(dtype)
    if kernels is None or len(turns) != 2 or x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    dim = turns[0].shape[-1]
    if not all(
        turn.dtype == torch.float32 and turn.shape in ((1, x.shape[1], dim), (*x.shape[:2], dim))
        for turn in turns
    ):
        return None
    attention = block.self_attn
    if reading is None and not (
        fits(x.shape[0], x.shape[1], attention.config)
        and rest.get("attention_mask") is None
        and rest.get("past_key_values") is None
        and not rest.get("output_attentions")
        and rest.get("is_causal") in (None, True)
        and is_plain(block, parts, dtype, dim)
    ):
        return None
    return Layout(
        kernels,
        Texts(x.shape[0], x.shape[1]) if reading is None else reading.prefixes.texts,
        int(attention.config.num_attention_heads),
        int(attention.config.num_key_value_heads),
        float(attention.scaling),
        Turns(*(turn.flatten(0, 1).contiguous() for turn in turns)),
        block.input_layernorm.variance_epsilon,
        block.post_attention_layernorm.variance_epsilon,
        parts[-1].variance_epsilon if parts[9:] else 0.0,
    )


def is_plain(
    block: Any,  # noqa: ANN401 - each architecture's class
    parts: Sequence[Any],
    dtype: torch.dtype,
    dim: int,
) -> bool:
    """Whether weights are all there is to its parts, fp32 or in the compute dtype.

    No adapter, no bias, nobody who watches or replaces a call; attention is causal, drops nothing
    and has heads of `dim` numbers, all of which are rotated.
    """
    attention = block.self_attn
    if any(GLOBAL_HOOKS) or attention.config._attn_implementation != NAME:
        return False
    if not getattr(attention, "is_causal", True):
        return False
    if attention.training and attention.attention_dropout:
        return False
    for part in parts:
        kind = type(part)
        known = kind is Norm or (kind is nn.Linear and part.bias is None)
        if not (known or is_known(part, "RMSNorm")):
            return False
        if part.weight.dtype not in (torch.float32, dtype):
            return False
    heads, kv_heads = (
        int(getattr(attention.config, f"num_{kind}_heads")) for kind in ("attention", "key_value")
    )
    sizes = [len(part.weight) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    if sizes != [heads * dim, kv_heads * dim, kv_heads * dim]:
        return False
    watched = (*parts, attention, block.mlp)
    return not any(getattr(part, name) for part in watched for name in HOOKS) and not any(
        "forward" in vars(part) for part in watched
    )


def _to_weights(
    gradient: Tensor, x: Tensor, weights: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """What `products.forward` read with; None for those that want no gradient."""
    if not any(wanted):
        return [None] * len(weights)
    found = torch.split(products.to_weight(gradient, x), list(map(len, weights)))
    return [one if want else None for one, want in zip(found, wanted, strict=True)]


def _split(
    qkv: Tensor, layout: Layout, head_norms: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they are mixed."""
    norms, heads = layout.norms(head_norms), (layout.heads, layout.kv_heads)
    return layout.kernels.split_heads(qkv, layout.turns, norms, layout.texts, *heads)


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


def _only(read: Tensor | None, rows: Tensor) -> Tensor:
    """Those that are read; None: all are."""
    return rows if read is None else rows[read]


def _among_all(read: Tensor | None, rows: Tensor, like: Tensor) -> Tensor:
    """The way back, to as many rows as `like` has; 0 for the others."""
    if read is None:
        return rows
    return rows.new_zeros(len(like), rows.shape[1]).index_copy_(0, read, rows)


def _places(read: Tensor | None, layout: Layout) -> Tensor | None:
    """Where the rows that are read stand first."""
    places = layout.texts.places
    return places if read is None or places is None else places[read]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        layout: Layout,
        read: Int[Tensor, " read"] | None,
        hidden: Float[Tensor, "batch length hidden"],
        *weights: Tensor,
    ) -> Float[Tensor, "batch read hidden"]:
        with torch.autocast("cpu", enabled=False):  # every dtype is said
            return _forward(ctx, layout, read, hidden, *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        with torch.autocast("cpu", enabled=False):
            return _backward(ctx, gradient)


def _forward(
    ctx: Any,  # noqa: ANN401 - autograd's
    layout: Layout,
    read: Tensor | None,
    hidden: Tensor,
    *weights: Tensor,
) -> Tensor:
    norm, query, key, value, out, mlp_norm, gate, up, down, *head_norms = weights
    kernels = layout.kernels
    x = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    normed = kernels.norm(x, norm.float(), layout.attention_eps)
    qkv = products.forward(normed, query, key, value)
    q, k, v = _split(qkv, layout, head_norms)
    mixed = torch.bmm(_shares(q, k, layout), _groups(v, k.shape[1])).view(q.shape)
    mixed = kernels.gather_heads(mixed, _places(read, layout))
    between, mlp_normed = kernels.add_and_norm(
        _only(read, x), products.forward(mixed, out), mlp_norm.float(), layout.mlp_eps
    )
    gate_up = products.forward(mlp_normed, gate, up)
    total = between + products.forward(kernels.swiglu(gate_up), down)
    ctx.save_for_backward(read, x, qkv, mixed, between, gate_up, *weights)
    ctx.layout = layout
    return total.view(len(hidden), -1, hidden.shape[-1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
    read, x, qkv, mixed, between, gate_up, *weights = ctx.saved_tensors
    norm, query, key, value, out, mlp_norm, gate, up, down, *head_norms = weights
    layout, wanted = ctx.layout, ctx.needs_input_grad[3:]
    kernels, groups = layout.kernels, layout.kv_heads
    around = gradient.reshape(between.shape).contiguous()

    rounded = around.to(qkv.dtype)
    to_gate_up, product = kernels.swiglu_backward(gate_up, products.to_input(rounded, down))
    to_down = _to_weights(rounded, product, [down], wanted[8:9])
    mlp_normed = kernels.norm(between, mlp_norm.float(), layout.mlp_eps)
    to_gate = _to_weights(to_gate_up, mlp_normed, [gate, up], wanted[6:8])
    around, rounded, to_mlp_norm = kernels.norm_backward(
        between, mlp_norm.float(), products.to_input(to_gate_up, gate, up), around, layout.mlp_eps
    )
    to_out = _to_weights(rounded, mixed, [out], wanted[4:5])
    q, k, v = _split(qkv, layout, head_norms)
    to_mixed = kernels.scatter_heads(
        products.to_input(rounded, out), layout.texts, q.shape[3], _places(read, layout)
    )
    mixing = _groups(to_mixed, groups)
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
        layout.texts,
    )
    normed = kernels.norm(x, norm.float(), layout.attention_eps)
    to_query = _to_weights(to_qkv, normed, [query, key, value], wanted[1:4])
    to_x, _, to_norm = kernels.norm_backward(
        x,
        norm.float(),
        products.to_input(to_qkv, query, key, value),
        _among_all(read, around, x),
        layout.attention_eps,
    )
    to_weights = (to_norm, *to_query, *to_out, to_mlp_norm, *to_gate, *to_down)
    if head_norms:
        to_weights += (*to_head_norms,)
    return None, None, to_x.view(len(gradient), -1, x.shape[1]), *to_weights
