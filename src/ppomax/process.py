"""The process itself: what must be in its environment before it starts. Imports nothing heavy."""

import sys
from collections.abc import Mapping


def allocator_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment so that the C allocator takes memory in huge pages.

    A training step on the CPU frees and takes hundreds of large tensors; on virtual machines the
    page faults of fresh 4 kB pages can cost several times the arithmetic (docs/LOG.md). glibc reads
    the setting when a process starts; nothing is added where it is set already.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in environment:
        return {}
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
