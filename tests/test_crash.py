"""Ten of the kills of `make crash`: each resumed run ends as the undisturbed one, to the bit."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_killed_anywhere_ends_as_the_one_left_alone():
    program = Path(__file__).resolve().parents[1] / "benchmarks" / "crash.py"
    command = [sys.executable, str(program), "--points", "10", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failures" in done.stdout
