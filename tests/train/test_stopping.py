"""Signals: how long is left, what is dropped, what is saved, what is said."""

import json
import math
import os
import signal
import time

import pytest
import torch

from ppomax import checkpoint
from ppomax.distributed import World
from ppomax.errors import Interrupted, TrainingError
from ppomax.train import memory, sft
from ppomax.train.loop import StageRun, opened
from ppomax.train.settings import StageSettings
from ppomax.train.sft import train_sft
from ppomax.train.stopping import SIGNALS, StopAsked, Stopper

TIMES = ("time", "throughput/", "memory/")

HERE = World(0, 1, torch.device("cpu"))
SEVERAL = {"max_steps": 4, "epochs": 2, "eval_every": 2, "micro_tokens": 40}


def stage(tmp_path, **changes):
    chosen = {"model": "tiny", "out": tmp_path / "run", "checkpoint": changes}
    return StageRun("sft", StageSettings.model_validate(chosen), HERE, resume=False)


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def told(path):
    """Rows without the clock and without what one checkpoint more adds."""
    rows = [*jsonl(path / "metrics.jsonl"), *jsonl(path / "events.jsonl")]
    return [
        {k: v for k, v in r.items() if not k.startswith(TIMES)}
        for r in rows
        if r.get("kind") != "checkpoint"
    ]


def signalled_asleep():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(5)
    raise AssertionError("it slept on")


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_is_noted_and_the_second_ends_as_it_would_have(number, monkeypatch):
    stopper, sent = Stopper(), []
    monkeypatch.setattr(signal, "raise_signal", sent.append)
    before = signal.getsignal(number)
    with stopper.noting():
        assert not stopper.asked
        assert stopper.waited == 0.0
        os.kill(os.getpid(), number)
        assert stopper.asked
        assert sent == []
        signal.getsignal(number)(number, None)
        assert sent == [number]
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before


def test_where_nothing_need_be_saved_a_signal_ends_the_work_where_it_meets_it():
    stopper = Stopper()
    with stopper.noting():
        with stopper.at_once():
            pass
        with pytest.raises(StopAsked), stopper.at_once():
            signalled_asleep()
        with pytest.raises(StopAsked), stopper.at_once():
            raise AssertionError("asked before: not begun")


def test_micro_batches_go_on_while_they_and_the_save_fit_into_the_grace(tmp_path):
    for grace, save, fits in ((60, 0.0, True), (60, 61.0, False), (1e-6, 0.0, False)):
        run = stage(tmp_path / f"{grace} {save}", grace_s=grace)
        run.save_seconds = save
        assert list(run.watched([1, 2, 3])) == [1, 2, 3], "nobody asked"
        taken = []
        run.stopper.asked_at = time.monotonic()
        try:
            taken.extend(run.watched([1, 2, 3]))
        except StopAsked:
            assert not fits
        assert (run.fits(0.0), fits) in ((True, True), (True, False), (False, False))
        if fits:
            assert taken == [1, 2, 3]


def test_a_save_that_would_take_too_long_is_left_and_what_is_done_again_is_said(tmp_path):
    run = stage(tmp_path, grace_s=5)
    run.stopper.asked_at = time.monotonic()
    run.save_seconds, run.saved_at, saved = 9.0, 2, []
    error = run.stopped(7, lambda: saved.append(7))
    assert "goes on from step 2 and does 5 steps again" in str(error)
    assert (saved, error.exit_code) == ([], 75)
    run.save_seconds = 1.0
    assert "state saved" in str(run.stopped(7, lambda: saved.append(7)))
    assert saved == [7]
    run.saved_at = 7
    run.stopped(7, lambda: saved.append("twice"))
    assert saved == [7], "the last checkpoint is this state"
    run.stopped(7, lambda: saved.append("within"), within=True)
    assert saved == [7, "within"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["train_step", "evaluate"])
