"""The process itself: its environment before it starts, its umask. Imports nothing heavy."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

KEPT = 2**40
"""Bytes that the C allocator keeps for what is asked next instead of giving them back: all."""


def allocator_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment so that the C allocator keeps memory, and in huge pages.

    A training step on the CPU frees and takes hundreds of large tensors; on virtual machines the
    page faults of fresh 4 kB pages can cost several times the arithmetic (docs/LOG.md). glibc reads
    the settings when a process starts; nothing is added where it is set already.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in environment:
        return {}
    tunables = {"hugetlb": 1, "trim_threshold": KEPT, "mmap_max": 0}
    text = ":".join(f"glibc.malloc.{name}={value}" for name, value in tunables.items())
    return {"GLIBC_TUNABLES": text}


def open_as_umask_says(folder: Path) -> None:
    """Its files for those whom the umask lets read: safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
