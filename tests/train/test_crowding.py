"""Cores that others take are noticed, once, and only where waiting threads make it worse."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from ppomax.distributed import World
from ppomax.train import crowding
from ppomax.train.crowding import LIMIT, SECONDS, SETTINGS, Crowding
from ppomax.train.sft import train_sft

CPU = torch.device("cpu")


@pytest.fixture
def counted(monkeypatch):
    """A clock and a counter to be set by hand; two threads."""
    now = {"time": 0.0, "taken": 0}
    monkeypatch.setattr(crowding.time, "monotonic", lambda: now["time"])
    monkeypatch.setattr(crowding, "_times_taken", lambda: now["taken"])
    monkeypatch.setattr(crowding.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(crowding.sys, "platform", "linux")
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return now


def test_taken_cores_are_told_once_and_over_the_last_seconds(counted):
    watch = Crowding(World(0, 1, CPU))
    counted.update(time=SECONDS - 1, taken=10**6)
    assert watch.note() is None  # too early
    counted.update(time=100.0, taken=int(2 * LIMIT * 100) - 1)
    assert watch.note() is None  # just below, for two threads
    counted.update(time=200.0, taken=counted["taken"] + int(2 * LIMIT * 100))
    found = watch.note()
    assert "50 times a second and thread" in found
    assert "OMP_WAIT_POLICY=passive" in found
    counted.update(time=300.0, taken=10**6)
    assert watch.note() is None


@pytest.mark.parametrize("name", SETTINGS)
def test_who_knows_how_their_threads_wait_are_left_alone(counted, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    watch = Crowding(World(0, 1, CPU))
    counted.update(time=100.0, taken=10**6)
    assert watch.note() is None


def test_more_threads_than_cores_are_told_apart_from_other_processes(counted, monkeypatch):
    for cores, text in ((1, "2 threads take turns on 1 cores"), (2, "other processes")):
        monkeypatch.setattr(
            crowding.os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False
        )
        counted.update(time=0.0, taken=0)
        watch = Crowding(World(0, 1, CPU))
        counted.update(time=100.0, taken=10**6)
        assert text in watch.note()


def test_one_thread_waits_for_none_and_a_gpu_is_another_matter(counted, monkeypatch):
    cuda = Crowding(World(0, 1, torch.device("cuda")))
    one = Crowding(World(0, 1, CPU))
    counted.update(time=100.0, taken=10**6)
    assert cuda.note() is None
    monkeypatch.setattr(crowding.torch, "get_num_threads", lambda: 1)
    assert one.note() is None


def test_a_stage_says_it(counted, monkeypatch, small, tmp_path, tiny):
    monkeypatch.setattr(crowding, "_times_taken", lambda: counted["taken"])
    monkeypatch.setattr(crowding, "SECONDS", -1.0)
    monkeypatch.setattr(crowding, "LIMIT", -1.0)
    counted["time"] = 1.0

    def clock():
        counted["time"] += 1.0
        return counted["time"]

    monkeypatch.setattr(crowding.time, "monotonic", clock)
    run = train_sft(small("sft", tmp_path / "run", {"max_steps": 2}))
    assert (run / "events.jsonl").read_text().count('"kind": "crowded"') == 1


@pytest.mark.skipif(sys.platform != "linux", reason="cores are bound as Linux does")
def test_two_processes_on_one_core_take_it_from_each_other():
    script = """
        import os, subprocess, sys, time
        from ppomax.train.crowding import _times_taken
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            before, end = _times_taken(), time.monotonic() + 10
            while _times_taken() < before + 20 and time.monotonic() < end:
                pass
            print(_times_taken() - before)
        finally:
            other.kill()
    """
    argv = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, env=dict(os.environ))
    assert int(done.stdout) >= 20
