"""The process itself: its environment before it starts, its umask. Imports nothing heavy.

    eval "$(python -m ppomax.process)"

sets in a shell what the commands set for themselves, for programs that call ppomax.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

KEPT = 2**40
"""Bytes that the C allocator keeps for what is asked next instead of giving them back: all."""
PRODUCTS = 128
"""Matrix products of different shapes that are kept compiled, some three micro-batches' worth."""


def memory_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of a process that trains on the CPU, for its memory's sake.

    The C allocator is to keep memory, and in huge pages: a training step frees and takes hundreds
    of large tensors, and on virtual machines the page faults of fresh 4 kB pages can cost several
    times the arithmetic. All threads are to share it: weights are loaded by several, and what those
    free training could not use. oneDNN, and PyTorch's layer above it, are to keep few products
    compiled: of each shape they hold a third of a megabyte, 1,024 shapes by default, and replies of
    changing lengths are always new ones (docs/LOG.md).

    All of these are read when a process starts; what is set already stays, and nothing is added
    where the allocator's settings are: they are the sign that this was done.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in environment:
        return {}
    tunables = {"hugetlb": 1, "trim_threshold": KEPT, "mmap_max": 0, "arena_max": 1}
    wanted = {
        "GLIBC_TUNABLES": ":".join(
            f"glibc.malloc.{name}={value}" for name, value in tunables.items()
        ),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(PRODUCTS),
        "LRU_CACHE_CAPACITY": str(PRODUCTS),
    }
    return {name: value for name, value in wanted.items() if name not in environment}


def open_as_umask_says(folder: Path) -> None:
    """Its files for those whom the umask lets read: safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


if __name__ == "__main__":
    for name, value in memory_environment(os.environ).items():
        sys.stdout.write(f"export {name}={value}\n")
