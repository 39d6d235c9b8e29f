"""A Llama-type block's norms and MLP as `transformers` computes them, with less kept for backward.

There every step of a norm is kept, its fp32 output is cast anew for each linear layer that reads
it, and the activation of the gate stands beside what it was made from. Forward is the same to the
bit; of SmolLM2's 30 KB a token and block 11 are saved in bfloat16.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ppomax.models.blocks import decoder_blocks

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
"""Whose norm is weight · x / rms(x), and whose MLP is down(silu(gate(x)) · up(x))."""
READ_BY_LINEAR = ("input_layernorm", "post_attention_layernorm")
"""Norms of a block whose output nothing but linear layers reads."""


class Norm(nn.Module):
    """Takes the place of a model's own norm, whose weight it keeps under the same name."""

    weight: nn.Parameter
    variance_epsilon: float

    def __init__(self, norm: Any) -> None:  # noqa: ANN401 - each architecture's class
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self.plain = type(norm).forward
        """What `transformers` computes, for what is not fp32: it rounds before the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] to the same; under autocast in its dtype, as who reads it would cast."""
        x = hidden_states
        if x.dtype != torch.float32:
            result: Tensor = self.plain(self, x)
            return result
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        return rms_norm(x, self.weight, self.variance_epsilon, dtype)


class GatedMLP(nn.Module):
    """Takes the place of a model's own MLP, whose linear layers it keeps under the same names."""

    def __init__(self, mlp: Any) -> None:  # noqa: ANN401 - each architecture's class
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        result: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return result


class MixedLayerNorm(nn.LayerNorm):
    """Computes in fp32 where weights and stream differ in dtype, which PyTorch refuses on a CPU.

    Frozen models have bf16 weights, and under autocast an fp32 stream.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same, in the stream's dtype."""
        if self.weight is None or self.weight.dtype == x.dtype:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        normed = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps)
        return normed.to(x.dtype)


def use_mixed_norms(model: PreTrainedModel) -> None:
    """Let LayerNorms read a stream of any dtype."""
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = MixedLayerNorm


def use_lean_blocks(model: PreTrainedModel) -> None:
    """Put both into every block of `transformers`' own whose norms and MLP are known ones."""
    silu = getattr(model.config.get_text_config(), "hidden_act", None) == "silu"
    for block in decoder_blocks(model):
        if not is_known(block, "DecoderLayer"):
            continue
        for name in READ_BY_LINEAR:
            norm = getattr(block, name, None)
            if is_known(norm, "RMSNorm"):
                setattr(block, name, Norm(norm))
        mlp = getattr(block, "mlp", None)
        if silu and is_known(mlp, "MLP"):
            block.mlp = GatedMLP(mlp)


def is_lean(model: PreTrainedModel) -> bool:
    """Whether its blocks were found to be known ones."""
    return any(isinstance(module, GatedMLP) for module in model.modules())


def is_known(module: object, kind: str) -> bool:
    """Whether it is `transformers`' own of one of the families."""
    found = type(module)
    named = found.__name__ in [family + kind for family in FAMILIES]
    return named and found.__module__.startswith("transformers.models.")


def rms_norm(
    x: Float[Tensor, "... hidden"], weight: Float[Tensor, " hidden"], eps: float, dtype: torch.dtype
) -> Float[Tensor, "... hidden"]:
    """Weight · x / sqrt(mean(x²) + eps) in fp32, rounded to the dtype at the end.

    Kept for backward: x and one number a token.
    """
    normed: Tensor = _RMSNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return normed


def swiglu(
    gate: Float[Tensor, "... inner"], up: Float[Tensor, "... inner"]
) -> Float[Tensor, "... inner"]:
    """silu(gate) · up, where silu(x) = x / (1 + exp(-x)) (Shazeer 2020).

    Kept for backward: gate and up.
    """
    product: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return product


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        to_normed = gradient * weight.float()
        along = torch.linalg.vecdot(to_normed, normed).unsqueeze(-1).div_(x.shape[-1])
        to_x = to_normed.addcmul_(normed, along, value=-1).mul_(inverse)
        return to_x, to_weight, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # noqa: ANN401 - autograd's
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - autograd's
        gate, up = ctx.saved_tensors
        to_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return to_gate, F.silu(gate).mul_(gradient)
