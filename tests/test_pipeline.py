"""Recipes: shared keys handed down, stages wired to each other, runs continued and found again."""

import json
import os
import signal
from pathlib import Path

import pytest

from ppomax import pipeline
from ppomax.config import dump
from ppomax.errors import CheckpointError, ConfigError, Interrupted
from ppomax.pipeline import run_recipe
from ppomax.recipe import load_recipe, load_run, resolve

BASE = {
    "model": "tiny",
    "out": "X",
    "sft": {"data": "a.jsonl"},
    "reward": {"data": "b.jsonl"},
    "ppo": {"data": "c.jsonl", "iterations": 1, "max_prompt": 64, "max_length": 512},
    "eval": {"data": "d.jsonl"},
}


def quiet(_):
    pass


def test_shared_keys_are_handed_down_and_a_stages_own_wins():
    recipe = resolve(BASE | {"seed": 5, "micro_tokens": 99, "sft": {"data": "a", "seed": 6}}, "r")
    assert (recipe.sft.seed, recipe.reward.seed, recipe.ppo.seed, recipe.eval.seed) == (6, 5, 5, 5)
    assert recipe.sft.micro_tokens == recipe.ppo.micro_tokens == 99


def test_shared_data_is_everyones_and_a_stages_own_replaces_it_whole():
    shared = {"path": "shared.jsonl", "where": {"lang": "en"}}
    data = {**BASE, "data": shared, "sft": {}, "reward": {"data": {"path": "own.jsonl"}}}
    recipe = resolve(data, "r")
    assert [s.path for s in recipe.sft.data] == ["shared.jsonl"]
    assert recipe.sft.data[0].where == {"lang": "en"}
    assert recipe.reward.data[0].path == "own.jsonl"
    assert recipe.reward.data[0].where == {}, "the filter belongs to the shared file"


def test_stages_are_wired_to_the_ones_that_are_there():
    recipe = resolve(BASE, "r")
    assert recipe.sft.model == "tiny"
    assert recipe.ppo.reward.model == "X/reward/export"
    assert recipe.eval.baseline == "X/sft/export"
    alone = resolve({key: BASE[key] for key in ("model", "out", "reward", "ppo")}, "r")
    assert alone.reward.model == alone.ppo.model == "tiny"


def test_a_callable_keeps_the_reward_stages_model_out_of_ppo():
    ppo = BASE["ppo"] | {"reward": {"callable": "m:f"}, "critic": "policy"}
    recipe = resolve(BASE | {"ppo": ppo}, "r")
    assert recipe.ppo.reward.model is None
    assert [s.model for s in recipe.eval.scorers] == ["X/reward/export"]


@pytest.mark.parametrize(
    "reward", [{"models": ["other"]}, {"callables": ["m:f"]}, {"process": "m:f"}], ids=str
)
def test_any_source_keeps_the_reward_stages_model_out_of_ppo(reward):
    ppo = BASE["ppo"] | {"reward": reward, "critic": "policy"}
    recipe = resolve(BASE | {"ppo": ppo}, "r")
    assert recipe.ppo.reward.model is None
    scorer = recipe.eval.scorers[0]
    assert (scorer.model, scorer.role) == (
        ("other", "proxy") if "models" in reward else ("X/reward/export", "held-out")
    ), "a model that PPO never sees is no proxy"


def test_the_evaluations_proxy_is_the_first_reward_model_it_can_read():
    models = [{"model": "far", "retokenize": True}, {"model": "near", "weight": 2.0}]
    ppo = BASE["ppo"] | {"reward": {"models": models}, "critic": "policy"}
    recipe = resolve(BASE | {"ppo": ppo}, "r")
    assert [s.model for s in recipe.eval.scorers] == ["near"]


