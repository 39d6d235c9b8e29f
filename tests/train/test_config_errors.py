"""What users get wrong, through the command line: exit code 2, one line that names it."""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml

from ppomax import checkpoint, cli

SMOKE = Path(__file__).resolve().parents[2] / "recipes" / "smoke.yaml"


@pytest.fixture
def ppomax(tiny, tmp_path, monkeypatch, capsys):
    """Run `ppomax` with some words in `tmp_path`: exit code, stdout, stderr."""
    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ppomax", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def assert_refused(result, text, out=Path("run")):
    code, _, err = result
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("ppomax: ")]
    assert len(lines) == 1, err
    assert err.strip().splitlines()[-1] == lines[0], "and nothing after it"
    assert "Traceback" not in err
    assert text in lines[0]
    assert not list(out.rglob("done.json"))
    assert not list(out.rglob("*.safetensors"))


PPO_ALONE = ["sft=null", "reward=null", "eval=null"]
SCORED = [*PPO_ALONE, "ppo.reward.model=REWARD"]
EVAL_ALONE = ["sft=null", "reward=null", "ppo=null", "eval.baseline=tiny"]
NO_LANGUAGE = "{path: bundled:preferences, where: {lang: tlh}}"

WORDS = {
    "an unknown key": (
        ["ppo.iteratons=3"],
        "unknown setting ppo.iteratons; did you mean iterations",
    ),
    "an unknown key on top": (["sead=3"], "unknown setting sead"),
    "an unknown key far down": (
        ["ppo.critic_pretraining.rollouts=3"],
        "unknown setting ppo.critic_pretraining.rollouts; did you mean max_rollouts?",
    ),
    "a word for a number": (["sft.max_steps=many"], "setting sft.max_steps"),
    "a fraction of a step": (["ppo.iterations=1.5"], "setting ppo.iterations"),
    "a list for a number": (["seed=[1]"], "seed"),
    "a number for a section": (["ppo=3"], "setting ppo: a stage is a section of settings, found 3"),
    "a value for a section": (["ppo.reward=3"], "setting ppo.reward: a section of settings"),
    "nothing for a section": (["ppo.reward=null"], "setting ppo.reward"),
    "a number for a list": (["eval.scorers=3"], "eval.scorers"),
    "words for scorers": (["eval.scorers=[a, b]"], "eval.scorers.0"),
    "an override without =": (["seed"], "override 'seed': write key.sub=value"),
    "an override into a value": (["seed.a=1"], "seed"),
    "no stage": (["sft=null", "reward=null", "ppo=null", "eval=null"], "no stage"),
    "no model": (["model=null"], "setting model is missing"),
    "a preset that is not there": (
        ["ppo.preset=ppo-min"],
        "no preset 'ppo-min' among 36; nearest are ppo-max",
    ),
    "a dtype that is not there": (["dtype=float8"], "dtype"),
    "a device that is not there": (["device=abacus"], "setting device: 'abacus'"),
    "a rollout that does not divide": (
        ["ppo.rollout_size=9"],
        "must be a multiple of minibatch_size",
    ),
    "a data file that is not there": (["sft.data=nowhere.jsonl"], "nowhere.jsonl"),
    "bundled data that is not there": (["sft.data=bundled:nothing"], "no such bundled data"),
    "an empty data file": (["sft.data=EMPTY"], "empty.jsonl: holds no rows"),
    "rows that are no rows": (["sft.data=BAD"], "bad.jsonl:2"),
    "reward data without pairs": (
        ["sft=null", "reward.data=bundled:prompts"],
        "cannot be used as preference",
    ),
    "no row after the filter": (
        [f"sft.data={NO_LANGUAGE}"],
        "no usable SFT row where {'lang': 'tlh'}",
    ),
    "no prompt after the filter": (
        [*SCORED, f"ppo.data={NO_LANGUAGE}"],
        "no usable prompt row",
    ),
    "no prompt short enough": (
        [*SCORED, "ppo.max_prompt=3"],
        "setting ppo.max_prompt: no prompt",
    ),
    "half a mixture": (
        ["sft.data=[{path: bundled:preferences, weight: 1.0}, bundled:preferences]"],
        "weight: give every source",
    ),
    "a sequence longer than the model": (["max_length=600"], "600 is more than the 512 positions"),
    "a sequence longer than the model in ppo": (
        [*SCORED, "max_length=600"],
        "600 is more than the 512 positions",
    ),
    "a model that is not there": (["model=./no/such/folder"], "./no/such/folder"),
    "a model almost named": (["model=tinny"], "did you mean tiny?"),
    "a model without a tokenizer": (["model=NO_TOKENIZER"], "tokenizer"),
    "a reward model as a policy": (["model=REWARD"], "is a reward model"),
    "a policy as a reward model": (
        [*PPO_ALONE, "ppo.reward.model=tiny"],
        "reward",
    ),
    "a reward model with another tokenizer": (
        [*PPO_ALONE, "ppo.reward.model=OTHER"],
        "another tokenizer",
    ),
    "a scorer with another tokenizer": (
        [*EVAL_ALONE, "eval.policy=tiny", "eval.scorers=[{model: OTHER}]"],
        "eval.scorers.0.model",
    ),
    "a policy to judge with another tokenizer": (
        [*EVAL_ALONE, "eval.policy=OTHER_POLICY"],
        "eval.policy",
    ),
    "no reward at all": (
        ["sft=null", "reward=null", "eval=null"],
        "setting ppo.reward.model: missing",
    ),
    "a tracker that is not installed": (["sft.log.to=[trackio]"], 'pip install "ppomax[trackio]"'),
    "a threshold no entropy reaches": (
        [*SCORED, "ppo.loss.entropy_coef=0.1", "ppo.loss.entropy_threshold=9"],
        "ppo.loss.entropy_threshold",
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny, small_reward):
    """Folders and files with something wrong, by the words that stand for them."""
    from ppomax.models.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty.jsonl").write_text("")
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\nnot json\n[1, 2]\n')
    shutil.copytree(tiny, folder / "no_tokenizer")
    for file in (folder / "no_tokenizer").glob("*token*"):
        file.unlink()
    tokenizer = tiny_tokenizer(["other words entirely " * 40], 300)
    shutil.copytree(small_reward, folder / "other")
    tokenizer.save_pretrained(folder / "other")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder / "other_policy")
    tokenizer.save_pretrained(folder / "other_policy")
    return {
        "EMPTY": folder / "empty.jsonl",
        "BAD": folder / "bad.jsonl",
        "NO_TOKENIZER": folder / "no_tokenizer",
        "OTHER_POLICY": folder / "other_policy",
        "OTHER": folder / "other",
        "REWARD": small_reward,
    }


