"""Optimizer and learning-rate schedule: settings beside the few lines that read them."""

import math
import statistics
from collections.abc import Collection
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from ppomax.config import Settings

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Of a running mean: how much of it stays at each step."""


class OptimSettings(Settings):
    """AdamW with fp32 state on fp32 master weights."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    """After warm-up: flat, straight or cosine to `floor`, or proportional to 1/sqrt(step)."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of all steps over which the rate rises linearly."""
    floor: float = Field(0.0, ge=0, le=1)
    """Last rate as a share of the peak (`linear`, `cosine`)."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Zheng et al. 2023, released code."""
    eps: float = Field(1e-6, gt=0)
    """Zheng et al. 2023, released code (critic: 1e-8)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest global gradient norm of this model; null does not clip."""
    spike_z: float | None = Field(None, gt=0)
    """Skip a step whose gradient norm lies so many standard deviations above the mean of the last
    128 (ours; 6 is a sensible value); null skips none but the non-finite."""

    @model_validator(mode="after")
    def _floor(self) -> Self:
        if self.floor and self.schedule not in ("linear", "cosine"):
            raise ValueError(
                f"floor has no effect with schedule {self.schedule}; set it to 0, or schedule to "
                "linear or cosine"
            )
        return self


SPIKE_WINDOW = 128
"""Steps whose gradient norms say what is usual."""


def is_spike(norm: float, norms: Collection[float], z: float) -> bool:
    """Whether a norm lies more than `z` standard deviations above a full window's mean."""
    if len(norms) < SPIKE_WINDOW:
        return False
    return norm > statistics.fmean(norms) + z * statistics.stdev(norms)


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate(settings: OptimSettings, step: int, total: int) -> float:
    """Rate of optimizer step `step` (from 0) of `total`; pure, so nothing to checkpoint.

    Steps past the last (a critic's pre-training may be longer than its schedule) keep its rate.
    """
    warm = round(settings.warmup * total)
    if step < warm:
        return settings.lr * (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, total - warm))
    match settings.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1 - (1 - settings.floor) * done
        case "cosine":
            share = settings.floor + (1 - settings.floor) * (1 + math.cos(math.pi * done)) / 2
        case "inverse_sqrt":
            share = math.sqrt(max(warm, 1) / max(step + 1, warm, 1))
    return settings.lr * share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Put the rate into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
