"""Run directories read back, and what a report makes of them in words and tables."""

import json

import pytest
import yaml

from ppomax.errors import ConfigError
from ppomax.report import figures, read_run, read_runs
from ppomax.report.read import elapsed
from ppomax.report.tables import differences, event_rows, flatten, metric_rows, timing
from ppomax.report.verdict import policy_verdict, preference_verdict, verdict


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def stage(path, metrics="", **files):
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text(metrics, encoding="utf-8")
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return path


def row(step, **values):
    return {"stage": "ppo", "step": step, "time": float(step), "attempt": 0, **values}


def test_the_last_attempt_of_a_step_is_read(tmp_path):
    metrics = lines(row(1, a=1.0), row(2, a=2.0), row(3, a=3.0)) + lines(
        row(2, attempt=1, a=20.0), row(3, attempt=1, b=30.0)
    )
    run = read_run(stage(tmp_path / "ppo", metrics))
    assert run.series == {"a": ([1, 2], [1, 20]), "b": ([3], [30])}
    assert [r["attempt"] for r in run.metrics] == [0, 1, 1]


def test_rows_of_one_attempt_and_step_are_joined(tmp_path):
    run = read_run(stage(tmp_path / "x", lines(row(1, a=1), row(1, b=2), row(1, a=3))))
    assert run.series == {"a": ([1], [3]), "b": ([1], [2])}


def test_samples_are_those_of_the_last_attempt_and_events_are_all(tmp_path):
    samples = lines(
        {"step": 1, "attempt": 0, "id": "old"},
        {"step": 2, "attempt": 0, "id": "kept"},
        {"step": 1, "attempt": 1, "id": "new"},
        {"step": 1, "attempt": 1, "id": "new too"},
    )
    events = lines({"event": "alarm", "attempt": 0}, {"event": "rollback", "attempt": 1})
    run = read_run(stage(tmp_path / "ppo", samples_jsonl=samples, events_jsonl=events))
    assert [sample["id"] for sample in run.samples] == ["kept", "new", "new too"]
    assert [event["event"] for event in run.events] == ["alarm", "rollback"]


@pytest.mark.parametrize("keep", range(1, 40, 3))
def test_a_metrics_file_cut_anywhere_in_its_last_line_loses_only_that_line(tmp_path, keep):
    whole = lines(row(1, note="é中")).encode()
    torn = '{"stage": "ppo", "step": 2, "note": "中文字"}'.encode()[:keep]
    path = stage(tmp_path / "ppo")
    (path / "metrics.jsonl").write_bytes(whole + torn)
    run = read_run(path)
    assert [r["step"] for r in run.metrics] == [1]
    assert run.notes == ("metrics.jsonl: the last line was cut off and is left out",)


def test_unreadable_lines_are_left_out_and_counted(tmp_path):
    metrics = lines(row(1, a=1)) + "\n{not json\n[1]\n" + "[" * 100_000 + "\n" + lines(row(2, a=2))
    run = read_run(stage(tmp_path / "ppo", metrics + lines({"a": 1}), env_json="[]"))
    assert run.series["a"] == ([1, 2], [1, 2])
    assert run.notes == (
        "metrics.jsonl: 3 unreadable lines left out, the first is 3",
        "metrics.jsonl: 1 rows without a step left out",
        "env.json: not a JSON object, left out",
    )


def test_an_invalid_byte_in_a_text_costs_no_row(tmp_path):
    path = stage(tmp_path / "ppo")
    (path / "samples.jsonl").write_bytes(b'{"step": 1, "response": "a\xffb"}\n')
    assert read_run(path).samples[0]["response"] == "a\ufffdb"


def test_a_line_separator_inside_a_text_does_not_end_a_line(tmp_path):
    sample = json.dumps({"step": 1, "response": "a\u2028b\x85c"}, ensure_ascii=False) + "\n"
    run = read_run(stage(tmp_path / "ppo", samples_jsonl=sample))
    assert run.samples[0]["response"] == "a\u2028b\x85c"


def test_only_numbers_are_metrics_and_other_stages_keep_their_name(tmp_path):
    metrics = lines(row(1, a=True, b="x", c=None, d=[1], e=2), row(1, stage="critic", e=5))
    run = read_run(stage(tmp_path / "ppo", metrics))
    assert run.series == {"critic: e": ([1], [5]), "e": ([1], [2])}