def test_a_scorer_named_proxy_is_not_doubled_and_others_come_after_the_own():
    held_out = {"model": "other", "name": "other", "role": "held-out"}
    recipe = resolve(BASE | {"eval": {"data": "d", "scorers": [held_out]}}, "r")
    assert [(s.name, s.role) for s in recipe.eval.scorers] == [
        ("reward model", "proxy"),
        ("other", "held-out"),
    ]
    proxy = held_out | {"role": "proxy"}
    recipe = resolve(BASE | {"eval": {"data": "d", "scorers": [proxy]}}, "r")
    assert [s.name for s in recipe.eval.scorers] == ["other"]


def test_the_mapping_passed_is_left_as_it_was():
    data = json.loads(json.dumps(BASE))
    resolve(data, "r")
    assert data == BASE


def test_out_defaults_to_the_recipes_name(tmp_path, monkeypatch):
    data = {key: value for key, value in BASE.items() if key != "out"}
    assert resolve(data, "some/mine.yaml").out == Path("runs/mine")


def test_a_folder_of_the_recipes_name_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()
    assert load_recipe("smoke", []).stages() == ["sft", "reward", "ppo", "eval"]
    assert load_recipe("recipes/smoke.yaml", []) == load_recipe("smoke", [])
    with pytest.raises(ConfigError, match="shipped recipes: demo"):
        load_recipe("smoke-and-mirrors", [])


@pytest.fixture(scope="module")
def finished(smoke_run, tiny):
    return smoke_run.out


