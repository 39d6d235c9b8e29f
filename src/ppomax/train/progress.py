"""Progress on the terminal: a rich bar on a TTY, plain lines elsewhere. Writes to stderr only."""

import math
import time
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from ppomax.visible import visible

SHOWN = {
    "sft": {"loss": "sft/loss", "held-out loss": "eval/loss", "lr": "sft/lr"},
    "reward": {
        "loss": "reward/loss",
        "accuracy": "reward/accuracy",
        "held-out accuracy": "eval/accuracy",
    },
    "critic": {
        "score": "reward/score_mean",
        "value loss": "value/loss",
        "EV": "value/explained_variance",
        "tok/s": "throughput/rollout_tokens_per_s",
    },
    "ppo": {
        "score": "reward/score_mean",
        "KL": "kl/ref_k3",
        "ppl": "policy/perplexity",
        "length": "response/length_mean",
        "EV": "value/explained_variance",
        "tok/s": "throughput/rollout_tokens_per_s",
    },
    "generate": {
        "length": "response/length_mean",
        "cut": "response/truncated_fraction",
        "tok/s": "throughput/rollout_tokens_per_s",
    },
}
"""The numbers that matter, by stage."""


class Progress:
    """One stage's progress; does nothing on other ranks."""

    def __init__(self, name: str, *, enabled: bool) -> None:
        self.name, self.enabled = name, enabled
        self.console = Console(stderr=True)
        self.bar: Bar | None = None
        self.tasks: dict[str, TaskID] = {}
        self.first: dict[str, tuple[float, int]] = {}
        self.last: dict[str, dict[str, float]] = {}

    def show(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """Report one step."""
        if not self.enabled:
            return
        last = self.last.setdefault(stage, {})
        for label, key in SHOWN[stage].items():
            if key in values:
                last[label] = values[key]
        text = "  ".join(f"{label} {number(value)}" for label, value in last.items())
        if self.console.is_terminal:
            self._bar(stage, step, total, text)
        else:
            left = self._left(stage, step, total)
            self.console.print(
                f"{stage} {step}/{total}  {text}{left}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def say(self, text: str) -> None:
        """A line above the bar; what a model or a data file wrote cannot drive the terminal."""
        if self.enabled:
            self.console.print(
                f"{self.name}: {visible(text)}", markup=False, highlight=False, soft_wrap=True
            )

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _bar(self, stage: str, step: int, total: int, text: str) -> None:
        if self.bar is None:
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(20),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
            )
            self.bar.start()
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=total, text="")
        self.bar.update(self.tasks[stage], completed=step, total=total, text=escape(text))

    def _left(self, stage: str, step: int, total: int) -> str:
        now = time.monotonic()
        began, first = self.first.setdefault(stage, (now, step))
        if step <= first or step >= total:
            return ""
        seconds = (now - began) / (step - first) * (total - step)
        return f"  left {int(seconds // 60)}:{int(seconds % 60):02d}"


def number(value: float) -> str:
    """Three significant digits."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
