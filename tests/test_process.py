"""The process's own memory."""

import os
import subprocess
import sys

import pytest

from ppomax import process

HOLD = """
import torch
from ppomax.process import give_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

kept = [torch.ones(2**20) for _ in range(64)]  # 256 MB
last = torch.ones(2**10)  # above them in the heap, so that freeing alone gives nothing back
del kept
held = resident()
give_back()
print(held - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_the_allocator_keeps_is_given_back_when_it_is_told():
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= process.allocator_environment(environment)
    done = subprocess.run(
        [sys.executable, "-c", HOLD], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 200e6