def placed(word, places):
    for name in sorted(places, key=len, reverse=True):
        if f"={name}" in word or f": {name}" in word:
            return word.replace(name, str(places[name]))
    return word


@pytest.mark.slow
@pytest.mark.parametrize("case", WORDS)
def test_a_wrong_setting_is_one_line_and_exit_code_2(case, ppomax, places):
    words, text = WORDS[case]
    words = [placed(word, places) for word in words]
    assert_refused(ppomax("run", SMOKE, "out=run", *words), text)


RECIPES = {
    "no such file": (None, "no such recipe file"),
    "not yaml": ("model: tiny\nsft: {data: [\n", "recipe.yaml:3: not YAML"),
    "not a mapping": ("- 1\n- 2\n", "a recipe is a mapping"),
    "empty": ("", "a recipe is a mapping"),
    "a stage without data": ("model: tiny\nsft: {max_steps: 1}\n", "setting sft.data is missing"),
    "not text": (b"\xff\xfe\x00", "cannot be read"),
}


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.parametrize("verb", ["run", "plan", "sft"])
def test_a_wrong_recipe_is_one_line_that_names_the_file(verb, case, ppomax, tmp_path):
    text, found = RECIPES[case]
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = ppomax(verb, path, "out=run")
    assert_refused(result, found)
    assert "recipe.yaml" in result[2]


def test_a_recipe_that_is_almost_named_is_offered(ppomax):
    assert_refused(ppomax("run", "smok"), "no such recipe file; did you mean smoke? shipped recipe")
    assert_refused(ppomax("run", "xyz"), "no such recipe file; shipped recipes: demo")


@pytest.mark.slow
def test_a_stage_the_recipe_lacks_is_named(ppomax):
    result = ppomax("ppo", SMOKE, "out=run", "ppo=null", "eval=null")
    assert_refused(result, "recipe has no stage ppo; it has sft, reward")
    assert not Path("run").exists()


@pytest.mark.slow
def test_an_existing_run_is_not_written_over(ppomax):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("mine: 1\n")
    assert_refused(ppomax("run", SMOKE, "out=run"), "run already holds a run")
    assert Path("run/config.yaml").read_text() == "mine: 1\n"
    assert [path.name for path in Path("run").iterdir()] == ["config.yaml"]


