"""Presets: one a curve of the paper's ablation figures, each a few lines over another."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from ppomax import presets
from ppomax.config import merge, parse
from ppomax.errors import ConfigError
from ppomax.presets import with_preset
from ppomax.recipe import resolve
from ppomax.train.ppo import train_ppo
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.ppo_settings import AdvantageSettings

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "presets"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
CURVES = [name for name in NAMES if name.startswith("fig")]
FIGURES = {4: 1, 6: 5, 7: 4, 8: 4, 14: 4, 15: 3, 16: 3, 17: 3, 18: 3, 19: 3}
"""Curves of each figure."""
SAME = [
    {"fig04-vanilla", "vanilla"},
    {"fig07-entropy-bonus", "fig16-entropy-clip-35"},
    {"fig08-ppo-max", "fig15-kl-0.05", "fig18-grad-clip-1.0", "fig19-lambda-0.9", "ppo-max"},
]
"""Curves that are the same run: a figure's reference, and the value that PPO-max has anyway."""


def settings(name, **more):
    """A preset's settings with the least beside them, as a recipe of its own would have them."""
    least = {"data": ["d"], "iterations": 1, "reward": {"model": "r"}}
    data = {"model": "base", "sft": {"data": ["d"]}, "ppo": least | more | {"preset": name}}
    return resolve(data, "test").ppo


def test_settings_of_a_program_name_presets_as_recipes_do():
    given = {"model": "sft", "out": "o", "data": ["d"], "iterations": 1, "kl": {"coef": 0.3}}
    given |= {"reward": {"model": "r"}}
    named = parse(PPOConfig, given | {"preset": "vanilla"})
    assert named == parse(PPOConfig, with_preset(given | {"preset": "vanilla"}, "test"))
    assert named.critic_pretraining is None  # the preset's
    assert named.kl.coef == 0.3  # what stands beside it wins
    assert named != parse(PPOConfig, given) == parse(PPOConfig, given | {"preset": "ppo-max"})
    advantage = AdvantageSettings(estimator="grpo")
    for each in (advantage, advantage.model_dump(exclude_unset=True)):
        found = parse(PPOConfig, given | {"preset": "ppo-max", "advantage": each})
        assert found.critic is None
        assert found.samples_per_prompt == 4
    with pytest.raises(ConfigError, match=r"ppo\.preset: no preset 'vanila'.* vanilla"):
        parse(PPOConfig, given | {"preset": "vanila"})


def test_every_ablation_figure_has_its_curves():
    assert Counter(int(name[3:5]) for name in CURVES) == FIGURES


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_a_few_lines_that_name_it(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# Figure {int(name[3:5])}")
    own = yaml.safe_load(text)
    assert own["base"] in NAMES
    assert len(own) <= 5
    assert len(text.splitlines()) <= 12


def test_no_two_curves_are_the_same_run_unless_the_paper_drew_one_twice():
    found = {}
    for name in NAMES:
        found.setdefault(settings(name).model_dump_json(), set()).add(name)
    assert sorted(map(sorted, (same for same in found.values() if len(same) > 1))) == sorted(
        map(sorted, SAME)
    )


def test_a_preset_lies_on_its_base_and_that_on_another(tmp_path, monkeypatch):
    folder = tmp_path / "recipes" / "presets"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text("base: b\nkl: {coef: 0.3}\n")
    (folder / "b.yaml").write_text("base: c\nkl: {coef: 0.2, horizon: 5}\nepochs: 2\n")
    (folder / "c.yaml").write_text("epochs: 3\ncritic: policy\nkl: null\n")
    (folder / "loop.yaml").write_text("base: pool\n")
    (folder / "pool.yaml").write_text("base: loop\n")
    (folder / "lost.yaml").write_text("base: nowhere\n")
    monkeypatch.setattr(presets.importlib.resources, "files", lambda _: tmp_path)
    assert with_preset({"preset": "a", "kl": {"coef": 0.4}}, "r") == {
        "epochs": 2, "critic": "policy", "kl": {"coef": 0.4, "horizon": 5}
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"^r: .*circle: loop -> pool -> loop$"):
        with_preset({"preset": "loop"}, "r")
    with pytest.raises(ConfigError, match=r"no preset 'nowhere' among \d; nearest are"):
        with_preset({"preset": "lost"}, "r")


@pytest.mark.parametrize("name", ["ppo-max", "paper-scripts"])
def test_35_every_value_of_the_whole_presets_says_whose_it_is(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    silent = [
        line for line in lines if not line.endswith(":") and not re.search(r"# \([pco]\)", line)
    ]
    assert silent == []


def test_35_the_released_scripts_are_not_ppo_max():
    ours, theirs = settings("ppo-max"), settings("paper-scripts")
    assert (ours.reward.normalise, theirs.reward.normalise) == ("standardize", "scale")
    assert (ours.reward.clip, theirs.reward.clip) == (10, None)
    assert ours.critic_pretraining is not None
    assert theirs.critic_pretraining is None
    assert theirs.ptx is None


@pytest.mark.parametrize("name", NAMES)
def test_only_figure_14s_conflicts_are_advised_against(name):
    expected = {
        "fig14-norms-value-clip": r"value_clip conflict.*Figure 14",
        "fig14-scaling-advantage-norm": r"should not be mixed.*Figure 14",
    }
    found = settings(name).advice()
    assert len(found) == (name in expected)
    if found:
        assert re.search(expected[name], found[0])


def test_a_policy_from_the_base_model_is_held_to_the_sft_model():
    found = settings("fig08-policy-base")
    assert found.model == "base"
    assert found.reference.endswith("sft/export")
    assert settings("ppo-max").model == found.reference


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_lets_one_override_ask_what_its_critic_is_worth(name):
    without = settings(name, advantage={"estimator": "rloo"})
    assert without.critic is without.critic_pretraining is without.loss.value_clip is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_preset_runs_three_iterations_with_finite_metrics(name, small, tmp_path):
    """On the smoke model; a key that is not declared ends the run."""
    section = with_preset({"preset": name}, "test")
    if section.pop("start", "sft") == "base":
        section["reference"] = "tiny"
    sizes = {"iterations": 3, "sampling": {"max_new_tokens": 5}, "max_length": 128}
    if section.get("critic_pretraining"):
        sizes["critic_pretraining"] = {"max_rollouts": 1}
    run = train_ppo(small("ppo", tmp_path / "run", merge(section, sizes)))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "ppo"] == [1, 2, 3]
    assert len(rows) == 3 + ("critic_pretraining" in sizes)
    for row in rows:
        assert all(math.isfinite(value) for key, value in row.items() if key != "stage"), row


def test_the_readme_says_what_each_curve_shows():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(fig\d\d-[\w.-]+)`", text)) == set(CURVES)
