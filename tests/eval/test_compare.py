"""`ppomax eval policy` from files to report, and judges and questions in a run."""

import json

import pytest

from ppomax.cli import app
from ppomax.config import parse
from ppomax.errors import ConfigError, DataError
from ppomax.eval.compare import compare_policies, raters_of
from ppomax.eval.judges import JudgeConfig, Verdicts
from ppomax.eval.pairs import read_pairs
from ppomax.eval.policy import evaluate_policy
from ppomax.eval.policy_config import EvalConfig
from ppomax.eval.replies import hidden_system_turns, names_of
from ppomax.report.page import write_report
from ppomax.rollout import SamplingParams
from ppomax.types import PromptRow

JUDGE = '''
def judge(messages, first, second, *, question, lang):
    """Prefers the reply with `good` in it."""
    if ("good" in first) == ("good" in second):
        return "tie"
    return 1 if "good" in first else 2
'''


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Prompts (one of them twice), replies of two models, a judge module."""
    kinds = ("helpful", "harmful")
    rows = [
        {"id": f"p{i}", "prompt": f"What of {i}?", "kind": kinds[i % 2], "lang": "en"}
        for i in range(6)
    ]
    repeat = rows[0] | {"id": "again"}
    replies = {
        "sft": [{"id": r["id"], "prompt": r["prompt"], "response": "bad <b>reply"} for r in rows],
        "ppo": [{"id": r["id"], "response": f"good {i}" * (i > 1)} for i, r in enumerate(rows)],
    }
    for name, found in {"prompts": [*rows, repeat], **replies}.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "judge_of_compare.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compared(files, judges=("callable:judge_of_compare:judge",), **changes):
    said = []
    options = {
        "sampling": SamplingParams(max_new_tokens=4),
        "seed": 0,
        "dtype": "float32",
        "limit": None,
        "rubrics": None,
        "dry_run": False,
        "say": said.append,
    }
    record = compare_policies(
        changes.pop("models", ["sft.jsonl", "ppo.jsonl"]),
        ["prompts.jsonl"],
        [parse(JudgeConfig, {"spec": spec}) for spec in judges],
        files / "out",
        **(options | changes),
    )
    return record, said


def test_files_of_replies_are_compared_prompt_by_prompt_each_once(files):
    record, _ = compared(files)
    (found,) = record["comparisons"]
    assert (record["num_prompts"], record["repeated_prompts"]) == (6, 1)
    assert (found["candidate"], found["baseline"], found["n"]) == ("ppo.jsonl", "sft.jsonl", 6)
    assert [found[side]["count"] for side in ("win", "tie", "lose")] == [4, 2, 0]
    assert found["win_rate"] == pytest.approx(5 / 6)
    assert [(q["question"], q["n"]) for q in found["questions"]] == [
        ("harmless", 3),
        ("helpful", 3),
    ]
    assert [g["group"] for g in found["by"]] == ["harmful/en", "helpful/en"]
    assert record["replies"][1]["notes"] == {"empty": 2}
    lines = (files / "out" / "judged.jsonl").read_text().splitlines()
    assert [json.loads(line)["verdict"] for line in lines] == ["tie", "tie", "b", "b", "b", "b"]


@pytest.mark.slow
def test_the_command_line_writes_a_report_that_shows_texts_as_texts(files, capsys):
    command = ["eval", "policy", "sft.jsonl", "ppo.jsonl", "--prompts", "prompts.jsonl"]
    judge = ["--judge", "callable:judge_of_compare:judge"]
    app([*command, *judge, "--out", "out"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "win / tie / lose  67% / 33% / 0%  of 6 pairs" in said
    page = (files / "out" / "report.html").read_text()
    assert page.index("ppo.jsonl is better than sft.jsonl") < page.index("<table>")
    assert "points or more could have been seen" in page
    assert "bad &lt;b&gt;reply" in page
    assert "bad <b>" not in page
    assert json.loads((files / "out" / "report.json").read_text())["kind"] == "policy"
    app([*command, *judge, "--out", "out", "--dry-run"], standalone_mode=False)
    assert "0 calls (12 of 12 answered before)" in capsys.readouterr().err


def test_candidates_of_equal_replies_are_counted_once_in_a_dry_run(files):
    (files / "again.jsonl").write_text((files / "ppo.jsonl").read_text())
    models = ["sft.jsonl", "ppo.jsonl", "again.jsonl"]
    _, said = compared(files, models=models, dry_run=True)
    assert said == ["callable:judge_of_compare:judge: 12 calls (0 of 12 answered before)"]


def test_annotators_of_one_name_in_two_files_stay_two():
    columns = {
        "one": Verdicts([], {"ann": {"p helpful": "a"}, "bea": {"p helpful": "a"}}, {}),
        "two": Verdicts([], {"ann": {"p helpful": "b"}}, {}),
    }
    assert list(raters_of(columns)) == ["one: ann", "bea", "two: ann"]


@pytest.mark.slow
def test_pairs_for_people_go_out_and_their_verdicts_come_back(files):
    record, said = compared(files, ["human"])
    assert record["comparisons"] == []
    assert any("ppomax annotate" in line for line in said)
    pairs = read_pairs(files / "out" / "pairs.jsonl")
    assert len(pairs) == 6
    votes = [
        {"pair": p.pair, "prompt_id": p.prompt_id, "a": p.a.name, "b": p.b.name}
        | {"annotator": who, "question": "helpful", "verdict": side, "time": "t", "seconds": 1}
        for p in pairs[:4]
        for who, side in (("ann", "b"), ("bea", "b" if p.prompt_id != "p3" else "a"))
    ]
    (files / "votes.jsonl").write_text("".join(json.dumps(v) + "\n" for v in votes))
    judges = ["file:votes.jsonl", "callable:judge_of_compare:judge"]
    record, _ = compared(files, judges)
    people = record["comparisons"][0]
    assert [people[side]["count"] for side in ("win", "tie", "lose")] == [3, 1, 0]
    assert people["notes"] == {"pairs without a vote": 2}
    raters = {tuple(row["raters"]): row for row in record["agreement"]["pairs"]}
    assert raters["ann", "bea"]["raw"] == 0.75
    # The judge asks each prompt's own question, people were asked the helpful one throughout.
    assert raters["ann", "callable:judge_of_compare:judge"]["n"] == 2


@pytest.mark.slow
def test_a_model_answers_once_and_a_dry_run_calls_nobody(files, tiny):
    _, said = compared(files, models=["sft.jsonl", tiny], dry_run=True)
    assert said == ["callable:judge_of_compare:judge: at most 12 calls (0 of 12 answered before)"]
    assert not (files / "out").exists()
    record, said = compared(files, models=["sft.jsonl", tiny], limit=3)
    assert any("answering 3 prompts" in line for line in said)
    reply = record["replies"][1]
    assert reply["sampling"]["max_new_tokens"] == 4
    _, said = compared(files, models=["sft.jsonl", tiny], limit=3)
    assert any("used again" in line for line in said)
    _, said = compared(files, models=["sft.jsonl", tiny], limit=2)
    assert any("answering 2 prompts" in line for line in said)


def change(path, edit):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in edit(rows)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows[1:], "no reply to 1 of 6 prompts, the first is p0"),
        (lambda rows: [*rows, rows[2]], "sft.jsonl:7: id p2 has a reply already"),
        (
            lambda rows: [rows[0] | {"prompt": "Other?"}, *rows[1:]],
            ":1: its prompt is not",
        ),
        (lambda rows: [{"id": "p0"}, *rows[1:]], ":1: a row with id and response"),
    ],
)
def test_replies_that_do_not_fit_the_prompts_are_refused(files, edit, message):
    change(files / "sft.jsonl", edit)
    with pytest.raises(DataError, match=message):
        compared(files)


def test_one_id_for_two_prompts_is_refused(files):
    change(files / "prompts.jsonl", lambda rows: [*rows, rows[1] | {"prompt": "Another?"}])
    with pytest.raises(DataError, match="id p1 is also that of another prompt"):
        compared(files)


def test_a_system_turn_that_the_template_hides_is_counted(tiny, tmp_path, monkeypatch):
    from ppomax.eval import replies

    rows = [
        PromptRow("1", ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})),
        PromptRow("2", ({"role": "user", "content": "u"},)),
    ]
    assert hidden_system_turns(tiny, rows) == 0
    plain = replies.load_tokenizer

    def hiding(name):
        tokenizer = plain(name)
        head = "{% set messages = messages | rejectattr('role', 'eq', 'system') | list %}"
        tokenizer.chat_template = head + tokenizer.chat_template
        return tokenizer

    monkeypatch.setattr(replies, "load_tokenizer", hiding)
    assert hidden_system_turns(tiny, rows) == 1


def test_names_are_the_shortest_that_tell_apart():
    assert names_of(["run/sft/export", "run/ppo/export"]) == ["sft/export", "ppo/export"]
    assert names_of(["a.jsonl", "x/b.jsonl"]) == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ConfigError, match="given twice"):
        names_of(["a", "a"])


@pytest.mark.slow
def test_a_reward_model_judges_texts_as_the_stage_scores_them(small, small_reward, files, tiny):
    judge = [f"reward:{small_reward}"]
    record, _ = compared(files, judge)
    (found,) = record["comparisons"]
    assert found["position"] is None
    assert found["unparsed"] == 0
    turned, _ = compared(files, judge, models=["ppo.jsonl", "sft.jsonl"])
    assert turned["comparisons"][0]["win"] == found["lose"]


def test_a_small_local_model_is_asked_and_its_nonsense_counted(files, tiny):
    """The tiny model's 512 positions do not hold a rubric: every answer is empty, none is lost."""
    record, _ = compared(files, [f"local:{tiny}"], limit=2)
    (found,) = record["comparisons"]
    assert (found["tie"]["count"], found["unparsed"], found["readings"]) == (2, 4, 4)


