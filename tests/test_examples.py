"""What is shown to readers works: examples run, recipes parse, docs/paper.md names what exists."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from ppomax.pipeline import run_recipe
from ppomax.recipe import Recipe, load_recipe
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.rewards import call, call_steps, load_callable

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- examples


@pytest.mark.slow
def test_ppo_from_scratch_raises_the_score(capsys):
    example = load_example("ppo_from_scratch")
    small = (
        "--sft-steps 80 --critic-rollouts 2 --iterations 5 --replies 32 --new-tokens 16 --seed 1"
    )
    history = example.main(small.split())
    assert len(history) == 5
    # with the policy frozen (--lr 1e-9) four seeds gain -0.01 to 0.03, else 0.06 to 0.13
    assert sum(history[3:]) / 2 > history[0] + 0.05
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5
    assert all("kl" in line and "perplexity" in line for line in lines)


@pytest.mark.slow
def test_the_readmes_python_runs(tiny, tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    function = (
        "def reward(prompts, responses, **_):\n    return [float(len(r)) for r in responses]\n"
    )
    (tmp_path / "my_module.py").write_text(function)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(compile(code.group(1), "README.md", "exec"), {})
    assert (tmp_path / "runs" / "p" / "export" / "config.json").exists()


def test_ppo_from_scratch_fits_its_page():
    assert len((ROOT / "examples" / "ppo_from_scratch.py").read_text().splitlines()) <= 300


@pytest.mark.parametrize("name", ["reward", "patient_reward"])
def test_the_reward_function_is_called_as_ppo_calls_it(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    scorer = load_callable(f"examples.reward_callable:{name}", "ppo.reward.callable")
    prompt = ({"role": "user", "content": "How do I water a cactus?"},)
    good = "Water a cactus when its soil is dry, about once in two weeks."
    scores = call(
        scorer,
        [prompt] * 3,
        [good, "no idea", ""],
        ["a", "b", "c"],
        [{}] * 3,
        timeout=5,
        retries=0,
    )
    assert scores[0] > scores[1]
    assert scores[2] != scores[2]  # nan: set aside


def test_the_step_function_is_called_as_ppo_calls_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    scorer = load_callable("examples.reward_callable:step_rewards", "ppo.reward.process")
    prompt = ({"role": "user", "content": "How?"},)
    steps = [["First this.", "Then that.", "First this."], ["Done."]]
    found = call_steps(scorer, [prompt] * 2, steps, ["a", "b"], [{}] * 2, timeout=5, retries=0)
    assert found == [[0.1, 0.1, 0.0], [0.1]]


@pytest.mark.slow
def test_the_reward_function_s_command_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    settings = ["reward=null", "eval=null", "ppo.critic=policy", "ppo.iterations=1"]
    settings += ["ppo.reward.callable=examples.reward_callable:reward", f"out={tmp_path / 'run'}"]
    run_recipe(load_recipe("smoke", settings), say=lambda _text: None)
    assert (tmp_path / "run" / "ppo" / "export" / "config.json").exists()


# --- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses(path):
    recipe = load_recipe(str(path), ["out=somewhere"])
    assert recipe.stages()


def test_the_papers_recipe_holds_the_papers_settings():
    recipe = load_recipe("hh-7b-paper", [])
    assert (recipe.sft.epochs, recipe.sft.optim.lr, recipe.sft.optim.floor) == (2, 9.5e-6, 0.1)
    assert (recipe.reward.optim.lr, recipe.reward.lm_coef, recipe.reward.max_steps) == (
        5e-6,
        1,
        1000,
    )
    ppo = recipe.ppo
    assert (ppo.rollout_size, ppo.minibatch_size, ppo.epochs) == (128, 32, 1)
    assert (ppo.optim.lr, ppo.critic_optim.lr, ppo.kl.coef, ppo.advantage.lam) == (
        5e-7,
        1.65e-6,
        0.05,
        0.9,
    )
    assert ppo.max_prompt + ppo.sampling.max_new_tokens == 2048


@pytest.mark.parametrize("name", ["ppo-max", "vanilla", "paper-scripts"])
def test_every_preset_can_be_named(name):
    assert load_recipe("smoke", [f"ppo.preset={name}"]).ppo is not None


def test_recipes_and_presets_are_described():
    text = (ROOT / "recipes" / "README.md").read_text()
    for path in (*RECIPES, *(ROOT / "recipes" / "presets").glob("*.yaml")):
        assert f"`{path.stem}`" in text, path.stem


# --- docs/paper.md

PAPER = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
STAGES = ("sft", "reward", "ppo", "eval")


def defined(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def inner_models(annotation):
    if hasattr(annotation, "model_fields"):
        return [annotation]
    parts = getattr(annotation, "__args__", ())
    return [found for part in parts for found in inner_models(part)]


def is_setting(key):
    models = [Recipe]
    for part in key.split("."):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if not fields:
            return False
        models = [found for field in fields for found in inner_models(field.annotation)]
    return True


@pytest.mark.slow
def test_functions_and_tests_named_in_the_paper_page_exist():
    functions = re.findall(r"`([\w/]+\.py):(\w+)`", PAPER)
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAPER)
    assert len(functions) > 30
    assert len(tests) > 30
    places = [(ROOT / "src" / "ppomax" / file, name) for file, name in functions]
    places += [(ROOT / file, name) for file, name in tests]
    missing = [f"{file}:{name}" for file, name in places if name not in defined(file)]
    assert missing == []


def keys_named():
    return {key for key in re.findall(r"`([a-z]+(?:\.[a-z_]+)+)`", PAPER) if not key.endswith("md")}


def test_settings_named_in_the_paper_page_exist():
    keys = keys_named()
    assert len(keys) > 60
    assert {key for key in keys if not is_setting(key)} == set()


def test_every_setting_of_the_method_is_named_in_the_paper_page():
    shared = set(PPOConfig.__mro__[1].model_fields) - {"max_length"}
    keys = keys_named()
    missing = []
    for stage in ("sft", "reward", "ppo"):
        (model,) = inner_models(Recipe.model_fields[stage].annotation)
        for name, field in model.model_fields.items():
            key = f"{stage}.{name}"
            inner = inner_models(field.annotation)
            covered = key in keys or any(other.startswith(f"{key}.") for other in keys)
            if name not in shared and not covered and name not in ("data", "max_length"):
                missing.append(key)
            if stage == "ppo" and inner and name not in ("data", "critic_optim", "lora"):
                missing += [
                    f"{key}.{part}"
                    for part in inner[0].model_fields
                    if name not in shared and f"{key}.{part}" not in keys
                ]
    assert missing == []


@pytest.mark.slow
def test_every_pitfall_has_a_test_of_its_number_and_those_named_exist():
    page = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 39))
    tests = set().union(*map(defined, (ROOT / "tests").rglob("test_*.py")))
    for number, names in rows:
        found = re.findall(r"`(test_\w+)`", names)
        assert any(name.startswith(f"test_{int(number):02}_") for name in found), number
        assert set(found) <= tests, number
