"""Folders that appear whole or not at all, the cache's lock, and silence around transformers."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from ppomax.process import open_as_umask_says


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder that takes the name `folder` only when the block ends well.

    What stood there before is replaced; if the block fails it stays as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-partial-"))
    try:
        place.chmod(0o755)  # mkdtemp's is for its owner alone
        yield place
        open_as_umask_says(place)
        if folder.exists():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
            folder.replace(old / folder.name)
            place.replace(folder)
            shutil.rmtree(old)
        else:
            place.replace(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """One process at a time in the cache; what a killed one left half made is removed."""
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):
        for leftover in cache.glob(".*partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines or bars from transformers inside; its settings are put back."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # partly untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
