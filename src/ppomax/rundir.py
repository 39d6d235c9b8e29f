"""The run directory: append-only JSONL files, resolved config, environment; rank 0 writes."""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from ppomax.errors import CheckpointError, ConfigError

CONFIG, ENV = "config.yaml", "env.json"
METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "events.jsonl"
HELDOUT = "heldout.jsonl"
ASKED = "asked.json"
"""`{"stages": [...]}`: those that were started in a whole run's directory."""
LOCK = ".lock"
LOGS = (METRICS, SAMPLES, EVENTS, HELDOUT)
"""Files that grow with the run."""


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file; a last line cut short by a crash is left out."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def as_lines(rows: Iterable[dict[str, Any]]) -> str:
    """The text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows in one write."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(as_lines(rows))


def cut_back(path: Path, keep: "dict[str, int]", attempt: int = 0) -> None:
    """Drop rows past the resumed step of each stage (and a torn last line), by atomic replace.

    Rows of an attempt before the resumed one stay: a rollback left them as they were.
    """
    if not path.exists():
        return
    rows = [
        row
        for row in read_jsonl(path)
        if row.get("step", 0) <= keep.get(row.get("stage", ""), -1)
        or row.get("attempt", 0) < attempt
    ]
    write_text(path, as_lines(rows))


def sync(path: Path) -> None:
    """Bring a file, or a folder's names, to the disk; one that is not there is none to bring."""
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def how_to_go_on(path: Path) -> str:
    """With a stage's directory that stands in no recipe's run, or with any other."""

    def of_a_stage(folder: Path) -> bool:
        text = (folder / CONFIG).read_text(encoding="utf-8")
        return re.search(r"^model:", text, re.MULTILINE) is not None

    begun, above = (path / CONFIG).exists(), (path.parent / CONFIG).exists()
    if begun and of_a_stage(path) and (not above or of_a_stage(path.parent)):
        return "the same call with resume=True"
    return f"`ppomax resume {path}`"


def create(path: Path, config: str) -> None:
    """Make a run directory and write its config.

    Raises:
        ConfigError: the directory already holds a run, or cannot be written.
    """
    if (path / CONFIG).exists():
        raise ConfigError(
            f"setting out: {path} already holds a run; continue it with {how_to_go_on(path)} "
            "or give another out=DIR"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / CONFIG, config)
    except OSError as error:
        raise ConfigError(f"setting out: cannot write {path} ({error.strerror})") from None


def forget(path: Path, *more: str) -> None:
    """Remove a run directory if nothing was done in it yet.

    Args:
        more: files beside config, environment, events and lock that say nothing was done.
    """
    names = {CONFIG, ENV, EVENTS, LOCK, *more}
    if path.is_dir() and {found.name for found in path.iterdir()} <= names:
        shutil.rmtree(path, ignore_errors=True)


def lock(path: Path) -> IO[str] | None:
    """Take a run directory until the file that is returned is closed.

    The system lets go of it where the process dies, however it does. None where the file system
    knows no locks.

    Raises:
        CheckpointError: another process has it, or another run of this one.
    """
    file = (path / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read(40).strip()
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        raise CheckpointError(
            f"{path}: process {owner} writes this run; wait for it or stop it first"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def write_environment(path: Path, extra: dict[str, Any]) -> None:
    """Versions, machine and command of the run."""
    names = ["torch", "transformers", "peft", "safetensors", "numpy", "ppomax"]
    record = {
        "versions": {name: metadata.version(name) for name in names}
        | {"python": platform.python_version()},
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "commit": _commit(),
        "command": sys.argv,
        **extra,
    }
    write_text(path / ENV, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _commit() -> str | None:
    """Commit of the source tree this package runs from, if it runs from one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
