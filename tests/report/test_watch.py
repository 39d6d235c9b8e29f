"""The live view: a run going on, finished or broken off, on a terminal and elsewhere."""

import io
import json
import math

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ppomax.cli import app
from ppomax.errors import ConfigError
from ppomax.report.read import read_run, read_runs
from ppomax.report.watch import BLOCKS, QUIET, sparkline, state, view, watch


def row(step, attempt=0, **values):
    return {"stage": "ppo", "step": step, "attempt": attempt, "time": 2.0 * step, **values}


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "ppo"
    path.mkdir()
    (path / "config.yaml").write_text("iterations: 40\n")
    rows = [
        row(s, **{"reward/score_mean": 0.5 * s, "kl/ref_k3": 0.01, "policy/perplexity": 5.0})
        for s in range(1, 13)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    alarm = row(9) | {"kind": "alarm_red", "signals": [{"signal": "response/length_mean"}]}
    limits = ["KL 2 above max_kl 1", "length 0.9 of the limit"]
    hard = row(10) | {"kind": "alarm_red", "signals": [], "limits": limits}
    (path / "events.jsonl").write_text(json.dumps(alarm) + "\n" + json.dumps(hard) + "\n")
    sample = row(10) | {"response": "a\nreply", "score": 1.25}
    (path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return path


def shown(path, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(view(path, width))
    return out.getvalue()


def test_a_sparkline_goes_from_the_least_to_the_greatest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BLOCKS
    assert sparkline([7, 0], 10) == BLOCKS[7] + BLOCKS[0]
    assert sparkline([1, 1, 1], 10) == BLOCKS[0] * 3
    assert sparkline([1, math.nan, 2], 10) == BLOCKS[0] + " " + BLOCKS[7]
    assert sparkline([], 10) == ""
    assert sparkline([math.nan], 10) == " "


def test_a_long_curve_becomes_means_of_equal_stretches():
    assert sparkline([0, 0, 7, 7, 3.4, 3.6], 3) == BLOCKS[0] + BLOCKS[7] + BLOCKS[4]
    assert len(sparkline(list(range(1000)), 60)) == 60


def test_the_view_shows_progress_curves_alarms_and_replies(run):
    text = shown(run)
    assert "ppo, step 12 of 40" in text
    assert "reward/score_mean" in text
    assert "0.5 → 6" in text
    assert "step 9  alarm_red: response/length_mean" in text
    assert "step 10  alarm_red: KL 2 above max_kl 1, length 0.9 of the limit" in text
    assert "1.25  a reply" in text
    assert max(len(line) for line in shown(run, 70).splitlines()) <= 70


def test_the_state_says_running_quiet_or_finished(run):
    last = max(file.stat().st_mtime for file in run.iterdir())
    runs = [read_run(run)]
    assert state(run, runs, last + 1) == "running"
    assert state(run, runs, last + QUIET + 60) == "nothing written for 3 min 00 s"
    (run / "done.json").write_text("{}\n")
    assert state(run, runs, last + 1e6) == "finished"


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_between_two_stages_is_not_finished(run, asked):
    whole = run.parent
    (whole / "config.yaml").write_text("sft: {}\nreward: null\nppo: {}\neval: {}\n")
    if asked:
        (whole / "asked.json").write_text('{"stages": ["ppo", "eval"]}\n')
    (run / "done.json").write_text("{}\n")
    missing = ["eval"] if asked else ["eval", "sft"]
    for name in missing:
        assert state(whole, read_runs(whole), 0.0) != "finished"
        (whole / name).mkdir()
        (whole / name / "report.json").write_text('{"kind": "policy"}\n')
    assert state(whole, read_runs(whole), 0.0) == "finished"


def test_a_finished_run_shows_the_curves_of_ppo_and_the_evaluations_verdict_in_a_line(run):
    whole = run.parent
    (whole / "sft").mkdir()
    (whole / "sft" / "metrics.jsonl").write_text(
        json.dumps({"stage": "sft", "step": 1, "train/loss": 1.0}) + "\n"
    )
    (whole / "eval").mkdir()
    report = {
        "kind": "policy",
        "baseline": "sft",
        "policy": "ppo",
        "scorers": [{"name": "gold", "role": "held-out", "difference": 1.0, "ci95": [0.5, 1.5]}],
    }
    (whole / "eval" / "report.json").write_text(json.dumps(report) + "\n")
    text = shown(whole)
    assert "ppo, step 12 of 40" in text
    assert "0.5 → 6" in text
    assert "eval: PPO is better than SFT, judged by a held-out scorer" in text.splitlines()
    assert [line[-1] for line in shown(whole, 40).splitlines() if "eval: " in line] == ["…"]


def test_a_finished_run_ends_the_live_view_and_a_torn_one_opens(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "step": 13, "rew')
    assert "step 12 of 40" in shown(run)
    (run / "done.json").write_text("{}\n")
    out = io.StringIO()
    watch(run, every=60, console=Console(file=out, force_terminal=True, width=100))
    assert "finished" in out.getvalue()


def test_rows_a_rollback_left_behind_are_not_drawn(run):
    with (run / "metrics.jsonl").open("a") as file:
        for step in (6, 7):
            file.write(json.dumps(row(step, 1, **{"reward/score_mean": 0.5 * step})) + "\n")
    found = read_run(run)
    assert found.series["reward/score_mean"][0] == [1, 2, 3, 4, 5, 6, 7]
    assert found.abandoned["reward/score_mean"][0] == [6, 7, 8, 9, 10, 11, 12]
    assert "step 7 of 40, attempt 1" in shown(run)


def test_the_command_prints_once_without_a_terminal(run):
    result = CliRunner().invoke(app, ["watch", str(run)])
    assert result.exit_code == 0
    assert "step 12 of 40" in result.output


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        watch(tmp_path, every=1, console=Console(file=io.StringIO()))
