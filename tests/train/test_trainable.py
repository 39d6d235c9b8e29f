"""What reaches no parameter: losses and gradients that are not finite, and spikes."""

import json
import math

import pytest
import torch
from torch import nn

from ppomax.distributed import World
from ppomax.errors import TrainingError
from ppomax.train.loop import StageRun
from ppomax.train.optim import SPIKE_WINDOW, OptimSettings, is_spike
from ppomax.train.settings import StageSettings
from ppomax.train.trainable import Trainable

HERE = World(0, 1, torch.device("cpu"))


def trainable(**changes):
    torch.manual_seed(0)
    settings = OptimSettings(lr=0.1, **changes)
    return Trainable("policy", nn.Linear(2, 1, bias=False), settings, 10, HERE)


def snapshot(model):
    moments = model.optimizer.state[model.model.weight]
    return [model.model.weight.detach().clone(), *(value.clone() for value in moments.values())]


def step(model, scale=1.0):
    model.backward((model.model(torch.tensor([[1.0, 2.0]])) * scale).sum())
    return model.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(bad):
    model = trainable()
    step(model)
    before = snapshot(model)
    model.backward(model.model(torch.tensor([[1.0, 2.0]])).sum() + bad)  # a constant: no gradient
    norm, taken = model.step()
    assert math.isfinite(norm)
    assert not taken
    assert model.why_skipped == "non-finite loss"
    assert all(torch.equal(*pair) for pair in zip(snapshot(model), before, strict=True))
    assert step(model)[1], "the next step starts clean"
    assert model.why_skipped == ""


def test_a_gradient_whose_square_overflows_reaches_no_moment():
    model = trainable(grad_clip=None)
    step(model)
    before = snapshot(model)
    assert not step(model, 1e25)[1]
    assert model.why_skipped == "non-finite gradient"
    assert all(torch.equal(*pair) for pair in zip(snapshot(model), before, strict=True))


def test_a_spike_is_judged_by_a_full_window_alone():
    usual = [1.0, 3.0] * (SPIKE_WINDOW // 2)  # mean 2, standard deviation a little over 1
    assert not is_spike(1e9, usual[:-1], 6.0)
    assert is_spike(8.1, usual, 6.0)
    assert not is_spike(7.9, usual, 6.0)
    assert not is_spike(-1e9, usual, 6.0)


def test_a_spike_is_skipped_where_asked_and_a_new_level_becomes_the_usual_one():
    for z, taken in ((6.0, False), (None, True)):
        model = trainable(spike_z=z)
        for number in range(SPIKE_WINDOW):
            assert step(model, 1.0 + number % 2)[1]
        assert step(model, 100.0)[1] is taken
        assert model.why_skipped == ("" if taken else "gradient norm spike")
    for _ in range(SPIKE_WINDOW):
        step(model, 100.0)
    assert step(model, 100.0)[1]


def test_the_window_is_part_of_the_state(tmp_path):
    model = trainable(spike_z=6.0)
    for number in range(SPIKE_WINDOW + 2):
        step(model, 1.0 + number % 3)
    state = json.loads(json.dumps(model.state()))
    assert state["policy_norms"] == list(model.norms)
    assert len(state["policy_norms"]) == SPIKE_WINDOW
    assert trainable().state() == {"policy_steps": 0, "policy_lr_factor": 1.0}


def test_the_third_bad_batch_in_a_row_is_left_in_a_file_and_spikes_do_not_count(tmp_path):
    settings = StageSettings.model_validate({"model": "tiny", "out": tmp_path / "run"})
    run = StageRun("sft", settings, HERE, resume=False)
    for number in range(5):
        run.step_taken("policy", False, number, [], reason="gradient norm spike")
    for number in range(2):
        run.step_taken("policy", False, number, [], reason="non-finite loss")
    with pytest.raises(TrainingError, match=r"non-finite loss.*bad-batch-policy-000007\.json"):
        run.step_taken(
            "policy", False, 7, [3], reason="non-finite loss", contents=lambda: [{"ids": [1, 2]}]
        )
    text = (run.path / "bad-batch-policy-000007.json").read_text()
    assert json.loads(text) == [{"ids": [1, 2]}]


def test_numbers_that_are_none_are_left_out_of_a_row(tmp_path):
    settings = StageSettings.model_validate({"model": "tiny", "out": tmp_path / "run"})
    run = StageRun("sft", settings, HERE, resume=False)
    run.log(1, {"sft/loss": math.nan, "sft/perplexity": math.inf, "sft/lr": 0.5}, total=2)
    row = json.loads((run.path / "metrics.jsonl").read_text())
    assert row["sft/lr"] == 0.5
    assert not {"sft/loss", "sft/perplexity"} & set(row)
