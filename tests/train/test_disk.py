"""A disk that refuses, a checkpoint that is not whole, a run that another process writes."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from ppomax import checkpoint, rundir
from ppomax.distributed import World
from ppomax.errors import CheckpointError, PpomaxError
from ppomax.train.disk import refusals_told
from ppomax.train.loop import StageRun, opened
from ppomax.train.settings import StageSettings
from ppomax.train.sft import train_sft

HERE = World(0, 1, torch.device("cpu"))
SOURCE = str(Path(__file__).resolve().parents[2] / "src")


def stage(root, *, resume=False):
    chosen = {"model": "tiny", "out": root / "run", "checkpoint": {"keep_last": 3}}
    settings = StageSettings.model_validate(chosen)
    return StageRun("sft", settings, HERE, resume=resume)


def saved(root, *steps):
    run = stage(root)
    for step in steps:
        run.log(step, {"sft/loss": 1.0}, total=9)
        run.save(step, [], {"step": step}, {"sft": step})
    return run.path


def spoil(path):
    data = bytearray((path / "state.json").read_bytes())
    data[5] ^= 1
    (path / "state.json").write_bytes(bytes(data))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_refusal_is_one_line_with_what_is_safe_and_how_to_go_on(number, tmp_path):
    path = saved(tmp_path, 1, 2)
    with pytest.raises(CheckpointError) as caught, refusals_told(path):
        raise OSError(number, os.strerror(number), str(path / "metrics.jsonl"))
    text = str(caught.value)
    assert "\n" not in text
    assert os.strerror(number) in text
    assert "step-000002" in text
    assert f"ppomax resume {path}" in text


def test_the_writers_of_tensors_and_tokenizers_are_understood_too(tmp_path):
    words = "No space left on device (os error 28)"
    for error in (
        SafetensorError(f"Error while serializing: I/O error: {words}"),
        Exception(words),
    ):
        with pytest.raises(CheckpointError, match="nothing is damaged"), refusals_told(tmp_path):
            raise error
    for odd in (Exception("a bug"), RuntimeError(words), Exception("odd (os error 999)")):
        with pytest.raises(type(odd), match=re.escape(str(odd))), refusals_told(tmp_path):
            raise odd
    with pytest.raises(SafetensorError, match="header"), refusals_told(tmp_path):
        raise SafetensorError("invalid header")


def test_a_missing_file_of_somebody_elses_is_not_called_the_runs_disk(tmp_path):
    for name in (tmp_path / "table.json", None):
        with pytest.raises(FileNotFoundError), refusals_told(tmp_path / "run"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)
    with pytest.raises(CheckpointError), refusals_told(tmp_path / "run"):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "table.json"))


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(ConnectionError), refusals_told(tmp_path):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 3, 4])
def test_a_stage_whose_rows_meet_a_full_disk_ends_in_one_line_and_goes_on_afterwards(
    call, small, tmp_path, monkeypatch
):
    config = small("sft", tmp_path / "run", {"max_steps": 2, "checkpoint": {"every": 1}})
    calls, inner = [], rundir.append_jsonl

    def full(path, rows):
        calls.append(path)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        inner(path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "append_jsonl", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*ppomax resume"):
            train_sft(config)
    train_sft(config, resume=True)
    rows = (config.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_a_checkpoint_that_is_not_whole_is_named_and_the_one_before_taken(tmp_path, capsys):
    path = saved(tmp_path, 1, 2, 3)
    for number in (2, 3):
        spoil(checkpoint.path_of(path / "checkpoints", number))
    run = stage(tmp_path, resume=True)
    assert run.restore([])["step"] == 1
    rows = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    notes = [row["note"] for row in rows if row["kind"] == "damaged_checkpoint"]
    assert notes == [
        "step-000003 is not whole; going on from step-000001",
        "step-000002 is not whole; going on from step-000001",
    ]
    assert "step-000003 is not whole" in "".join(capsys.readouterr())


def test_where_no_checkpoint_is_whole_nothing_is_begun_again_unasked(tmp_path):
    path = saved(tmp_path, 1, 2)
    for number in (1, 2):
        spoil(checkpoint.path_of(path / "checkpoints", number))
    before = (path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        stage(tmp_path, resume=True)
    assert (path / "metrics.jsonl").read_bytes() == before


HOLD = """
import sys, time
from pathlib import Path
from ppomax import rundir
held = rundir.lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_do_not_write_one_run_and_a_dead_one_holds_nothing(tmp_path):
    path = saved(tmp_path, 1)
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env=os.environ | {"PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(PpomaxError, match=rf"process {other.pid} on .*writes this"):
            stage(tmp_path, resume=True)
        now = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
        assert {k: v for k, v in now.items() if k != rundir.LOCK} == {
            k: v for k, v in before.items() if k != rundir.LOCK
        }
    finally:
        other.kill()
        other.wait()
    assert stage(tmp_path, resume=True).found is not None


def test_one_process_does_not_write_a_run_twice_at_once_and_may_after_an_error(tmp_path):
    config = stage(tmp_path).config

    def fails():
        with opened("sft", config, resume=True):
            with pytest.raises(CheckpointError, match=f"process {os.getpid()} on"):
                stage(tmp_path, resume=True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as kept:
        fails()
    assert stage(tmp_path, resume=True).path == config.out
    del kept
