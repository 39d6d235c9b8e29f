"""The command line: help at once, exit codes, every verb once on the tiny model."""

import io
import json
import os
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from ppomax import cli
from ppomax.errors import CheckpointError, ConfigError, DataError, Interrupted, TrainingError

VERBS = [
    [],
    ["demo"],
    ["run"],
    ["sft"],
    ["reward"],
    ["ppo"],
    ["resume"],
    ["plan"],
    ["report"],
    ["recipes"],
    ["generate"],
    ["chat"],
    ["annotate"],
    ["data"],
    ["data", "check"],
    ["eval"],
    ["eval", "reward"],
    ["eval", "policy"],
    ["eval", "capability"],
    ["models"],
    ["models", "pull"],
]
HEAVY = {"torch", "transformers", "peft", "matplotlib", "numpy"}
ALL_HELP = f"""
import sys, time
from ppomax import cli
times = []
for words in {VERBS!r}:
    sys.argv = ["ppomax", *words, "--help"]
    began = time.process_time()
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
    times.append(time.process_time() - began)
print("LOADED", sorted(set(sys.modules) & {HEAVY!r}))
print("SLOWEST", max(times))
"""


@pytest.fixture
def ppomax(tiny, tmp_path, monkeypatch, capsys):
    """Run `ppomax` with some words in `tmp_path`: exit code, stdout, stderr."""
    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
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


