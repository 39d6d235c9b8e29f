"""What the stages share: micro-batches over ranks, one optimizer step, a run's files, signals."""

import json
import math
import os
import signal
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ppomax import checkpoint
from ppomax.data.formats import BadRow
from ppomax.distributed import World
from ppomax.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from ppomax.train import loop
from ppomax.train.loop import StageRun, Trainable
from ppomax.train.memory import peak_memory_gb
from ppomax.train.micro_batches import autocast, rank_micro_batches
from ppomax.train.optim import OptimSettings
from ppomax.train.settings import StageSettings

HERE = World(0, 1, torch.device("cpu"))


def settings(tmp_path, **changes):
    return StageSettings.model_validate({"model": "tiny", "out": tmp_path / "run"} | changes)


def opened(tmp_path, name="sft", *, resume=False, **changes):
    return StageRun(name, settings(tmp_path, **changes), HERE, resume=resume)


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trainable(clip=1.0, name="policy", **changes):
    torch.manual_seed(0)
    chosen = OptimSettings(lr=0.1, grad_clip=clip, **changes)
    return Trainable(name, nn.Linear(2, 1, bias=False), chosen, 10, HERE)


def test_without_compiled_kernels_the_run_says_so_and_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "library", lambda _: "no C++ compiler is found")
    opened(tmp_path)
    assert "more slowly: no C++ compiler is found" in capsys.readouterr().err
    monkeypatch.setattr(loop, "library", lambda _: object())
    opened(tmp_path, out=tmp_path / "other")
    assert "more slowly" not in capsys.readouterr().err


