"""Every shipped recipe and preset parses; those whose model and data are here can be planned."""

from pathlib import Path

import pytest
import yaml

from ppomax import planning
from ppomax.config import dump, merge, parse
from ppomax.errors import ConfigError
from ppomax.planning import Size, plan
from ppomax.presets import with_preset
from ppomax.recipe import Recipe, load_recipe, resolve
from ppomax.train.ppo_config import PPOConfig

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PRESETS = sorted((FOLDER / "presets").glob("*.yaml"))
SEVEN_B = Size(6_738_415_616, 131_072_000, 32, 4096, 8192, 32000, 4096, 11008)


def least(recipe):
    """What a preset needs beside itself to be a PPO stage."""
    base = {"model": "m", "out": "o", "data": ["d"], "iterations": 1, "reward": {"model": "r"}}
    return merge(recipe, base)


def sources(recipe):
    stages = [getattr(recipe, name) for name in recipe.stages()]
    found = [source.path for stage in stages for source in stage.data]
    ptx = recipe.ppo.ptx if recipe.ppo else None
    return found + [source.path for source in (ptx.data if ptx else [])]


def test_there_are_recipes_and_presets():
    assert {"demo", "smoke"} <= {path.stem for path in RECIPES}
    assert {"ppo-max", "vanilla", "paper-scripts"} <= {path.stem for path in PRESETS}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_dump_is_itself(path):
    recipe = load_recipe(str(path), [])
    assert recipe.stages()
    again = parse(Recipe, yaml.safe_load(dump(recipe)))
    assert again == recipe
    assert load_recipe(path.stem, []) == recipe  # by its name, as shipped


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_stage_is_fed_by_the_one_before(path):
    recipe = load_recipe(str(path), ["out=X"])
    if recipe.sft and recipe.reward:
        assert recipe.reward.model == "X/sft/export"
    if recipe.ppo and recipe.sft:
        assert recipe.ppo.model == "X/sft/export"
    if recipe.ppo and recipe.reward:
        assert recipe.ppo.reward.model == "X/reward/export"
    if recipe.eval and recipe.ppo:
        assert recipe.eval.policy == "X/ppo/export"
        assert recipe.eval.baseline == recipe.ppo.model
        assert [s.role for s in recipe.eval.scorers if s.model == recipe.ppo.reward.model] == [
            "proxy"
        ]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_ppo_stage_with_the_least_beside_it(path):
    section = least({"preset": path.stem})
    found = resolve({"model": "m", "ppo": section}, "test").ppo
    assert found is not None
    assert found.rollout_size == 128


def test_the_ppo_max_preset_is_the_defaults():
    preset = yaml.safe_load((FOLDER / "presets" / "ppo-max.yaml").read_text())
    assert parse(PPOConfig, least(preset)) == parse(PPOConfig, least({}))


def test_what_the_presets_say_of_the_paper():
    vanilla, scripts = (
        parse(PPOConfig, least(yaml.safe_load((FOLDER / "presets" / f"{name}.yaml").read_text())))
        for name in ("vanilla", "paper-scripts")
    )
    assert vanilla.kl.coef == 0
    assert vanilla.reward.normalise is vanilla.reward.clip is vanilla.loss.value_clip is None
    assert vanilla.critic_pretraining is scripts.critic_pretraining is None
    assert scripts.ptx is None
    assert scripts.reward.clip is None


def test_a_preset_lies_below_what_the_recipe_says():
    found = with_preset({"preset": "vanilla", "kl": {"coef": 0.2}}, "r")
    assert found["kl"] == {"coef": 0.2}
    assert found["reward"] == {"normalise": None, "clip": None}
    assert "preset" not in found


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_planned(path, tiny, monkeypatch):
    """Tiny and bundled ones as they are, others with a size and tokenizer put in."""
    recipe = load_recipe(str(path), [])
    if any(not source.startswith("bundled:") for source in sources(recipe)):
        pytest.skip("its data is not in this checkout; parsed above")
    if planning._first_model(recipe, getattr(recipe, recipe.stages()[0]).model) != "tiny":
        monkeypatch.setattr(planning, "model_size", lambda *_, **__: SEVEN_B)
        plain = planning.load_tokenizer
        monkeypatch.setattr(planning, "load_tokenizer", lambda *_, **more: plain("tiny", **more))
    stages = plan(recipe)
    assert [stage.stage for stage in stages] == [n for n in recipe.stages() if n != "eval"]
    assert all(stage.memory_gb > 0 and stage.disk_gb > 0 for stage in stages)


def test_a_recipe_says_which_file_it_is_when_wrong():
    with pytest.raises(ConfigError, match=r"^mine\.yaml: unknown setting sft\.epoch"):
        resolve({"model": "m", "sft": {"data": "d", "epoch": 1}}, "mine.yaml")


def test_a_shared_key_that_every_stage_sets_itself_is_no_override(tmp_path):
    with pytest.raises(ConfigError, match=r"'data=x.jsonl' has no effect: sft, reward, ppo, eval"):
        load_recipe("smoke", ["data=x.jsonl"])
    recipe = {"model": "tiny", "data": "a.jsonl", "sft": {"log": {"samples": 1}}, "reward": {}}
    place = tmp_path / "r.yaml"
    place.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    found = load_recipe(str(place), ["data=x.jsonl", "log.samples=3", "log.samples_every=2"])
    assert found.sft.data[0].path == found.reward.data[0].path == "x.jsonl"
    assert (found.sft.log.samples, found.reward.log.samples) == (1, 3)
    assert found.sft.log.samples_every == 2
    place.write_text(yaml.safe_dump(recipe | {"reward": None}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"give sft\.log\.samples="):
        load_recipe(str(place), ["log.samples=3"])