@pytest.mark.slow
def test_a_run_ends_with_the_judges_verdict_and_the_questions(small, files, tmp_path):
    questions = [
        {"id": str(i), "question": f"Q{i}?", "choices": ["x", "y"], "answer": i % 2}
        for i in range(4)
    ]
    (files / "mc.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    out = evaluate_policy(
        small(
            "eval",
            tmp_path / "run" / "eval",
            {
                "judges": ["callable:judge_of_compare:judge"],
                "capability": {"data": ["mc.jsonl"]},
                "capability_models": {"ptx": "tiny"},
            },
        )
    )
    report = json.loads((out / "report.json").read_text())
    (found,) = report["comparisons"]
    assert (found["candidate"], found["baseline"], found["n"]) == ("ppo", "sft", 8)
    assert found["tie"]["count"] == 8  # equal models, equal replies: nobody was asked
    assert report["capability"]["models"] == ["sft", "ppo", "ptx"]
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert page.index("PPO is not shown to differ from SFT") < page.index("<table>")
    assert "Accuracy, letter of the choice" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rubrics": "x"}, "no judge reads them"),
        ({"capability_models": {"ptx": "tiny"}}, "no effect without capability"),
        ({"judges": ["human", "human"]}, "given twice"),
    ],
)
def test_settings_of_a_run_without_effect_are_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse(EvalConfig, settings)


def test_a_mean_log_ratio_of_cut_samples_is_not_called_a_kl(small, tmp_path):
    out = evaluate_policy(small("eval", tmp_path / "e", {"sampling": {"top_p": 0.9}}))
    report = json.loads((out / "report.json").read_text())
    assert report["log_ratio_k1"] == 0
    assert "kl_ref_k1" not in report