@pytest.mark.slow
def test_a_stage_finished_with_other_settings_is_not_passed_off_as_this_one(ppomax):
    words = ["out=run", "sft.max_steps=1", "sft.batch_tokens=200"]
    assert ppomax("sft", SMOKE, *words)[0] == 0
    config = Path("run/config.yaml").read_text()
    code, _, err = ppomax("sft", SMOKE, *words)
    assert code == 0
    assert "finished before, kept" in err
    code, _, err = ppomax("sft", SMOKE, *words, "sft.optim.lr=0.5")
    assert code == 2
    assert "other settings" in err
    assert Path("run/config.yaml").read_text() == config


@pytest.mark.slow
def test_an_out_that_cannot_be_written_is_one_line(ppomax, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(ppomax("run", SMOKE, "out=file/run"), "setting out", out=Path("none"))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_no_done_marker(ppomax, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    result = ppomax("sft", SMOKE, "out=run", "sft.max_steps=1", "sft.batch_tokens=200")
    assert_refused(result, "3 checkpoints of")
    assert re.search("[GM]B are free", result[2])


def test_resuming_what_is_not_there_is_one_line(ppomax):
    Path("empty").mkdir()
    for name in ("nowhere", "empty"):
        assert_refused(ppomax("resume", name), f"{name}: no run here", out=Path(name))


@pytest.mark.slow
def test_a_run_moved_elsewhere_says_from_where_to_resume(ppomax):
    assert ppomax("sft", SMOKE, "out=run", "sft.max_steps=1", "sft.batch_tokens=200")[0] == 0
    Path("other").mkdir()
    with contextlib.chdir("other"):
        code, _, err = ppomax("resume", "../run")
    assert code == 2
    assert f"go on with `cd {Path.cwd()} && ppomax resume run`" in err
    Path("run").rename("moved")
    code, _, err = ppomax("resume", "moved")
    assert code == 2
    assert "the run was made in run" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "1.5"], "top_p"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--dtype", "float16"], "dtype"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--out", "no/such/folder/out.jsonl"], "option out"),
        (["--prompts", "LONG"], "positions"),
    ],
    ids=str,
)
def test_wrong_options_of_generate_are_one_line(words, text, ppomax, small_data):
    Path("long.jsonl").write_text(json.dumps({"prompt": "word " * 600}) + "\n")
    options = {"--prompts": small_data["prompts"], "--out": "out.jsonl", "--max-new-tokens": "2"}
    options |= {words[0]: words[1].replace("LONG", "long.jsonl")}
    flat = [part for pair in options.items() for part in pair]
    assert_refused(ppomax("generate", "tiny", *flat), text)
    assert not Path("out.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["tiny", "--data", "bundled:preferences"], "reward"),
        (["REWARD", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["REWARD", "--data", "bundled:preferences", "--max-length", "2"], "max_length"),
        (["REWARD", "--data", "bundled:preferences", "--max-length", "9"], "no pair"),
        (["REWARD", "--data", "bundled:preferences", "--dtype", "int8"], "dtype"),
    ],
    ids=str,
)
def test_wrong_options_of_eval_reward_are_one_line(words, text, ppomax, small_reward):
    words = [word.replace("REWARD", small_reward) for word in words]
    assert_refused(ppomax("eval", "reward", *words, "--out", "judged"), text)
    assert not Path("judged").exists()


def test_data_that_would_be_refused_exits_1_and_lists_the_lines(ppomax, places):
    code, out, _ = ppomax("data", "check", places["BAD"])
    assert code == 1
    assert "2" in out
    code, _, _ = ppomax("data", "check", "bundled:preferences")
    assert code == 0
    assert ppomax("data", "check", "nowhere.jsonl")[0] == 2


def test_a_report_of_nothing_is_one_line(ppomax):
    code, _, err = ppomax("report", "nowhere")
    assert code == 2
    assert len([line for line in err.splitlines() if line.startswith("ppomax: ")]) == 1


def test_a_model_that_cannot_be_fetched_is_one_line(ppomax):
    for verb in ("run", "plan"):
        result = ppomax(verb, SMOKE, "out=run", "model=nobody/no-such-model")
        assert_refused(result, "nobody/no-such-model")


@pytest.mark.slow
def test_the_settings_of_a_run_are_complete(ppomax, tmp_path):
    assert ppomax("sft", SMOKE, "out=run", "sft.max_steps=1", "sft.batch_tokens=200")[0] == 0
    found = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert found["sft"]["optim"]["betas"] == [0.9, 0.95]
    assert found["ppo"]["reward"]["clip"] == 10.0
    own = yaml.safe_load((tmp_path / "run" / "sft" / "config.yaml").read_text())
    assert own == found["sft"]
    env = json.loads((tmp_path / "run" / "sft" / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__
    assert env["command"][1] == "sft"
