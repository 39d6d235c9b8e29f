"""A Llama-type model's weights as the native engine reads them: joined, cast and packed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.distributed import full_state
from ppomax.models.lora import Factors, effective_state_dict, split_state_dict
from ppomax.rollout.kernels import Kernels
from ppomax.rollout.product import Product, pack, packs


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer, in the compute dtype (norms in fp32)."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    attention_norm: Tensor
    mlp_norm: Tensor
    qk_norm: Tensor | None
    """[query and key heads, head_dim], where each head is normalised by itself."""


@dataclass(frozen=True, slots=True)
class Weights:
    """All of them; a copy, so that the model may change while its engine does not."""

    embedding: Tensor
    layers: list[Layer]
    final_norm: Tensor
    head: Product


@torch.no_grad()
def take_weights(
    model: PreTrainedModel,
    heads: int,
    kv_heads: int,
    device: torch.device,
    dtype: torch.dtype,
    kernels: Kernels | None = None,
) -> Weights:
    """The model's present weights, gathered where sharded (collective then).

    In fp32 adapters are merged; in bf16, where that would round them away, they stand beside.
    """
    whole = full_state(model)
    factors: dict[str, Factors] = {}
    if dtype == torch.float32:
        state = effective_state_dict(model, whole)
    else:
        state, factors = split_state_dict(model, whole)
        merged = effective_state_dict(model, whole)
        for name in [name for name in factors if not name.endswith("_proj")]:
            state[f"{name}.weight"] = merged[f"{name}.weight"]  # of head and embedding
    embedding = next(name for name in state if name.endswith("embed_tokens.weight"))
    prefix = embedding.removesuffix("embed_tokens.weight")

    def product(*names: str) -> Product:
        return pack([f"{prefix}{name}" for name in names], state, factors, device, dtype, kernels)

    def norm(name: str) -> Tensor:
        return state[f"{prefix}{name}.weight"].to(device, torch.float32, copy=True)

    def qk_norm(at: str) -> Tensor | None:
        if f"{prefix}{at}q_norm.weight" not in state:
            return None
        of_queries, of_keys = norm(f"{at}q_norm"), norm(f"{at}k_norm")
        return torch.cat([of_queries.expand(heads, -1), of_keys.expand(kv_heads, -1)])

    layers = [
        Layer(
            qkv=product(*(f"{at}self_attn.{name}_proj" for name in "qkv")),
            out=product(f"{at}self_attn.o_proj"),
            gate_up=product(f"{at}mlp.gate_proj", f"{at}mlp.up_proj"),
            down=product(f"{at}mlp.down_proj"),
            attention_norm=norm(f"{at}input_layernorm"),
            mlp_norm=norm(f"{at}post_attention_layernorm"),
            qk_norm=qk_norm(f"{at}self_attn."),
        )
        for at in (
            f"layers.{index}."
            for index in range(sum(name.endswith("input_layernorm.weight") for name in state))
        )
    ]
    table = state[embedding].to(device, dtype, copy=True)
    tied = bool(model.config.tie_word_embeddings)
    if tied and not (kernels and kernels.panel) and not packs(device, dtype):
        head = Product(table)
    else:
        name = embedding.removesuffix(".weight") if tied else "lm_head"
        head = pack([name], state, {}, device, dtype, kernels, logits=True)
    return Weights(table, layers, norm("norm"), head)
