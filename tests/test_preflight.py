"""What a run names is looked for before it begins, and a place where nothing began stays free."""

import json
import shutil

import pytest

from ppomax import planning, preflight
from ppomax.errors import CheckpointError, ConfigError, PpomaxError
from ppomax.pipeline import run_recipe
from ppomax.recipe import load_recipe

MISSING = {
    "ppo.ptx.data": ("ppo.ptx.data=nope.jsonl", r"setting ppo\.ptx\.data: nope\.jsonl: no such"),
    "track": (
        "ppo.monitor.track={data: nope.jsonl}",
        r"setting ppo\.monitor\.track\.data: nope\.jsonl: no such file",
    ),
    "eval.data": ("eval.data=nope.jsonl", r"setting eval\.data: nope\.jsonl: no such file"),
    "scorer": ("eval.scorers=[{model: ./nope, name: n}]", r"\./nope"),
    "data of a folder that is here": (
        "eval.data=some/rows",
        r"eval\.data: some/rows: no such file",
    ),
    "no reward": ("reward=null", r"setting ppo\.reward\.model: missing"),
    "a language model as the reward's": (
        "ppo.reward={model: tiny}",
        r"setting ppo\.reward\.model: model 'tiny' is no reward model",
    ),
    "positions": ("ppo.max_length=9999", "max_length: 9999 is more than the 512 positions"),
    "critic": ("ppo.critic=./nope", r"\./nope"),
    "callable": (
        "ppo.reward={callable: 'nope:f'}",
        r"setting ppo\.reward\.callable: 'nope:f' cannot be imported",
    ),
    "prompts": ("ppo.max_prompt=3", r"ppo\.max_prompt: no prompt fits 3 tokens"),
    "a judge's function": (
        "eval.judges=['callable:nope:f']",
        r"setting eval\.judges: 'nope:f' cannot be imported",
    ),
    "a judge's model": ("eval.judges=['reward:./nope']", r"\./nope"),
    "people's votes": (
        "eval.judges=['file:nope.jsonl']",
        r"setting eval\.judges: file:nope\.jsonl: no such file",
    ),
    "questions": ("eval.capability={data: [nope.jsonl]}", r"nope\.jsonl: no such file"),
    "what nothing makes": ("ppo=null", r"ppo/export"),
}
MISSING |= {
    f"extra {extra}": (word, rf"setting {setting}: {package} is not installed; .*\[{extra}\]")
    for word, setting, package, extra in (
        ("ppo.log.to=[wandb]", r"ppo\.log\.to", "wandb", "wandb"),
        ("ppo.engine={kind: vllm}", r"ppo\.engine\.kind", "vllm", "vllm"),
        ("eval.data=hub:some/rows", r"eval\.data", "datasets", "hub"),
        ("ppo.ptx.data=hub:some/rows", r"ppo\.ptx\.data", "datasets", "hub"),
    )
}


def quiet(_):
    pass


def recipe_of(out, smoke, *more):
    return load_recipe("smoke", [f"out={out}", *smoke, *more])


@pytest.mark.parametrize("name", MISSING)
def test_what_a_later_stage_names_is_missed_in_the_plan(name, tiny, tmp_path, smoke, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    word, text = MISSING[name]
    if name.startswith("extra"):  # none of them is there
        monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda _: None)
    more = ["ppo.critic=policy"] if name == "callable" else []
    with pytest.raises(PpomaxError, match=text):
        planning.plan(recipe_of(tmp_path / "run", smoke, *more, word))
    assert not (tmp_path / "run").exists()


def test_a_stage_alone_says_which_stage_is_to_come_first(tiny, tmp_path, smoke):
    recipe = recipe_of(tmp_path / "run", smoke)
    for name, first in (
        ("reward", "`ppomax sft` with"),
        ("ppo", "`ppomax sft`, `ppomax reward` with"),
        ("eval", "`ppomax sft`, `ppomax reward`, `ppomax ppo` with"),
    ):
        with pytest.raises(ConfigError, match=f"{name}: reads what other stages .*run {first}"):
            run_recipe(recipe, only=name, say=quiet)
        assert not (tmp_path / "run").exists()


def test_ppo_starts_from_sft_or_base(tiny, tmp_path, smoke):
    for value in ("bsae", "[x]"):
        with pytest.raises(ConfigError, match=r"ppo\.start: sft or base is wanted, found"):
            recipe_of(tmp_path / "run", smoke, f"ppo.start={value}")
    recipe = recipe_of(tmp_path / "run", smoke, "ppo.start=base")
    assert recipe.ppo.reference == str(tmp_path / "run" / "sft" / "export")


@pytest.mark.parametrize(
    "word", ["sft.max_length=50000", "sft.data=nope.jsonl", "sft.freeze_layers=99"]
)
def test_a_stage_that_could_not_begin_leaves_the_place_free(word, tiny, tmp_path, smoke):
    out = tmp_path / "run"
    with pytest.raises(PpomaxError):
        run_recipe(recipe_of(out, smoke, word), only="sft", say=quiet)
    assert not out.exists()
    run_recipe(recipe_of(out, smoke), only="sft", say=quiet)
    assert (out / "sft" / "done.json").exists()


@pytest.mark.slow
def test_what_a_later_stage_is_to_do_may_be_mended_when_it_could_not_begin(
    tiny, tmp_path, smoke_run, smoke
):
    out = tmp_path / "run"
    wrong = recipe_of(out, smoke, "ppo.ptx.data=nope.jsonl")
    for stage in ("sft", "reward"):
        run_recipe(wrong, only=stage, say=quiet)
    with pytest.raises(PpomaxError, match=r"nope\.jsonl"):
        run_recipe(wrong, resume=True, say=quiet)
    assert (out / "sft" / "done.json").exists()
    assert not (out / "ppo").exists()
    with pytest.raises(CheckpointError, match=r"sft\.optim\.lr"):
        run_recipe(recipe_of(out, smoke, "sft.optim.lr=0.1"), resume=True, say=quiet)
    run_recipe(recipe_of(out, smoke), resume=True, say=quiet)
    assert (out / "report.html").exists()
    assert json.loads((out / "asked.json").read_text())["stages"][-1] == "eval"


def test_a_run_in_which_something_was_done_is_never_removed(tiny, tmp_path, smoke, smoke_run):
    out = tmp_path / "run"
    shutil.copytree(smoke_run.out / "sft", out / "sft")
    shutil.copy(smoke_run.out / "config.yaml", out / "config.yaml")
    (out / "sft" / "done.json").unlink()
    before = sorted(path.name for path in (out / "sft").iterdir())
    wrong = recipe_of(out, smoke, "sft.data=nope.jsonl")
    with pytest.raises(PpomaxError):
        run_recipe(wrong, resume=True, say=quiet)
    assert sorted(path.name for path in (out / "sft").iterdir()) == before