def test_stages_come_in_their_order_and_get_their_part_of_the_recipe(tmp_path):
    for name in ("ppo", "eval", "sft"):
        stage(tmp_path / name)
    stage(tmp_path / "sft", config_yaml="lr: 3\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"sft": {"lr": 1}, "ppo": {"lr": 2}}))
    runs = read_runs(tmp_path)
    assert [run.stage for run in runs] == ["sft", "ppo", "eval"]
    assert [run.config.get("lr") for run in runs[:2]] == [3, 2]


def test_a_stage_directory_of_any_name_is_known_by_its_rows(tmp_path):
    assert read_runs(stage(tmp_path / "mine", lines(row(1))))[0].stage == "ppo"
    critic = lines(row(1, stage="critic"), row(2, stage="critic"), row(1))
    assert read_runs(stage(tmp_path / "early", critic))[0].stage == "ppo"
    assert read_runs(stage(tmp_path / "other"))[0].stage == "other"
    assert read_runs(stage(tmp_path / "e", report_json='{"kind": "policy"}'))[0].stage == "eval"


def test_a_report_page_s_own_json_is_not_taken_for_an_evaluation(tmp_path):
    assert read_run(stage(tmp_path / "ppo", report_json='{"kind": "report"}')).report is None


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p.mkdir() or p, lambda p: p.touch() or p])
def test_no_run_is_one_line_that_says_what_would_do(tmp_path, make):
    with pytest.raises(ConfigError, match=r"give a run directory") as error:
        read_runs(make(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "run") in str(error.value)


def scorer(role, low, high):
    difference = (low + high) / 2
    return {"name": "s", "role": role, "difference": difference, "ci95": [low, high]}


@pytest.mark.parametrize(
    ("scorers", "headline", "tone"),
    [
        ([scorer("proxy", 0.1, 0.3)], "PPO scores higher than SFT on the reward model", "good"),
        ([scorer("proxy", -0.1, 0.3)], "No difference shown between PPO and SFT on", "unclear"),
        ([scorer("proxy", -0.3, -0.1)], "PPO scores lower than SFT on", "bad"),
        ([scorer("proxy", 1, 2), scorer("held-out", 1, 2)], "PPO is better than SFT", "good"),
        ([scorer("proxy", 1, 2), scorer("held-out", -2, -1)], "PPO is worse than SFT", "bad"),
        ([scorer("held-out", -1, 1)], "No difference shown between PPO and SFT, judged", "unclear"),
        (
            [{"role": "proxy", "difference": 1.0}],
            "No difference shown between PPO and SFT",
            "unclear",
        ),
        ([], "PPO against SFT: no score difference recorded", "unclear"),
    ],
)
def test_the_verdict_follows_the_held_out_scorer_and_its_interval(scorers, headline, tone):
    found = policy_verdict({"kind": "policy", "scorers": scorers})
    assert found["headline"].startswith(headline)
    assert found["tone"] == tone


def test_gains_on_the_proxy_alone_are_called_over_optimised():
    scorers = [scorer("proxy", 1, 2), scorer("held-out", -1, 1)]
    assert "over-optimised" in policy_verdict({"scorers": scorers})["warnings"][0]
    scorers = [scorer("proxy", 1, 2), scorer("held-out", 1, 2)]
    assert policy_verdict({"scorers": scorers})["warnings"] == []


def test_longer_cut_or_repetitive_replies_are_warned_of():
    before = {"length_mean": 100, "truncated_share": 0.0, "distinct_2": 0.9}
    after = {"length_mean": 150, "truncated_share": 0.1, "distinct_2": 0.72}
    found = policy_verdict({"policies": {"sft": before, "ppo": after}})["warnings"]
    assert [text.split(" from")[0] for text in found] == [
        "Replies grew",
        "Replies without an end rose",
        "Distinct bigrams fell",
    ]
    assert policy_verdict({"policies": {"sft": before, "ppo": before}})["warnings"] == []


def test_a_reward_model_no_better_than_length_is_not_called_good():
    good = {"accuracy": {"accuracy": 0.7, "ci95": [0.6, 0.8], "n": 90}}
    assert preference_verdict(good)["tone"] == "good"
    length = {"baselines": {"longer wins": {"accuracy": 0.72}}}
    assert preference_verdict(good | length)["tone"] == "unclear"
    bad = {"accuracy": {"accuracy": 0.3, "ci95": [0.2, 0.4], "n": 90}}
    assert preference_verdict(bad | length)["tone"] == "bad"


def test_alarms_are_part_of_the_verdict(tmp_path):
    events = lines({"event": "alarm"}, {"event": "alarm"}, {"event": "checkpoint"})
    run = read_run(stage(tmp_path / "ppo", events_jsonl=events))
    assert verdict([run])["warnings"] == ["Events to look at: 2 × alarm"]


def test_metric_rows_line_up_over_runs(tmp_path):
    one = read_run(stage(tmp_path / "a", lines(row(1, x=3), row(2, x=1), row(4, x=2))))
    other = read_run(stage(tmp_path / "b", lines(row(1, y=5))))
    x, y = metric_rows([("a", one), ("b", other)])
    assert (x["key"], x["cells"][1], y["key"], y["cells"][0]) == ("x", None, "y", None)
    assert x["cells"][0] == {
        "start": 3,
        "end": 2,
        "min": 1,
        "max": 3,
        "first_step": 1,
        "last_step": 4,
        "rows": 3,
    }


def test_declared_metrics_have_their_unit(tmp_path):
    metrics = lines(row(1, **{"kl/ref_k3": 0.1}), row(1, stage="critic", **{"value/loss": 1.0}))
    rows = metric_rows([("a", read_run(stage(tmp_path / "ppo", metrics)))])
    assert [r["key"] for r in rows] == ["critic: value/loss", "kl/ref_k3"]
    assert rows[1]["unit"] == "nats/token"
    assert rows[0]["unit"]


def test_differences_name_settings_that_are_not_the_same_everywhere():
    one = {"a": 1, "b": {"c": 2, "d": None}, "e": [1, 2], "f": {}}
    other = {"a": 1, "b": {"c": 3, "d": None}, "e": [1], "f": {}}
    assert differences([one, other]) == [
        {"key": "b.c", "values": ["2", "3"]},
        {"key": "e", "values": ["1, 2", "1"]},
    ]
    assert differences([one, {}])[0] == {"key": "a", "values": ["1", None]}
    assert flatten({"b": {"d": None}}) == {"b.d": "null"}


def test_an_event_of_the_critics_rollouts_is_told_and_drawn_as_the_critics(tmp_path, monkeypatch):
    metrics = [row(s, stage="critic", **{"value/loss": 1.0}) for s in (1, 2, 3)]
    metrics += [row(s, **{"value/loss": 1.0}) for s in (1, 2, 3)]
    alarm = {"kind": "alarm", "attempt": 0, "reason": "x"}
    events = lines({**alarm, "stage": "critic", "step": 2}, {**alarm, "stage": "ppo", "step": 3})
    run = read_run(stage(tmp_path / "ppo", lines(*metrics), events_jsonl=events))
    assert [event["stage"] for event in event_rows(run, 100)] == ["critic", "ppo"]
    drawn = {}
    monkeypatch.setattr(
        figures, "curves", lambda name, title, axes, marks: drawn.setdefault(title, marks)
    )
    figures.stage_figures("ppo", [("a run", run)])
    assert drawn == {"Losses": [3.0], "Critic pre-training": [2.0]}


def test_elapsed_time_is_of_rows_as_they_were_written_the_critics_first(tmp_path):
    critic = [row(s, stage="critic") for s in range(1, 11)]
    ppo = [row(s) | {"time": 10.0 + s} for s in range(1, 21)]
    run = read_run(stage(tmp_path / "ppo", lines(*critic, *ppo)))
    assert run.elapsed == 30
    assert timing(run)["elapsed_s"] == 30


def test_elapsed_time_adds_up_over_continued_runs():
    assert elapsed([2.0, 4.0, 7.0]) == 7
    assert elapsed([2.0, 4.0, 1.0, 3.0]) == 7  # begun anew after the second row
    assert elapsed([1.7e9, 1.7e9 + 60]) == 60
    assert elapsed([None, float("nan")]) is None
    assert elapsed([]) is None


def test_timing_sums_seconds_and_averages_throughput(tmp_path):
    values = [{"time/rollout": 2.0, "throughput/t": t, "memory/peak_gb": t} for t in (10.0, 30.0)]
    metrics = lines(*(row(step, **kv) for step, kv in enumerate(values, start=1)))
    found = timing(read_run(stage(tmp_path / "ppo", metrics)))
    assert (found["rows"], found["last_step"], found["attempts"]) == (2, 2, 1)
    assert found["time/rollout_s"] == 4
    assert found["throughput/t_mean"] == 20
    assert found["memory/peak_gb_max"] == 30