# --- micro-batches over ranks


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_every_micro_batch_counts_once_and_all_ranks_run_as_many(size, count):
    plan = [[index] for index in range(count)]
    shares = [rank_micro_batches(plan, World(rank, size, HERE.device)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == -(-count // size)
    counted = [batch for share in shares for batch, weight in share if weight == 1.0]
    assert sorted(counted) == plan
    fillers = [batch for share in shares for batch, weight in share if weight == 0.0]
    assert all(batch == plan[-1] for batch in fillers)


# --- one step


def test_the_norm_is_that_before_the_clip_and_the_step_that_after():
    model = trainable(clip=1.0, betas=(0.0, 0.0), eps=1.0)
    before = model.model.weight.detach().clone()
    model.backward((model.model(torch.tensor([[3.0, 4.0]])) * 2).sum())
    norm, taken = model.step()
    assert (norm, taken, model.step_count) == (pytest.approx(10.0), True, 1)
    clipped = torch.tensor([[0.6, 0.8]])  # (6, 8) scaled to norm 1
    expected = before - 0.1 * clipped / (clipped.abs() + 1.0)
    torch.testing.assert_close(model.model.weight.detach(), expected)
    assert model.model.weight.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_reaches_neither_parameter_nor_moment(bad):
    model = trainable()
    model.backward(model.model(torch.tensor([[1.0, 2.0]])).sum())
    model.step()
    weight = model.model.weight.detach().clone()
    state = {k: v.clone() for k, v in model.optimizer.state[model.model.weight].items()}
    model.backward(model.model(torch.tensor([[bad, 1.0]])).sum())
    norm, taken = model.step()
    assert not taken
    assert not math.isfinite(norm)
    assert torch.equal(model.model.weight, weight)
    now = model.optimizer.state[model.model.weight]
    assert all(torch.equal(now[key], state[key]) for key in state)
    assert model.step_count == 1
    assert model.model.weight.grad is None


def test_three_skipped_steps_of_one_model_stop_the_run_though_the_other_takes_its_own(tmp_path):
    run = opened(tmp_path, "ppo")
    for step in (1, 2):
        run.step_taken("policy", False, step, [step])
        run.step_taken("critic", True, step, [step])
    with pytest.raises(TrainingError, match="three optimizer steps of the policy in a row"):
        run.step_taken("policy", False, 3, ["b"])
    rows = [row for row in jsonl(run.path / "events.jsonl") if row["kind"] == "skipped_step"]
    assert [row["batch"] for row in rows] == [[1], [2], ["b"]]
    assert {row["model"] for row in rows} == {"policy"}


def test_a_checkpoint_written_beside_training_has_its_own_steps_skips(tmp_path, monkeypatch):
    run, go, plain = opened(tmp_path, checkpoint={"asynchronous": True}), Event(), checkpoint.save

    def late(*given):
        assert go.wait(60)
        return plain(*given)

    monkeypatch.setattr(checkpoint, "save", late)
    run.save(1, [trainable()], {"step": 1}, {"sft": 1})
    run.step_taken("policy", False, 2, [], reason="non-finite loss")
    go.set()
    run._writer.wait()
    state = json.loads((checkpoint.path_of(run.path / "checkpoints", 1) / "state.json").read_text())
    assert run.skipped_in_a_row == {"policy": 1}
    assert state["skipped_in_a_row"] == {}


def test_a_step_taken_forgets_the_skipped_ones(tmp_path):
    run = opened(tmp_path)
    for _ in range(4):
        run.step_taken("policy", False, 1, [])
        run.step_taken("policy", False, 2, [])
        run.step_taken("policy", True, 3, [])


# --- a run's files


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(tmp_path):
    run = opened(tmp_path)
    (run.path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="already holds a run"):
        opened(tmp_path)
    assert (run.path / "metrics.jsonl").read_text() == "{}\n"


def test_resuming_with_other_settings_is_refused(tmp_path):
    opened(tmp_path)
    opened(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"config\.yaml differs"):
        opened(tmp_path, resume=True, seed=1)


def test_resuming_what_never_began_begins_it(tmp_path):
    run = opened(tmp_path, resume=True)
    assert (run.path / "config.yaml").exists()
    assert run.found is None


def test_a_key_that_is_not_declared_for_the_stage_cannot_be_logged(tmp_path):
    run = opened(tmp_path)
    with pytest.raises(KeyError, match="made/up"):
        run.log(1, {"made/up": 1.0}, total=1)
    with pytest.raises(KeyError, match="policy/loss"):
        run.log(1, {"policy/loss": 1.0}, total=1)
    assert not (run.path / "metrics.jsonl").exists()


def test_rows_and_events_carry_the_stage_whose_steps_are_counted(tmp_path):
    run = opened(tmp_path, "ppo")
    run.stage = "critic"
    run.event("note", step=2, words="w")
    run.log(2, {"value/loss": 0.5}, total=3)
    run.stage = "ppo"
    run.event("note", step=1, words="v")
    assert [row["stage"] for row in jsonl(run.path / "events.jsonl")] == ["critic", "ppo"]
    assert jsonl(run.path / "metrics.jsonl")[0]["stage"] == "critic"


def test_rows_set_aside_are_all_in_the_events_with_their_place(tmp_path):
    run = opened(tmp_path)
    run.set_aside([])
    assert not (run.path / "events.jsonl").exists()
    run.set_aside([BadRow(f"f.jsonl:{n}", "empty", "nothing there") for n in (3, 9)])
    rows = jsonl(run.path / "events.jsonl")
    assert [(row["where"], row["defect"], row["reason"]) for row in rows] == [
        ("f.jsonl:3", "empty", "nothing there"),
        ("f.jsonl:9", "empty", "nothing there"),
    ]


def test_without_a_checkpoint_a_resumed_run_starts_its_files_again(tmp_path):
    run = opened(tmp_path)
    run.log(1, {"sft/loss": 1.0}, total=2)
    run.event("note", step=0)
    run.release()
    again = opened(tmp_path, resume=True)
    assert again.restore([trainable()]) is None
    assert (run.path / "metrics.jsonl").read_text() == ""
    assert (run.path / "events.jsonl").read_text() == ""


def test_a_checkpoint_comes_back_and_rows_past_it_are_cut(tmp_path):
    run, model = opened(tmp_path), trainable()
    model.backward(model.model(torch.tensor([[1.0, 2.0]])).sum())
    model.step()
    run.log(1, {"sft/loss": 1.0}, total=2)
    run.save(1, [model], {"step": 1, "odd": [1, 2]}, {"sft": 1})
    run.log(2, {"sft/loss": 2.0}, total=2)
    run.release()
    other = trainable()
    state = opened(tmp_path, resume=True).restore([other])
    assert (state["step"], state["odd"], other.step_count) == (1, [1, 2], 1)
    assert torch.equal(other.model.weight, model.model.weight)
    assert [row["step"] for row in jsonl(run.path / "metrics.jsonl")] == [1]


def test_another_thread_count_is_said(tmp_path, monkeypatch):
    run, model = opened(tmp_path), trainable()
    run.save(1, [model], {"step": 1}, {"sft": 1})
    now = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: now + 3)
    run.release()
    opened(tmp_path, resume=True).restore([model])
    rows = [row for row in jsonl(run.path / "events.jsonl") if row["kind"] == "resume"]
    assert f"{now} threads before, {now + 3} now" in rows[0]["note"]


def test_only_the_newest_checkpoints_stay(tmp_path):
    run, model = opened(tmp_path, checkpoint={"keep_last": 2}), trainable()
    for step in range(1, 5):
        run.save(step, [model], {"step": step}, {"sft": step})
    names = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000004"]


def test_a_full_disk_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    run, model = opened(tmp_path), trainable()
    run.save(1, [model], {"step": 1}, {"sft": 1})
    full = SimpleNamespace(free=0)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: full)
    with pytest.raises(CheckpointError, match=r"step-000002.*last good one is .*step-000001"):
        run.save(2, [model], {"step": 2}, {"sft": 2})
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-000001"]


# --- signals


def test_a_signal_is_noted_and_the_old_handler_comes_back(tmp_path):
    run = opened(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with run.stopper.noting():
        assert not run.stop_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop_asked()
    assert signal.getsignal(signal.SIGTERM) is before
    assert run.interrupt().exit_code == 75


def test_a_signal_after_the_last_step_ends_the_stage_done_and_what_follows_is_left(tmp_path):
    run = opened(tmp_path)
    with run.stopper.noting():
        os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(Interrupted, match="the same call with resume=True"):
        run.finish()
    assert loop.is_done(run.path)


def test_autocast_is_for_bf16_only():
    weight, x = torch.ones(2, 2), torch.ones(2, 2)
    with autocast(HERE, torch.float32):
        assert torch.mm(x, weight).dtype == torch.float32
    with autocast(HERE, torch.bfloat16):
        assert torch.mm(x, weight).dtype == torch.bfloat16


def test_memory_is_measured_in_gigabytes():
    assert 0.05 < peak_memory_gb(HERE) < 100
