"""Thin bridges to trackers, each an extra; metrics.jsonl is written whatever they do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ppomax.errors import ConfigError


class Tracker(Protocol):
    """Somewhere metrics go besides the files."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One row."""

    def close(self) -> None:
        """Flush."""


class _TensorBoard:
    def __init__(self, path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(path / "tensorboard"))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(f"{stage}/{key}", value, step)

    def close(self) -> None:
        self.writer.close()


class _RunLogger:
    """wandb and trackio share one interface."""

    def __init__(self, module: str, name: str, path: Path) -> None:
        import importlib

        self.module = importlib.import_module(module)
        self.module.init(project="ppomax", name=f"{path.parent.name}-{name}")

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.module.log(
            {**{f"{stage}/{key}": value for key, value in values.items()}, f"{stage}/step": step}
        )

    def close(self) -> None:
        self.module.finish()


def open_trackers(names: Sequence[str], stage: str, path: Path) -> list[Tracker]:
    """The trackers asked for.

    Raises:
        ConfigError: a tracker's package is not installed; the text gives the pip line.
    """
    found: list[Tracker] = []
    for name in names:
        try:
            found.append(
                _TensorBoard(path) if name == "tensorboard" else _RunLogger(name, stage, path)
            )
        except ImportError:
            raise ConfigError(
                f'setting log.to: {name} is not installed; pip install "ppomax[{name}]"'
            ) from None
    return found
