"""What may differ between a run and its continuation, and what is said of the rest."""

import json

import pytest
import torch

from ppomax.distributed import World
from ppomax.errors import CheckpointError, ConfigError
from ppomax.pipeline import run_recipe
from ppomax.recipe import STAGES, load_recipe, load_run, same_run
from ppomax.train import resuming
from ppomax.train.resuming import changed_keys, differences, environment, harmful
from ppomax.train.settings import StageSettings
from ppomax.train.sft import train_sft

TIMES = ("time", "throughput/", "memory/")

HERE = World(0, 1, torch.device("cpu"))
SMALL = ["sft.max_steps=1", "sft.batch_tokens=200", "sft.heldout=0"]


def settings(**changes):
    return StageSettings.model_validate({"model": "tiny", "out": "run"} | changes)


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_changed_settings_are_named_by_their_path():
    now = settings(seed=2, checkpoint={"every": 3}, log={"to": ["tensorboard"]})
    assert changed_keys(settings(), now) == ["checkpoint.every", "log.to", "seed"]
    assert changed_keys(settings(), settings()) == []


def test_only_settings_that_leave_what_is_learned_alone_are_harmless():
    keys = ["checkpoint.every", "log.to", "micro_tokens", "seed", "micro_tokens_more", "model"]
    assert harmful(keys) == ["seed", "micro_tokens_more", "model"]
    keys = ["sft.micro_tokens", "sft.seed", "ppo.engine.slots", "ppo.engine.kind", "sft.log"]
    assert harmful(keys, prefixes=STAGES) == ["sft.seed", "ppo.engine.kind"]
    assert harmful(["sft.micro_tokens"]) == ["sft.micro_tokens"]


def test_what_changes_the_last_bits_is_named_with_both_values():
    before = environment(settings(), HERE)
    now = environment(settings(dtype="bfloat16"), World(1, 2, HERE.device)) | {"torch": "9"}
    found = differences(before, now)
    assert f"{torch.__version__} torch before, 9 now" in found
    assert "float32 dtype before, bfloat16 now" in found
    assert "1 ranks before, 2 now" in found
    assert len(found) == 3
    assert differences(before, before) == []
    assert differences({}, now) == [], "a checkpoint that does not say leaves nothing to compare"


@pytest.mark.parametrize("found", [None, object()])
def test_products_in_tiles_are_told_from_those_of_an_older_checkpoint(monkeypatch, found):
    monkeypatch.setattr(resuming, "tiles_for", lambda _: found)
    now = environment(settings(), HERE)
    older = {name: value for name, value in now.items() if name != "products"}
    told = [] if found is None else ["plain products before, tiles now"]
    assert differences(older, now) == told


@pytest.mark.slow
def test_a_stage_goes_on_with_other_micro_batches_to_the_same_losses(small, tmp_path):
    """Same order, losses within rounding; the difference is said; other settings are refused."""
    more = {"max_steps": 4, "epochs": 2, "eval_every": 2, "checkpoint": {"every": 2}}
    alone = train_sft(small("sft", tmp_path / "alone", more))
    first = small("sft", tmp_path / "run", more)
    train_sft(first)
    for path in (tmp_path / "run" / "checkpoints").glob("step-000004"):
        path.rename(tmp_path / "away")
    for name in ("done.json",):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(CheckpointError, match=r"differs from this run's in epochs; resume"):
        train_sft(small("sft", tmp_path / "run", more | {"epochs": 3}), resume=True)
    train_sft(small("sft", tmp_path / "run", more | {"micro_tokens": 30}), resume=True)
    rows = [jsonl(run / "metrics.jsonl") for run in (alone, tmp_path / "run")]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
    for one, other in zip(*rows, strict=True):
        numbers = {k: v for k, v in one.items() if not k.startswith(("stage", *TIMES))}
        assert {k: other[k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    notes = [row["note"] for row in jsonl(tmp_path / "run" / "events.jsonl") if "note" in row]
    assert "8192 micro_tokens before, 30 now" in notes[0]
    assert "micro_tokens: 30" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.slow
def test_resume_ends_the_stages_that_were_asked_for_and_no_more(tiny, tmp_path):
    out = tmp_path / "run"
    run_recipe(load_recipe("smoke", [f"out={out}", *SMALL]), only="sft", say=lambda _: None)
    said = []
    run_recipe(load_run(out), resume=True, asked=True, say=said.append)
    assert said == ["sft: finished before, kept"]
    assert not (out / "reward").exists()
    loaded = load_run(out, ["sft.micro_tokens=100"])
    assert loaded.sft.micro_tokens == 100
    run_recipe(loaded, resume=True, asked=True, say=said.append)
    with pytest.raises(CheckpointError, match=r"settings to resume with in sft\.seed;"):
        run_recipe(load_run(out, ["sft.seed=3"]), resume=True, say=said.append)


@pytest.mark.slow
def test_another_recipe_is_not_taken_for_the_run_that_stands_there(tiny, tmp_path):
    out = tmp_path / "run"
    smoke = load_recipe("smoke", [f"out={out}", *SMALL])
    run_recipe(smoke, only="sft", say=lambda _: None)
    assert same_run(smoke).sft == smoke.sft
    assert same_run(load_recipe("smoke", [f"out={out}", *SMALL, "log.samples=1"])).sft == smoke.sft
    with pytest.raises(ConfigError, match=r"other settings \(.* and \d+ more\).*ppomax resume"):
        same_run(load_recipe("demo", [f"out={out}"]))
