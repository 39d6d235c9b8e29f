"""PPO stopped by a signal at any phase, and with numbers that are not finite at any place."""

import json
import math
import os
import signal

import pytest
import torch

from ppomax import checkpoint
from ppomax.errors import Interrupted, TrainingError
from ppomax.metrics import MetricSums
from ppomax.rollout.native import NativeEngine
from ppomax.train import ppo, update
from ppomax.train.loop import StageRun
from ppomax.train.ppo import train_ppo
from ppomax.train.trainable import Trainable

BUSY = {
    "epochs": 2,
    "freeze_layers": 1,
    "iterations": 2,
    "critic_pretraining": {"max_rollouts": 2, "explained_variance": 1.0},
    "kl": {"target_per_token": 0.001, "horizon": 20},
    "buffer_iterations": 2,
    "micro_tokens": 30,
    "checkpoint": {"every": 2},
    "log": {"samples_every": 1},
}
UNASKED = ("checkpoint", "alarm")
CLOCK = ("time", "throughput/", "memory/")


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def told(path):
    rows = [
        row for name in ("metrics", "samples", "events") for row in jsonl(path / f"{name}.jsonl")
    ]
    rows = [row for row in rows if row.get("kind") != "checkpoint"]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]


def last(path):
    """The last checkpoint's state and tensors."""
    found = checkpoint.latest(path / "checkpoints")
    names = ("policy", "critic", "policy_optimizer", "critic_optimizer", "buffer_0")
    return found.state, {name: found.tensors(name) for name in names}


