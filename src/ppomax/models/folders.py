"""Folders that appear whole or not at all, the cache's lock, and silence around transformers."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from ppomax.errors import ModelError

ENSEMBLE_FILE = "ensemble.json"
"""In a folder of several reward models: `{"members": [folder, ...]}`, each a model of its own. The
folder itself is the first of them, so that any loader finds one."""


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


def ensemble_members(folder: Path) -> list[Path]:
    """The members of an ensemble, or the folder itself where it is one model.

    Raises:
        ModelError: the list of members is damaged or names a folder that is not there.
    """
    file = folder / ENSEMBLE_FILE
    if not file.is_file():
        return [folder]
    try:
        names = [str(name) for name in json.loads(file.read_text(encoding="utf-8"))["members"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not a list of members ({error})") from None
    members = [folder / name for name in names]
    missing = next((path for path in members if not (path / "config.json").exists()), None)
    if missing is not None or not members:
        raise ModelError(f"{file}: {missing or 'no members'}; every member is a model folder")
    return members
