"""Whether other processes take the cores that training computes on, and what helps.

OpenMP's threads wait for one another awake. Where there are more processes that want to run than
cores, one waits awake for another that cannot run, and takes its time.
"""

import os
import resource
import sys
import time

import torch

from ppomax.distributed import World

SECONDS = 30.0
"""Looked at over so long at least."""
LIMIT = 50.0
"""Times a second that the kernel takes a core from one of this process's threads. Alone on two
cores it does 13 times, beside busy processes 80 to 130 (ours)."""
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables of those who know how their threads wait."""


class Crowding:
    """Asked at every step; answers once."""

    def __init__(self, world: World) -> None:
        known = any(name in os.environ for name in SETTINGS)
        self.looks = sys.platform == "linux" and world.device.type == "cpu" and not known
        self.since, self.count = time.monotonic(), _times_taken()

    def note(self) -> str | None:
        """What to know of it, the first time that cores are seen to be taken."""
        now, threads = time.monotonic(), torch.get_num_threads()
        if not self.looks or threads == 1 or now - self.since < SECONDS:
            return None
        count = _times_taken()
        rate = (count - self.count) / (now - self.since) / threads
        self.since, self.count = now, count
        if rate < LIMIT:
            return None
        self.looks = False
        cores = len(os.sched_getaffinity(0))
        if threads > cores:
            return (
                f"{threads} threads take turns on {cores} cores ({rate:.0f} times a second each), "
                "and wait for one another; `threads` says how many there are"
            )
        return (
            f"other processes take this one's cores ({rate:.0f} times a second and thread), and "
            "threads that wait for one another take more; where that is to last, stop and resume "
            "with OMP_WAIT_POLICY=passive in the environment: the same results, in half the time "
            "or less"
        )


def _times_taken() -> int:
    """How often the kernel took a core from a thread of this process that wanted to go on."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