def test_a_stage_stopped_inside_a_step_or_evaluation_goes_on_to_the_same_end(
    place, small, tmp_path, monkeypatch
):
    alone = train_sft(small("sft", tmp_path / "alone", SEVERAL))
    where, inner, stopped = [], sft.collate, StageRun.stopped

    def named(name, work):
        return lambda *args: (where.append(name), work(*args))[1]

    def met(*args):
        if where.count(place) == 2 and where[-1] == place:
            where.append("stop")  # before the second one's first micro-batch
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(StageRun, "fits", lambda *_: False)  # the rest of it takes too long
        return inner(*args)

    def in_time(*args, **more):
        monkeypatch.setattr(StageRun, "fits", lambda *_: True)  # but the save does not
        return stopped(*args, **more)

    with monkeypatch.context() as patch:
        for name in ("train_step", "evaluate"):
            patch.setattr(sft, name, named(name, getattr(sft, name)))
        patch.setattr(sft, "collate", met)
        patch.setattr(StageRun, "stopped", in_time)
        patch.setattr(StageRun, "fits", StageRun.fits)
        with pytest.raises(Interrupted, match="state saved"):
            train_sft(small("sft", tmp_path / "run", SEVERAL))
    assert where[-1] == "stop"
    state = checkpoint.latest(tmp_path / "run" / "checkpoints").state
    assert state["step"] == {"train_step": 1, "evaluate": 3}[place]
    assert (state["trained"] is None) == (place == "train_step")
    train_sft(small("sft", tmp_path / "run", SEVERAL), resume=True)
    assert told(tmp_path / "run") == told(alone)
    weights = [run / "export" / "model.safetensors" for run in (alone, tmp_path / "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_signal_while_a_model_loads_ends_the_stage_at_once(small, tmp_path):
    run = opened("sft", small("sft", tmp_path / "run"), resume=False)
    with pytest.raises(Interrupted, match="the same call with resume=True"), run:
        signalled_asleep()


# --- memory


def test_a_micro_batch_that_does_not_fit_is_halved_until_it_does_with_the_same_result(
    small, tmp_path, monkeypatch
):
    alone = train_sft(small("sft", tmp_path / "alone", {"micro_tokens": 400}))
    inner = sft.collate

    def narrow(rows, *args):
        if len(rows) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return inner(rows, *args)

    monkeypatch.setattr(sft, "collate", narrow)
    monkeypatch.setattr(sft, "evaluate", lambda *_: {})
    run = train_sft(small("sft", tmp_path / "run", {"micro_tokens": 400}))
    events = [row for row in jsonl(run / "events.jsonl") if row["kind"] == "out_of_memory"]
    assert [row["now"] for row in events][:2] == [200, 100]
    for one, other in zip(*(jsonl(p / "metrics.jsonl") for p in (alone, run)), strict=True):
        assert other["sft/loss"] == pytest.approx(one["sft/loss"], rel=1e-5)
        assert other["sft/grad_norm"] == pytest.approx(one["sft/grad_norm"], rel=1e-5)


def test_memory_that_never_suffices_ends_the_run_with_what_would_do(tmp_path):
    run = stage(tmp_path)
    part = type("Part", (), {"drop_gradients": lambda _: None})()

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainingError, match=r"out of memory.*sft\.micro_tokens=8"):
        memory.fitted(run, [part], 1, full)
    assert run.micro_tokens == 16

    def broken(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        memory.fitted(run, [part], 1, broken)


# --- checkpoints of a stage


@pytest.mark.slow
def test_saving_in_a_thread_changes_no_result_and_no_checkpoint(small, tmp_path):
    every = {"every": 1, "keep_last": 9}
    found = []
    for name in ("plain", "thread"):
        kept = every | ({"asynchronous": True} if name == "thread" else {})
        run = train_sft(small("sft", tmp_path / name, SEVERAL | {"checkpoint": kept}))
        steps = sorted((run / "checkpoints").iterdir())
        assert len(steps) == 4
        found.append((told(run), [checkpoint.verify(path).tensors("policy") for path in steps]))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_write_that_fails_in_the_thread_is_not_lost():
    writer, done = checkpoint.Writer(), []
    writer.start(lambda: done.append(1))
    writer.start(lambda: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        writer.wait()
    writer.wait()
    assert done == [1]


def test_the_best_checkpoints_stay_beside_the_newest(tmp_path):
    for step, quality in enumerate([None, 0.9, 0.3, math.nan, 0.9, 0.1, 0.2, 0.0], start=1):
        state = {"step": step} | ({} if quality is None else {"quality": quality})
        checkpoint.save(tmp_path, step, {"policy": {"w": torch.zeros(1)}}, state)
    checkpoint.prune(tmp_path, 2, 1)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["5", "7", "8"]


def test_the_best_and_the_named_checkpoints_both_stay(tmp_path):
    for step, quality in enumerate([0.1, 0.9, 0.5, 0.3, 0.0], start=1):
        checkpoint.save(tmp_path, step, {"policy": {"w": torch.zeros(1)}}, {"quality": quality})
    checkpoint.prune(tmp_path, 1, 1, keep=[1, 2])
    kept = sorted(path.name[-1] for path in tmp_path.iterdir())
    assert kept == ["1", "2", "3", "5"], "a named one takes no place of the best"


def test_room_for_all_checkpoints_to_come_is_asked_for_before_the_first_step(tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=2500))
    checkpoint.check_room(tmp_path / "none" / "yet", 1000, 2)
    with pytest.raises(checkpoint.CheckpointError, match=r"lower checkpoint\.keep_last"):
        checkpoint.check_room(tmp_path, 1000, 3)
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "held").write_bytes(b"x" * 600)
    checkpoint.check_room(tmp_path, 1000, 3)
