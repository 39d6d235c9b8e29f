"""Settings that every stage shares: where, on what, how much at once, how often saved."""

from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from ppomax.config import Settings
from ppomax.distributed import bfloat16_is_fast


def _settle(dtype: str, info: ValidationInfo) -> str:
    if dtype != "auto":
        return dtype
    return "bfloat16" if bfloat16_is_fast(info.data.get("device", "auto")) else "float32"


Dtype = Annotated[Literal["auto", "float32", "bfloat16"], AfterValidator(_settle)]
"""A compute dtype; `auto` is settled for the `device` declared before it."""


class CheckpointSettings(Settings):
    """When the run's state is saved."""

    every: int = Field(10, ge=1)
    """Steps (`ppo`: iterations) between checkpoints; the last step always saves one."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept; the last good one is never removed."""
    keep_best: int | None = Field(None, ge=1)
    """Older checkpoints kept too, the best by held-out loss (`sft`), held-out accuracy (`reward`)
    or mean score (`ppo`); null keeps none. Only a checkpoint whose step was judged counts."""
    asynchronous: bool = False
    """Write in a thread while training goes on: takes a copy in memory, changes no result."""
    grace_s: float = Field(30.0, gt=0)
    """Seconds between a signal and the end of the process: what does not fit is left out, and
    done again by `ppomax resume`. Schedulers often kill after 30."""


class LogSettings(Settings):
    """What is written down while the run goes on; metrics.jsonl always is."""

    samples_every: int = Field(5, ge=1)
    """PPO iterations between rows in samples.jsonl; `sft` writes some at each evaluation
    (`eval_every`)."""
    samples: int = Field(4, ge=0)
    """Replies written each time, by policies; a reward model writes none."""
    to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers beside the files; each needs the extra of its name."""


class ComputeSettings(Settings):
    """How any stage computes, trains or not."""

    seed: int = 0
    """Every order and every reply is a function of it."""
    device: str = "auto"
    """`auto` takes CUDA when it is there."""
    dtype: Dtype = "float32"
    """Of matrix products; weights and all the mathematics stay fp32. `auto` takes bfloat16 where
    the machine computes it fast; config.yaml then says what it took."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; null leaves PyTorch's choice. Part of exact resume."""
    system: str | None = None
    """System prompt for dialogues that have none."""
    micro_tokens: int = Field(8192, ge=1)
    """Padded tokens per forward and backward: a memory knob that cannot change results."""
    max_bad_rows: float = Field(0.05, ge=0, le=1)
    """Largest share of rows that may be quarantined."""
    trust_remote_code: bool = False
    """Run code that a model folder brings along. Off unless typed."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """`dtype` as torch names it."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16


class StageSettings(ComputeSettings):
    """Common part of `sft`, `reward` and `ppo`."""

    model: str
    """Causal LM to start from: folder, hub id, or short name (`smollm2-135m`, `tiny`)."""
    out: Path
    """Run directory; must not hold a run yet."""
    deterministic: bool = False
    """Deterministic kernels only, on CUDA at some cost in speed: the same run twice is then the
    same to the bit. On the CPU it always is. An operation that has no such kernel ends the run
    with its name."""
    max_length: int = Field(1024, ge=8)
    """Longest sequence in tokens; older turns are dropped until a dialogue fits."""
    freeze_embeddings: bool = False
    """Leave the token embedding (and a tied output head) as it is: in small models a fifth of the
    weights, and so of gradients and moments. `lora` freezes it anyway and refuses this."""
    freeze_layers: int | None = Field(None, ge=1)
    """Lowest blocks that are left as they are, the embedding with them; null trains all. Backward
    ends there: with half of them frozen a step takes 0.6 of the time and half of the
    activations (measured, docs/LOG.md). With `lora` only the blocks above get adapters. In PPO, in
    one process, one copy and one reading of a batch serve all roles of one dtype whose lowest
    blocks agree in every bit, as those of stages with the same `freeze_layers` do. Ours."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _frozen(self) -> Self:
        if self.freeze_layers and self.freeze_embeddings:
            raise ValueError(
                f"freeze_embeddings has no effect with freeze_layers {self.freeze_layers}, which "
                "freezes the embedding too; set it to false"
            )
        if self.freeze_embeddings and getattr(self, "lora", None) is not None:
            raise ValueError(
                "freeze_embeddings has no effect with lora, which trains adapters alone; set it to "
                "false"
            )
        return self
