"""LoRA by peft: adapters inside the model's own layers, switched off for the reference policy.

The layers are injected in place, so a model keeps its class and its other methods. Adapters are
never merged into the live weights: merged weights are computed apart, for engines and exports.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn

from ppomax.config import Settings
from ppomax.errors import ConfigError, ModelError
from ppomax.models.blocks import decoder_blocks, lowest_blocks

if TYPE_CHECKING:
    from peft import LoraConfig

M = TypeVar("M", bound=nn.Module)

ADAPTER = "default"


class LoraSettings(Settings):
    """Low-rank adapters on a frozen model (Hu et al. 2021)."""

    rank: int = Field(16, ge=1)
    """Rank of each update matrix B A."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Layers to adapt: every linear layer but the output head, or name endings (`q_proj`, ...)."""
    dropout: float = 0.0
    """Must be 0: with dropout the ratio is not 1 before the first update."""

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value != 0:
            raise ValueError("LoRA dropout must be 0, it would make the policy ratio noisy")
        return value


def add_lora(model: M, settings: LoraSettings, seed: int, *, freeze_layers: int = 0) -> M:
    """The same model, frozen, with fresh fp32 adapters that change nothing yet (B = 0).

    A base in bf16 is meant to run under autocast, which casts what the fp32 adapters read.

    Of a model with a `backbone` (ScalarModel) the backbone is adapted; its score head stays
    trainable, its language-model head is frozen. The global random state is left as it was.

    Args:
        freeze_layers: the lowest blocks, which get no adapters.

    Raises:
        ModelError: the target modules match nothing, the output head, or a non-linear layer.
        ConfigError: no block is left to adapt.
    """
    from peft import inject_adapter_in_model

    backbone = _adapted_part(model)
    _check_targets(backbone, settings)
    lm_head = getattr(model, "lm_head", None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = lora_config(
            settings,
            transposed=_transposed(backbone),
            excluded=_linear_below(backbone, freeze_layers),
        )
        inject_adapter_in_model(config, backbone)
    for name, layer in _lora_layers(backbone):
        if not _is_linear(layer.base_layer):
            kind = type(layer.base_layer).__name__
            raise ModelError(f"lora: {name} ({kind}) cannot be adapted; name lora.target_modules")
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    for _, layer in _lora_layers(backbone):
        layer.cast_input_dtype_enabled = False  # autocast casts; peft's detour over fp32 is slow
    if isinstance(lm_head, nn.Module):
        lm_head.requires_grad_(requires_grad=False)
    return model


def lora_config(
    settings: LoraSettings, *, transposed: bool = False, excluded: Sequence[str] = ()
) -> "LoraConfig":
    """The settings as peft's own configuration record.

    Args:
        settings: ours.
        transposed: the layers keep their weights as [in, out] (GPT-2).
        excluded: full names of layers that get no adapter.
    """
    from peft import LoraConfig

    targets = settings.target_modules
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float works, the hint says int
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=list(excluded) or None,
        bias="none",
        fan_in_fan_out=transposed,
    )


def has_lora(model: nn.Module) -> bool:
    """Whether any layer carries an adapter."""
    return any(True for _ in _lora_layers(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes exactly what its frozen base computes.

    Only the switch each layer reads is turned: peft's own `enable_adapters` also changes
    `requires_grad`, which FSDP2 records at the first forward and then never looks at again.
    """
    layers = [layer for _, layer in _lora_layers(model)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


@torch.no_grad()
def effective_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor] | None = None,
    merged_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The weights the model acts with, under the names it has without adapters.

    Hu et al. 2021, eq. 3: W + (alpha / rank) B A, computed in fp32, returned in W's dtype.
    Weights without an adapter are returned as they are, not copied; the model is not changed.

    Args:
        merged_dtype: dtype of merged weights instead of W's; a bf16 sum would lose small updates.
        state: the model's full state dict where its own tensors are sharded; default its own.
    """
    result, factors = split_state_dict(model, state)
    for name, factor in factors.items():
        weight = result[f"{name}.weight"]
        delta = factor.up @ factor.down
        delta = delta.T if factor.fan_in_fan_out else delta
        result[f"{name}.weight"] = (weight.float() + delta).to(merged_dtype or weight.dtype)
    return result


class Factors(NamedTuple):
    """A layer's update up @ down, fp32."""

    down: Float[Tensor, "rank in"]
    up: Float[Tensor, "out rank"]
    """Scaled by alpha / rank."""
    fan_in_fan_out: bool
    """The layer keeps its weight transposed."""


@torch.no_grad()
def split_state_dict(
    model: nn.Module, state: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """The base's weights under the names they have without adapters, and each layer's update.

    Args:
        state: as in `effective_state_dict`.
    """
    state = model.state_dict() if state is None else state
    base = {
        name.replace("base_layer.", ""): tensor
        for name, tensor in state.items()
        if ".lora_" not in name and not name.startswith("lora_")
    }
    factors = {
        name: Factors(
            state[f"{name}.lora_A.{ADAPTER}.weight"].float(),
            state[f"{name}.lora_B.{ADAPTER}.weight"].float() * layer.scaling[ADAPTER],
            bool(layer.fan_in_fan_out),
        )
        for name, layer in _lora_layers(model)
    }
    return base, factors


def merged_copy(model: M) -> M:
    """A copy of the model without adapter layers whose weights hold the update."""
    state = effective_state_dict(model)
    plain = copy.deepcopy(model)
    for name, layer in list(_lora_layers(plain)):
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.base_layer)
    for module in plain.modules():
        if hasattr(module, "peft_config"):
            del module.peft_config
    plain.load_state_dict(state)
    return plain


def adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapters alone, under the names peft's `adapter_model.safetensors` uses."""
    state = model.state_dict() if state is None else state
    return {
        "base_model.model." + name.replace(f".{ADAPTER}.", "."): tensor
        for name, tensor in state.items()
        if ".lora_" in name
    }


def _adapted_part(model: nn.Module) -> nn.Module:
    backbone = getattr(model, "backbone", None)
    return backbone if isinstance(backbone, nn.Module) else model


def _linear_below(backbone: nn.Module, count: int) -> list[str]:
    """Names of the linear layers of the lowest `count` blocks.

    Raises:
        ConfigError: the model has no block above those.
    """
    below = {module for block in lowest_blocks(backbone, count) for module in block.modules()}
    if count and count == len(decoder_blocks(backbone)):
        raise ConfigError(
            f"setting freeze_layers: {count} leaves lora no block to adapt; freeze fewer"
        )
    return [name for name, m in backbone.named_modules() if m in below and _is_linear(m)]


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _transposed(model: nn.Module) -> bool:
    return any(_is_conv1d(module) for module in model.modules())


def _check_targets(model: nn.Module, settings: LoraSettings) -> None:
    if has_lora(model):
        raise ModelError("lora: the model has adapters already")
    if settings.target_modules == "all-linear":
        return
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    modules = dict(model.named_modules())
    for target in settings.target_modules:
        found = [m for n, m in modules.items() if n == target or n.endswith(f".{target}")]
        if not found:
            linear = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)}
            raise ModelError(
                f"lora.target_modules: {target!r} names no layer; there are "
                f"{', '.join(sorted(linear))}"
            )
        if any(m is head or not _is_linear(m) for m in found):
            raise ModelError(
                f"lora.target_modules: {target!r} is not a linear layer inside the backbone"
            )
