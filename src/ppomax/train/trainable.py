"""A model in training: one optimizer step, what is refused before it, what a checkpoint holds."""

import math
from collections import deque
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ppomax import checkpoint, distributed
from ppomax.distributed import World, agree
from ppomax.train.optim import (
    SPIKE_WINDOW,
    OptimSettings,
    build_optimizer,
    is_spike,
    learning_rate,
    set_learning_rate,
)

M = TypeVar("M", bound=nn.Module)


class Trainable(Generic[M]):
    """A model, its optimizer and its schedule: what a step needs and a checkpoint holds."""

    def __init__(
        self, name: str, model: M, settings: OptimSettings, total_steps: int, world: World
    ) -> None:
        self.name, self.model, self.settings, self.world = name, model, settings, world
        self.total_steps, self.step_count = total_steps, 0
        self.lr_factor = 1.0
        """What rollbacks have made of the schedule."""
        self.optimizer = build_optimizer(model, settings)
        self.scale = distributed.loss_scale(model, world)
        self.norms: deque[float] = deque(maxlen=SPIKE_WINDOW)
        """Gradient norms of the last steps, for `spike_z`."""
        self.why_skipped = ""
        """What was wrong with the last step that was not taken."""
        self._losses: list[Tensor] = []
        self._kept: tuple[list[int], Any] | None = None

    @property
    def lr(self) -> float:
        """Rate of the next step."""
        rate = learning_rate(self.settings, self.step_count, max(1, self.total_steps))
        return rate * self.lr_factor

    def keep(self, rows: list[int], found: object) -> None:
        """Hold on to a forward with its graph: until a step it need not be made again.

        Args:
            rows: what it was made of.
        """
        self._kept = (rows, found)

    def kept(self, rows: list[int]) -> Any | None:  # noqa: ANN401 - whatever the model returns
        """The forward of these rows, once: backward frees its graph."""
        if self._kept is None or self._kept[0] != rows:
            return None
        _, found = self._kept
        self._kept = None
        return found

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; losses are sums over a denominator of the whole batch."""
        self._losses.append(loss.detach())
        (loss * self.scale).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def step(self) -> tuple[float, bool]:
        """Clip and update; returns the norm before the clip and whether the step was taken.

        A non-finite loss or gradient reaches neither a parameter nor a moment; nor does a spike
        where `spike_z` says what one is.
        """
        distributed.sum_gradients(self.model, self.world)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = distributed.clip_gradients(parameters, self.settings.grad_clip)
        self.why_skipped = self._defect(norm)
        if not self.why_skipped:
            set_learning_rate(self.optimizer, self.lr)
            self.optimizer.step()
            self.step_count += 1
        self.drop_gradients()
        return norm, not self.why_skipped

    def _defect(self, norm: float) -> str:
        """What is wrong with this step, the same word on every rank; "" if nothing."""
        finite = all(bool(torch.isfinite(loss)) for loss in self._losses)
        if agree(not finite, self.world):
            return "non-finite loss"
        if not math.isfinite(norm):
            return "non-finite gradient"
        if self.settings.spike_z is None:
            return ""
        spike = is_spike(norm, self.norms, self.settings.spike_z)
        self.norms.append(norm)  # a spike too: a new level is soon the usual one
        return "gradient norm spike" if spike else ""

    def drop_gradients(self) -> None:
        """Forget what was added since the last step, and any forward that waits for one."""
        self._losses.clear()
        self._kept = None
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Checkpoint groups, weights and optimizer state: whole on rank 0, empty elsewhere."""
        distributed.reshard(self.model)
        keep = self.world.is_main
        moments = checkpoint.optimizer_tensors(self.model, self.optimizer, keep=keep)
        weights = checkpoint.model_tensors(self.model, keep=keep)
        return {self.name: weights, f"{self.name}_optimizer": moments}

    @property
    def checkpoint_bytes(self) -> int:
        """Size of its part of a checkpoint: weights and AdamW's two moments."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return sum(p.numel() * p.element_size() for p in trained) * 3

    def state(self) -> dict[str, Any]:
        """Counters, for a checkpoint's JSON."""
        found: dict[str, Any] = {
            f"{self.name}_steps": self.step_count,
            f"{self.name}_lr_factor": self.lr_factor,
        }
        if self.settings.spike_z is not None:
            found[f"{self.name}_norms"] = list(self.norms)
        return found

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Put a checkpoint's weights and optimizer state in place."""
        checkpoint.load_model_tensors(self.model, found.tensors(self.name))
        tensors = found.tensors(f"{self.name}_optimizer")
        checkpoint.load_optimizer_tensors(self.model, self.optimizer, tensors)
        self.step_count = found.state[f"{self.name}_steps"]
        self.lr_factor = found.state[f"{self.name}_lr_factor"]
        self.norms.clear()
        self.norms.extend(found.state.get(f"{self.name}_norms", []))