def test_a_run_holds_what_the_contract_says(finished):
    assert {"config.yaml", "report.html", "sft", "reward", "ppo", "eval"} <= {
        path.name for path in finished.iterdir()
    }
    for stage in ("sft", "reward", "ppo"):
        names = {path.name for path in (finished / stage).iterdir()}
        assert {"config.yaml", "env.json", "metrics.jsonl", "checkpoints", "export"} <= names
        newest = max((finished / stage / "checkpoints").iterdir())
        manifest = json.loads((newest / "manifest.json").read_text())
        assert set(manifest["files"]) == {p.name for p in newest.iterdir()} - {"manifest.json"}
        exported = {path.name for path in (finished / stage / "export").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= exported
    rows = [json.loads(s) for s in (finished / "ppo" / "samples.jsonl").read_text().splitlines()]
    keys = {"step", "attempt", "prompt", "response", "score", "length", "truncated", "id"}
    assert keys <= set(rows[0])
    report = json.loads((finished / "eval" / "report.json").read_text())
    assert report["num_prompts"] == 4


def test_a_run_is_found_by_its_directory_and_by_its_stages(finished):
    recipe = load_run(finished)
    assert recipe.out == finished
    for stage in ("sft", "ppo", "eval"):
        assert load_run(finished / stage) == recipe


@pytest.mark.slow
def test_a_finished_run_resumed_does_nothing_again(finished):
    before = {
        path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.parent != finished
    }
    said = []
    run_recipe(load_run(finished), resume=True, say=said.append)
    assert said == [f"{stage}: finished before, kept" for stage in ("sft", "reward", "ppo", "eval")]
    after = {p: p.stat().st_mtime_ns for p in before if p.is_file() and p.name != "config.yaml"}
    assert [path for path, when in after.items() if before[path] != when] == []


@pytest.mark.slow
def test_another_report_in_the_folder_costs_a_finished_run_neither_of_them(finished):
    numbers = finished / "report.json"
    before = numbers.read_text()
    try:
        numbers.write_text('{"kind": "capability"}')
        done = run_recipe(load_run(finished), resume=True, say=lambda _: None)
        assert numbers.read_text() == '{"kind": "capability"}'
        assert done.report == finished / "run-report.html"
        assert done.report.exists()
    finally:
        numbers.write_text(before)
        for left in finished.glob("run-report.*"):
            left.unlink()


@pytest.mark.slow
def test_one_stage_after_the_other_skips_what_is_done(tiny, tmp_path, smoke):
    recipe = load_recipe("smoke", [f"out={tmp_path / 'run'}", *smoke])
    said = []
    run_recipe(recipe, only="sft", say=said.append)
    run_recipe(recipe, only="sft", say=said.append)
    assert said == ["sft: starting", "sft: finished before, kept"]
    run_recipe(recipe, only="reward", say=said.append)
    assert (tmp_path / "run" / "reward" / "done.json").exists()


def test_a_run_is_not_started_where_one_stands(finished, smoke):
    recipe = load_recipe("smoke", [f"out={finished}", *smoke])
    with pytest.raises(ConfigError, match="already holds a run"):
        run_recipe(recipe, say=quiet)


def test_other_settings_do_not_resume_nor_pass_for_done(finished, smoke):
    recipe = load_recipe("smoke", [f"out={finished}", *smoke, "sft.optim.lr=0.1"])
    text = (finished / "config.yaml").read_text()
    for more in ({"resume": True}, {"only": "sft"}):
        with pytest.raises(CheckpointError):
            run_recipe(recipe, say=quiet, **more)
    assert (finished / "config.yaml").read_text() == text


def test_a_missing_stage_is_named_before_anything_is_written(tiny, tmp_path, smoke):
    recipe = load_recipe("smoke", [f"out={tmp_path / 'run'}", *smoke, "eval=null"])
    with pytest.raises(ConfigError, match="no stage eval; it has sft, reward, ppo"):
        run_recipe(recipe, only="eval", say=quiet)
    assert not (tmp_path / "run").exists()


def test_a_signal_between_stages_ends_the_run_as_one_to_resume(tiny, tmp_path, monkeypatch, smoke):
    recipe = load_recipe("smoke", [f"out={tmp_path / 'run'}", *smoke])
    before = signal.getsignal(signal.SIGTERM)

    def stopped(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(pipeline, "_run_stage", stopped)
    with pytest.raises(Interrupted, match="ppomax resume"):
        run_recipe(recipe, say=quiet)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stage_that_cannot_work_may_be_taken_out_of_a_run(tiny, tmp_path, monkeypatch, smoke):
    begun = []

    def runs(config, *, resume):
        if config.out.name == "eval":
            raise ConfigError("no such judge")
        begun.append(config.out.name)
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "config.yaml").write_text(dump(config))
        (config.out / "done.json").write_text("{}")

    monkeypatch.setattr(pipeline, "_run_stage", runs)
    monkeypatch.setattr(pipeline, "write_report", lambda *_: None)
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="no such judge"):
        run_recipe(load_recipe("smoke", [f"out={out}", *smoke]), say=quiet)
    assert begun == ["sft", "reward", "ppo"]
    done = run_recipe(load_run(out, ["eval=null"]), resume=True, asked=True, say=quiet)
    assert done.report == out / "report.html"
    assert load_run(out).eval is None
    (out / "asked.json").write_text('{"stages": ["eval"]}')
    with pytest.raises(ConfigError, match="none is left"):
        run_recipe(load_run(out, ["eval=null"]), resume=True, asked=True, say=quiet)
    (out / "asked.json").write_text('{"stages": ["sft", "reward"]}')
    with pytest.raises(CheckpointError, match="differs"):  # what was begun stays
        run_recipe(load_run(out, ["ppo=null"]), resume=True, asked=True, say=quiet)


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {"out": "~/run", "model": "tiny", "data": "~/rows.jsonl", "sft": {}}
    recipe = resolve(data, "x.yaml")
    assert recipe.out == tmp_path / "run"
    assert recipe.sft.out == tmp_path / "run" / "sft"
    assert recipe.sft.data[0].path == str(tmp_path / "rows.jsonl")


def test_a_stage_begun_from_python_is_told_where_to_go_on(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.yaml").write_text("iterations: 3\n")
    with pytest.raises(ConfigError, match=r"p: one stage, begun from Python; .*resume=True"):
        load_run(tmp_path / "p")