def assert_same(one, other):
    assert told(one) == told(other)
    (state, groups), (state_b, groups_b) = last(one), last(other)
    assert state == state_b
    for name, tensors in groups.items():
        assert all(torch.equal(value, groups_b[name][key]) for key, value in tensors.items()), name
    files = [run / "export" / "model.safetensors" for run in (one, other)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The undisturbed run, made by the first test that asks."""
    return tmp_path_factory.mktemp("alone")


def undisturbed(alone, small):
    if not (alone / "run").exists():
        train_ppo(small("ppo", alone / "run", BUSY))
    return alone / "run"


def stop_at(patch, owner, name, number, run_first=False):
    """A signal at the number-th call."""
    calls, inner = [], getattr(owner, name)

    def met(*args, **keywords):
        calls.append(1)
        result = inner(*args, **keywords) if run_first else None
        if len(calls) == number:
            os.kill(os.getpid(), (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[number % 3])
        return result if run_first else inner(*args, **keywords)

    patch.setattr(owner, name, met)


PLACES = {
    "rollout of the critic's": (NativeEngine, "generate", 2, None),
    "rollout": (NativeEngine, "generate", 4, None),
    "scoring": (ppo, "score", 3, None),
    "critic's second step of its second rollout": (Trainable, "step", 4, ("critic", 2)),
    "policy's first step": (Trainable, "step", 5, ("ppo", 1)),
    "critic's step beside it": (Trainable, "step", 6, ("ppo", 2)),
    "second epoch": (Trainable, "step", 10, ("ppo", 6)),
    "second iteration, on the buffer": (Trainable, "step", 16, ("ppo", 4)),
    "last step": (Trainable, "step", 28, ("ppo", 16)),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_run_stopped_anywhere_goes_on_to_the_undisturbed_end(
    place, small, tmp_path, monkeypatch, alone
):
    expected = undisturbed(alone, small)
    owner, name, number, at = PLACES[place]
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, number)
        with pytest.raises(Interrupted, match="state saved") as stopped:
            train_ppo(small("ppo", tmp_path / "run", BUSY))
    assert stopped.value.exit_code == 75
    within = checkpoint.latest(tmp_path / "run" / "checkpoints").state["update"]
    assert (within and (within["stage"], within["taken"])) == at
    train_ppo(small("ppo", tmp_path / "run", BUSY), resume=True)
    assert_same(tmp_path / "run", expected)


RED = {
    "iterations": 4,
    "monitor": {"max_kl": 1e-9, "action": "rollback", "max_rollbacks": 1},
    "checkpoint": {"every": 1, "asynchronous": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [6, 10])
def test_a_run_stopped_inside_an_update_before_or_after_a_rollback_goes_on_as_if_it_had_not_been(
    number, small, tmp_path, monkeypatch
):
    expected = train_ppo(small("ppo", tmp_path / "alone", RED))
    assert [row["to"] for row in jsonl(expected / "events.jsonl") if row["kind"] == "rollback"]
    with monkeypatch.context() as patch:
        stop_at(patch, Trainable, "step", number)
        with pytest.raises(Interrupted, match="state saved"):
            train_ppo(small("ppo", tmp_path / "run", RED))
    state = checkpoint.latest(tmp_path / "run" / "checkpoints").state
    assert state["update"]
    assert state["update"]["taken"]
    assert state["iteration"] + 1 not in state["watch"]["green"], "it is none to go back to"
    train_ppo(small("ppo", tmp_path / "run", RED), resume=True)
    assert told(tmp_path / "run") == told(expected)
    (state, state_b) = (latest(run).state for run in (tmp_path / "run", expected))
    assert state == state_b
    files = [run / "export" / "model.safetensors" for run in (tmp_path / "run", expected)]
    assert files[0].read_bytes() == files[1].read_bytes()


def latest(run):
    return checkpoint.latest(run / "checkpoints")


@pytest.mark.slow
def test_an_update_that_target_kl_ended_ends_there_when_resumed(small, tmp_path, monkeypatch):
    """The signal meets the policy's step that is one too many; the critic's beside it follows."""
    change = {"iterations": 1, "epochs": 2, "loss": {"target_kl": 1e-9}, "optim": {"lr": 1e-2}}
    expected = train_ppo(small("ppo", tmp_path / "alone", change))
    (ended,) = [row for row in jsonl(expected / "events.jsonl") if row["kind"] == "target_kl"]
    number = 2 * ended["minibatch"] + 1
    assert number > 1, "the first step is always within the limit"
    assert ended["epoch"] == 0
    with monkeypatch.context() as patch:
        stop_at(patch, Trainable, "step", number)
        with pytest.raises(Interrupted, match="state saved"):
            train_ppo(small("ppo", tmp_path / "run", change))
    train_ppo(small("ppo", tmp_path / "run", change), resume=True)
    assert told(tmp_path / "run") == told(expected)
    (state, state_b) = (latest(run).state for run in (tmp_path / "run", expected))
    assert state == state_b


@pytest.mark.slow
def test_a_step_that_does_not_fit_into_the_grace_is_dropped_and_taken_again(
    small, tmp_path, monkeypatch, alone
):
    expected = undisturbed(alone, small)
    cut, inner, wide = update.rank_micro_batches, update.micro_batch, []

    def noted(*args):
        found = cut(*args)
        wide.append(len(found) > 1)
        return found

    def met(*args):
        if sum(wide) == 3 and wide[-1]:  # in the third step that has several micro-batches
            wide.append(False)
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args)

    with monkeypatch.context() as patch:
        patch.setattr(update, "rank_micro_batches", noted)
        patch.setattr(update, "micro_batch", met)
        fits = iter([False, True])
        patch.setattr(StageRun, "fits", lambda *_: next(fits))
        with pytest.raises(Interrupted, match="state saved"):
            train_ppo(small("ppo", tmp_path / "run", BUSY))
        assert list(fits) == [], "asked in the middle of a step"
    train_ppo(small("ppo", tmp_path / "run", BUSY), resume=True)
    assert_same(tmp_path / "run", expected)


def test_sums_come_back_and_can_be_taken_back():
    sums = MetricSums()
    sums.add("a", 1.0, 2.0)
    sums.maximum("m", 3.0)
    state = json.loads(json.dumps(sums.state_dict()))
    sums.add("a", 5.0, 1.0)
    sums.add("b", 5.0, 1.0)
    sums.maximum("m", 9.0)
    sums.reset(state)
    assert sums.state_dict() == state
    twice = MetricSums()
    for _ in range(2):
        twice.add_state(state)
    assert twice.state_dict() == {"sums": {"a": 2.0}, "weights": {"a": 4.0}, "maxima": {"m": 3.0}}


# --- numbers that are not finite


def finite(run):
    """Whether everything in the last checkpoint is."""
    found = checkpoint.latest(run / "checkpoints")
    moments = found.state["moments"]
    assert all(math.isfinite(value) for value in moments.values()), moments
    assert math.isfinite(found.state["kl"]["coef"])
    names = ("policy", "critic", "policy_optimizer", "critic_optimizer")
    return all(
        bool(torch.isfinite(value.float()).all())
        for name in names
        for value in found.tensors(name).values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["score", "value", "log-prob", "logit", "loss", "gradient"])
def test_what_is_not_finite_reaches_no_parameter_moment_or_controller(
    place, bad, small, tmp_path, monkeypatch
):
    change = {"kl": {"target_per_token": 0.001, "horizon": 20}, "checkpoint": {"every": 1}}
    spoil(place, bad, monkeypatch)
    run = train_ppo(small("ppo", tmp_path / "run", change))
    assert finite(run)
    rows = jsonl(run / "metrics.jsonl")
    assert len(rows) == 2
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    events = [row for row in jsonl(run / "events.jsonl") if row["kind"] not in UNASKED]
    assert events, "nothing was said"
    kinds = {"score", "value", "log-prob"}
    assert {row["kind"] for row in events} <= (
        {"non_finite", "quarantined"} if place in kinds else {"skipped_step"}
    )


def spoil(place, bad, patch):
    """Put the number into one reply's score, value or log-prob, or into one update's loss."""
    if place in ("score", "value", "log-prob"):
        name = {"score": "scores", "value": "values", "log-prob": "logprobs"}[place]
        inner = ppo.score

        def scored(*args, **options):
            found = inner(*args, **options)
            getattr(found, name)[0] = bad
            if name == "scores" and math.isnan(bad):
                found.mask[0] = False  # as `score` does
            return found

        patch.setattr(ppo, "score", scored)
        return
    calls, step = [], Trainable.backward

    def backward(part, loss):
        calls.append(1)
        if len(calls) == 2 and place == "loss":
            loss = loss + bad
        step(part, loss * bad if len(calls) == 2 and place == "logit" else loss)
        if len(calls) == 2 and place == "gradient":
            weight = next(p for p in part.model.parameters() if p.grad is not None)
            weight.grad.view(-1)[0] = bad

    patch.setattr(Trainable, "backward", backward)


def test_a_rollout_of_nothing_but_bad_numbers_stops_the_run_and_is_kept(
    small, tmp_path, monkeypatch
):
    inner = ppo.score

    def scored(*args, **options):
        found = inner(*args, **options)
        found.values[:] = math.inf
        return found

    monkeypatch.setattr(ppo, "score", scored)
    with pytest.raises(TrainingError, match=r"non-finite values.*bad-batch-ppo-000001\.json"):
        train_ppo(small("ppo", tmp_path / "run"))
    assert len(json.loads((tmp_path / "run" / "bad-batch-ppo-000001.json").read_text())) == 4


@pytest.mark.slow
def test_a_minibatch_that_does_not_fit_into_memory_is_cut_smaller(small, tmp_path, monkeypatch):
    wide = {"micro_tokens": 400, "iterations": 1}
    rows = jsonl(train_ppo(small("ppo", tmp_path / "alone", wide)) / "metrics.jsonl")
    inner = update.micro_batch

    def narrow(experience, indices, now):
        if len(indices) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(experience, indices, now)

    monkeypatch.setattr(update, "micro_batch", narrow)
    run = train_ppo(small("ppo", tmp_path / "run", wide))
    assert [row for row in jsonl(run / "events.jsonl") if row["kind"] == "out_of_memory"]
    found = jsonl(run / "metrics.jsonl")
    for key in ("policy/loss", "value/loss", "policy/grad_norm", "value/grad_norm"):
        assert found[0][key] == pytest.approx(rows[0][key], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_plain_text_that_does_not_fit_into_memory_is_cut_smaller_too(small, tmp_path, monkeypatch):
    text = {"data": "bundled:text", "tokens": 60, "length": 20}
    wide = {"micro_tokens": 400, "iterations": 1, "ptx": text}
    rows = jsonl(train_ppo(small("ppo", tmp_path / "alone", wide)) / "metrics.jsonl")
    inner = update.collate

    def narrow(rows, *others):
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(rows, *others)

    monkeypatch.setattr(update, "collate", narrow)
    found = jsonl(train_ppo(small("ppo", tmp_path / "run", wide)) / "metrics.jsonl")
    assert found[0]["ptx/loss"] == pytest.approx(rows[0]["ptx/loss"], rel=1e-4)
