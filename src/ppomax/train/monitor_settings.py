"""Settings of what is watched during PPO and what is done when it goes wrong (docs/monitors.md)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ppomax.collapse import DetectorSettings
from ppomax.config import Settings
from ppomax.data.sources import Sources


class TrackSettings(Settings):
    """Fixed prompts answered again and again, so that only the policy changes (paper Fig. 13)."""

    every: int = Field(10, ge=1)
    """Iterations between two rounds; the SFT model answers first, and the last iteration always."""
    prompts: int = Field(64, ge=2)
    """Most prompts answered, spread evenly over all there are (ours)."""
    data: Sources | None = None
    """Prompts; null takes those that `ppo.heldout` keeps out."""
    model: str | None = None
    """A second reward model that PPO never sees; it picks the exported policy."""
    callable: str | None = None
    """The same as `module:function`."""

    @model_validator(mode="after")
    def _one_scorer(self) -> Self:
        if self.model is not None and self.callable is not None:
            raise ValueError("give model or callable, not both")
        return self


class MonitorSettings(DetectorSettings):
    """The collapse detector's thresholds and what happens when it says red."""

    action: Literal["log", "stop", "rollback"] = "log"
    """`log` writes an event; `stop` also ends training there; `rollback` goes back to the last
    green checkpoint and on from it under more constraint."""
    max_rollbacks: int = Field(2, ge=1)
    """After so many the next red stops the run (ours)."""
    kl_factor: float | None = Field(2.0, gt=1)
    """A rollback multiplies the KL coefficient by this (ours); null leaves it."""
    kl_least: float = Field(0.05, gt=0)
    """And raises it at least to this, so that a coefficient of 0 rises too (paper's η)."""
    lr_factor: float | None = Field(None, gt=0, lt=1)
    """A rollback multiplies both learning rates by this; null leaves them."""
    keep_green: int = Field(1, ge=1)
    """Newest green checkpoints kept beside `checkpoint.keep_last`, and the best by a second scorer
    (ours)."""
    track: TrackSettings | None = None
    """Held-out prompts answered every few iterations; null: none."""

    @model_validator(mode="after")
    def _rollback(self) -> Self:
        if self.action == "rollback":
            if self.kl_factor is None and self.lr_factor is None:
                raise ValueError("rollback needs kl_factor or lr_factor, or it would only repeat")
            return self
        for name in ("max_rollbacks", "kl_factor", "kl_least", "lr_factor"):
            if getattr(self, name) != MonitorSettings.model_fields[name].default:
                raise ValueError(f"{name} has no effect without action: rollback")
        return self