@pytest.mark.slow
def test_a_file_in_the_working_directory_stands_in_for_nothing_of_pythons(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('shadowed')")
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [str(Path(sys.executable).with_name("ppomax")), "generate", "./nope"]
    command += ["--prompts", "bundled:prompts", "--out", "x.jsonl"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "ppomax: model" in done.stderr
    assert "shadowed" not in done.stderr


def test_replies_that_could_not_be_written_are_not_generated(ppomax):
    words = ["generate", "tiny", "--prompts", "bundled:prompts", "--out", "no/such/x.jsonl"]
    code, _, err = ppomax(*words)
    assert code == 2
    assert "option out: no/such/x.jsonl cannot be written" in err


def test_a_runs_own_report_is_not_written_over(ppomax, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    code, _, err = ppomax("eval", "reward", "nope", "--data", "nope.jsonl", "--out", "run")
    assert code == 2
    assert "option out: run holds a run" in err


# --- help


@pytest.mark.slow
def test_help_of_every_verb_loads_nothing_heavy_and_exits_0():
    done = subprocess.run(
        [sys.executable, "-c", ALL_HELP], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    assert done.stdout.count("Usage:") == len(VERBS)
    assert float(done.stdout.split("SLOWEST")[1]) < 0.5


@pytest.mark.slow
def test_a_cold_help_takes_no_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "ppomax.cli", "run", "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0
    assert "recipe" in done.stdout.lower()
    assert seconds < 1.5  # the promise is 0.5 s; this machine may be busy


def test_shipped_recipes_and_presets_are_listed_and_shown(ppomax):
    code, out, _ = ppomax("recipes")
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert code == 0
    assert {"demo", "hh-smollm2", "vanilla", "ppo-max"} <= set(names)
    assert yaml.safe_load(ppomax("recipes", "vanilla")[1])["kl"]["coef"] == 0.0
    code, _, err = ppomax("recipes", "fig7-no-clip")
    assert code == 2
    assert "nearest are fig17-no-clip" in err


def test_the_version_is_the_installed_packages(ppomax):
    code, out, _ = ppomax("--version")
    assert (code, out) == (0, f"ppomax {metadata.version('ppomax')}\n")


def test_every_verb_of_the_contract_is_there():
    text = subprocess.run(
        [sys.executable, "-m", "ppomax.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    for verb in ("demo", "sft", "reward", "ppo", "run", "resume", "plan", "report", "generate"):
        assert f" {verb} " in text
    for verb in ("annotate", "chat", "data", "eval", "models"):
        assert f" {verb} " in text


def test_without_words_the_help_is_shown(ppomax):
    _, out, err = ppomax()
    assert "Usage:" in out + err


@pytest.mark.parametrize("words", [["fly"], ["run"], ["run", "--fast"], ["generate", "tiny"]])
def test_words_that_are_no_command_exit_2(words, ppomax):
    assert ppomax(*words)[0] == 2


# --- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("setting a: b"), 2),
        (DataError("f:1: c"), 2),
        (CheckpointError("d"), 2),
        (TrainingError("e"), 1),
        (Interrupted("f"), 75),
    ],
)
def test_errors_end_in_one_line_and_their_code(error, code, ppomax, monkeypatch):
    from ppomax import recipe

    def fails(*_):
        raise error

    monkeypatch.setattr(recipe, "load_recipe", fails)
    assert ppomax("run", "smoke") == (code, "", f"ppomax: {error}\n")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied"),
    ],
)
def test_a_refusal_of_the_disk_ends_in_one_line(error, text, ppomax, monkeypatch):
    from ppomax import recipe

    def fails(*_):
        raise error

    monkeypatch.setattr(recipe, "load_recipe", fails)
    assert ppomax("run", "smoke") == (2, "", f"ppomax: {text}\n")


def test_an_interrupt_outside_a_stage_exits_130(ppomax, monkeypatch):
    from ppomax import recipe

    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "load_recipe", stops)
    assert ppomax("run", "smoke")[0] == 130


def test_only_rank_0_speaks(ppomax, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    cli.say("hello")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    cli.say("hello")
    assert capsys.readouterr().err == "hello\n"


def test_a_computing_verb_starts_again_with_what_it_is_to_do_with_memory(monkeypatch):
    started = []
    monkeypatch.setattr(cli.os, "execv", lambda *words: started.append(words))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")  # its owner knows why
    monkeypatch.setattr(sys, "argv", ["ppomax", "plan", "x"])
    cli._set_memory_up()
    monkeypatch.setattr(sys, "argv", ["ppomax", "run", "--help"])
    cli._set_memory_up()
    assert started == []
    monkeypatch.setattr(sys, "argv", ["ppomax", "run", "x", "seed=1"])
    cli._set_memory_up()
    assert started[0][1][1:] == ["-P", "-m", "ppomax.cli", "run", "x", "seed=1"]
    given = dict(each.split("=") for each in os.environ["GLIBC_TUNABLES"].split(":"))
    assert given.pop("glibc.malloc.hugetlb") == "1"
    assert given.pop("glibc.malloc.mmap_max") == "0"  # and what is freed is kept, all of it
    assert int(given.pop("glibc.malloc.trim_threshold")) >= 2**40
    assert given.pop("glibc.malloc.arena_max") == "1"
    assert not given
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    cli._set_memory_up()
    assert len(started) == 1  # once


def test_programs_can_set_what_the_commands_set_for_themselves():
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    argv = [sys.executable, "-m", "ppomax.process"]
    told = subprocess.run(argv, env=env, check=True, capture_output=True, text=True).stdout
    assert told.startswith("export GLIBC_TUNABLES=") == (sys.platform == "linux")
    again = env | {"GLIBC_TUNABLES": ""}
    assert subprocess.run(argv, env=again, check=True, capture_output=True, text=True).stdout == ""


# --- the verbs, once each


@pytest.fixture(scope="module")
def finished(smoke_run, tiny):
    return smoke_run.out


@pytest.mark.slow
def test_run_says_what_it_does_and_what_comes_next(ppomax, smoke_run):
    out, err = smoke_run.out, smoke_run.err
    for stage in ("sft", "reward", "ppo", "eval"):
        assert f"{stage}: starting" in err
        assert (out / stage / "done.json").exists()
    assert f"report: {out}/report.html" in err
    assert f"next:   ppomax chat {out}/ppo/export" in err
    code, said, err = ppomax("resume", out)
    assert (code, said) == (0, "")
    assert err.count("finished before, kept") == 4


@pytest.mark.slow
def test_the_stages_one_by_one_are_the_run(ppomax, finished, smoke):
    for stage in ("sft", "reward", "ppo"):
        assert ppomax(stage, "smoke", "out=run", *smoke)[0] == 0
    for stage in ("sft", "reward", "ppo"):
        weights = [p / stage / "export" / "model.safetensors" for p in (Path("run"), finished)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not Path("run/eval").exists()


@pytest.mark.slow
def test_plan_shows_the_settings_and_the_cost_and_starts_nothing(ppomax, smoke):
    code, out, _ = ppomax("plan", "smoke", "out=run", *smoke)
    assert code == 0
    assert "preset" not in out
    assert "optimizer steps      1," in out
    assert "1, each 1 optimizer steps of 4 replies" in out
    assert "fits" in out
    assert not Path("run").exists()


@pytest.mark.slow
def test_report_writes_one_page(ppomax, finished):
    code, out, _ = ppomax("report", finished, "--out", "page.html")
    assert code == 0
    assert out.strip() == "page.html"
    assert "<svg" in Path("page.html").read_text()


def test_generate_answers_every_prompt_the_same_way_twice(ppomax, finished, small_data):
    words = ["generate", finished / "ppo" / "export", "--prompts", small_data["prompts"]]
    words += ["--max-new-tokens", "4"]
    assert ppomax(*words, "--out", "a.jsonl")[1].strip() == "8 replies in a.jsonl"
    assert ppomax(*words, "--out", "b.jsonl")[0] == 0
    assert Path("a.jsonl").read_text() == Path("b.jsonl").read_text()
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"id", "prompt", "response", "finished", "model", "sampling", "seed"}
    assert rows[0]["sampling"]["top_p"] == 0.9
    assert ppomax(*words, "--out", "c.jsonl", "--seed", "1", "--limit", "3")[0] == 0
    other = [json.loads(line) for line in Path("c.jsonl").read_text().splitlines()]
    assert len(other) == 3
    assert [r["response"] for r in other] != [r["response"] for r in rows[:3]]


def test_eval_reward_writes_its_report(ppomax, finished, small_data):
    words = ["eval", "reward", finished / "reward" / "export", "--data", small_data["pairs"]]
    code, out, _ = ppomax(*words, "--out", "judged")
    assert code == 0
    assert out.splitlines()[0].startswith("all ")
    report = json.loads(Path("judged/report.json").read_text())
    assert report["accuracy"]["n"] == 8
    assert Path("judged/report.html").exists()


def test_chat_answers_until_an_empty_line(ppomax, monkeypatch):
    said = iter(["Hello", "And more?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    code, out, _ = ppomax("chat", "tiny", "--max-new-tokens", "3")
    assert code == 0
    assert len(out.splitlines()) >= 2
    assert all(char.isprintable() or char == "\n" for char in out)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second in the C locale
def test_chat_says_in_a_line_that_its_input_is_not_utf_8(errors, ppomax, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"tea \xff\n"), "utf-8", errors)
    monkeypatch.setattr("sys.stdin", stdin)
    code, _, err = ppomax("chat", "tiny", "--max-new-tokens", "3")
    assert (code, err) == (2, "ppomax: standard input: a line is not UTF-8; give text in UTF-8\n")


@pytest.mark.parametrize("kind", ["capability", "reward"])
def test_evaluations_spell_out_escapes_in_what_the_data_says(kind, ppomax, monkeypatch):
    from ppomax import evaluations
    from ppomax.eval import reward

    def said(*args, **kwargs):
        return ["subject \x1b[2J"]

    monkeypatch.setattr(reward, "evaluate_reward", said)
    monkeypatch.setattr(evaluations, f"write_{kind}_evaluation", said)
    code, out, _ = ppomax("eval", kind, "tiny", "--data", "x.jsonl")
    assert (code, out) == (0, "subject ␛[2J\n")


def test_models_pull_names_the_folder(ppomax, tiny):
    assert ppomax("models", "pull", "tiny")[1].strip() == tiny
    assert ppomax("models", "pull", "large")[0] == 2


def test_data_check_says_what_a_file_holds(ppomax, small_data):
    code, out, _ = ppomax("data", "check", small_data["pairs"])
    assert code == 0
    assert "8" in out
    code, out, _ = ppomax("data", "check", small_data["prompts"], "--kind", "sft")
    assert code == 1  # dialogues that wait for an answer are nothing to imitate
    assert "read as SFT data" in out
    code, _, err = ppomax("data", "check", small_data["prompts"], "--kind", "pairs")
    assert code == 2
    assert "none of preference, SFT, prompt, text" in err


@pytest.mark.slow
def test_demo_smoke_is_the_whole_path_and_goes_on_when_called_again(ppomax):
    code, _, err = ppomax("demo", "--smoke", "--out", "demo")
    assert code == 0, err
    names = {path.name for path in Path("demo").iterdir()}
    assert {"sft", "reward", "ppo", "eval", "config.yaml", "report.html"} <= names
    code, _, err = ppomax("demo", "--smoke", "--out", "demo")
    assert code == 0
    assert "going on where it stood" in err
