"""Capability: the same choices as plain transformers, files read as they come, paired tests."""

import json
import math
import runpy
import sys
import types
from pathlib import Path

import pytest

from ppomax.config import parse
from ppomax.errors import ConfigError, DataError
from ppomax.eval import capability
from ppomax.eval.capability import CapabilityConfig, evaluate_capability, normalised
from ppomax.eval.harness import run_harness
from ppomax.eval.questions import context, load_questions, shots_for

_PLAIN = runpy.run_path(str(Path(__file__).with_name("plain_choices.py")))
plain_model, plain_right, plain_sums = (
    _PLAIN[name] for name in ("plain_model", "plain_right", "plain_sums")
)

ROWS = [
    {"id": "1", "question": "Which is a bird?", "choices": ["stone", "duck", "rain"], "answer": 1},
    {"id": "2", "question": "Tea is", "choices": ["a drink", "a mountain range"], "answer": "A"},
    {"id": "3", "question": "月亮是什么?", "choices": ["星球", "鱼", "面包", "歌"], "answer": 0},
    {"id": "4", "question": "Bread is made of", "choices": ["flour", "sand and a lot of it"]}
    | {"answer": 0, "subject": "food_x"},
    {"id": "5", "question": "Salt is", "choices": ["sweet", "salty"], "answer": 1}
    | {"subject": "food_x"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.slow
def test_choices_are_those_of_plain_transformers(tiny, tmp_path):
    path = write(tmp_path / "q.jsonl", ROWS)
    shots_path = write(tmp_path / "shots.jsonl", [r | {"subject": "food_x"} for r in ROWS[:2]])
    for shots, fewshot in ((0, []), (1, [shots_path])):
        config = CapabilityConfig(data=[path], fewshot=fewshot, shots=shots, micro_tokens=300)
        questions, examples = capability.load_all(config)
        before = [shots_for(question, examples, shots) for question in questions]
        found = capability.answer_all(tiny, questions, before, 300, "float32", False)
        expected = plain_right(tiny, questions, before)
        readings = ("letter", "text", "text_sum")
        assert [[found[r][i] for r in readings] for i in range(len(ROWS))] == expected


def test_log_likelihoods_are_those_of_plain_transformers(tiny, monkeypatch, tmp_path):
    seen = []
    call = capability.Likelihoods.__call__

    def spy(self, contexts, continuations, where, told=None):
        sums = call(self, contexts, continuations, where, told)
        seen.extend(zip(contexts, continuations, sums, strict=True))
        return sums

    monkeypatch.setattr(capability.Likelihoods, "__call__", spy)
    config = CapabilityConfig(data=[write(tmp_path / "q.jsonl", ROWS)])
    evaluate_capability({"tiny": tiny}, config, say=lambda _: None)
    model, tokenizer = plain_model(tiny)
    assert len(seen) == 2 * sum(len(row["choices"]) for row in ROWS)
    for before, after, found in seen:
        (expected,) = plain_sums(model, tokenizer, before, [after])
        assert found == pytest.approx(expected, abs=1e-4)


def test_accuracy_comes_by_group_with_a_paired_test(tmp_path, monkeypatch):
    rows = [
        {"id": str(i), "question": f"Q{i}", "choices": ["x", "y"], "answer": 0} for i in range(8)
    ]
    paths = [
        write(tmp_path / "one.jsonl", [row | {"subject": "s"} for row in rows]),
        write(tmp_path / "two.jsonl", rows[:4]),
    ]
    right = {"sft": [True] * 8 + [False] * 4, "ppo": [True] * 2 + [False] * 6 + [True] * 4}
    monkeypatch.setattr(capability, "answer_all", lambda name, *_, **__: {"letter": right[name]})
    record = evaluate_capability(
        {"SFT": "sft", "PPO": "ppo"}, CapabilityConfig(data=paths), say=lambda _: None
    )
    groups = {g["group"]: g["readings"]["letter"] for g in record["groups"]}
    assert list(groups) == ["all", "one", "one/s", "two"]
    assert groups["all"]["SFT"]["accuracy"] == pytest.approx(8 / 12)
    ppo = groups["all"]["PPO"]
    assert (ppo["gained"], ppo["lost"]) == (4, 6)
    assert ppo["mcnemar_p"] == pytest.approx(2 * sum(math.comb(10, k) for k in range(5)) / 2**10)
    assert groups["two"]["PPO"]["difference"] == 1.0
    assert groups["one/s"]["PPO"]["n"] == 8


def test_free_answers_count_by_exact_match(tiny, tmp_path, monkeypatch):
    rows = [
        {"id": "1", "question": "2+2?", "answer": "4"},
        {"id": "2", "question": "Who?", "answers": ["The Moon", "moon"]},
        {"id": "3", "question": "What?", "answer": "rain"},
    ]
    monkeypatch.setattr(capability, "_write", lambda *_: ["4.", "a  moon!", "it rains"])
    config = CapabilityConfig(data=[write(tmp_path / "free.jsonl", rows)])
    record = evaluate_capability({"tiny": tiny}, config, say=lambda _: None)
    readings = record["groups"][0]["readings"]
    assert list(readings) == ["match"]
    assert readings["match"]["tiny"]["accuracy"] == pytest.approx(2 / 3)
    assert normalised("“The”  Moon。") == "moon"


def test_shots_are_of_the_same_subject_and_never_the_question_itself(tmp_path):
    questions = load_questions(write(tmp_path / "q.jsonl", ROWS), "q")
    found = shots_for(questions[3], questions, 1)
    assert [shot.id for shot in found] == ["5"]
    text = context(questions[3], found, "letter")
    assert text.startswith(
        "The following are multiple choice questions (with answers) about food x"
    )
    assert "Salt is\nA. sweet\nB. salty\nAnswer: B\n\nBread is made of\nA. flour" in text
    assert text.endswith("\nAnswer:")
    with pytest.raises(DataError, match="3 examples are wanted, there are 1"):
        shots_for(questions[3], questions, 3)


def test_a_long_reading_says_how_far_it_is(tiny, tmp_path):
    said = []
    config = CapabilityConfig(data=[write(tmp_path / "q.jsonl", ROWS)], micro_tokens=64)
    evaluate_capability({"SFT": tiny}, config, say=said.append)
    assert said[0] == f"SFT: {len(ROWS)} questions"
    assert "SFT: read by the letter 100%" in said
    assert "SFT: read by the text 100%" in said
    assert len(said) <= 21


def test_a_model_that_has_answered_is_not_asked_again(tiny, tmp_path, monkeypatch):
    config = CapabilityConfig(data=[write(tmp_path / "q.jsonl", ROWS)])
    asked, plain = [], capability.answer_all

    def counted(name, *rest, **keywords):
        asked.append(name)
        return plain(name, *rest, **keywords)

    monkeypatch.setattr(capability, "answer_all", counted)
    options = {"say": lambda _: None, "keep": tmp_path / "answers"}
    first = evaluate_capability({"SFT": tiny}, config, **options)
    assert evaluate_capability({"SFT": tiny}, config, **options) == first
    assert asked == [tiny]
    evaluate_capability({"SFT": tiny}, config, dtype="bfloat16", **options)
    write(tmp_path / "q.jsonl", ROWS[:-1])
    evaluate_capability({"SFT": tiny}, config, **options)
    assert asked == [tiny] * 3, "another precision, other questions"


def test_a_line_that_is_not_json_says_so(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    with pytest.raises(DataError, match=r"q\.jsonl:2: not JSON"):
        load_questions(str(path), "q")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, "a place from 0 to 1"),
        ({"question": "x", "choices": ["a", "b"], "answer": "C"}, "or its letter"),
        ({"question": "x", "choices": ["a"], "answer": 0}, "2 to 10 are wanted"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "question: text is wanted"),
        ({"question": "x"}, "answer: text"),
        (["x"], "a row with question and answer"),
    ],
)
def test_a_row_that_is_no_question_is_named(tmp_path, row, message):
    path = write(tmp_path / "q.jsonl", [ROWS[0], row])
    with pytest.raises(DataError, match=rf"q.jsonl:2: .*{message}"):
        load_questions(path, "q")


def test_files_of_one_name_are_told_apart_by_their_folders():
    assert capability.file_names(["a/x.test.jsonl", "a/y.jsonl"]) == ["x", "y"]
    paths = ["d/mmlu/test.jsonl", "d/cmmlu/test.jsonl", "test.jsonl", "d/dev.jsonl"]
    assert capability.file_names(paths) == ["mmlu-test", "cmmlu-test", "test", "dev"]


def test_shots_and_examples_go_together(tmp_path):
    path = write(tmp_path / "q.jsonl", ROWS)
    with pytest.raises(ConfigError, match="go together"):
        capability.load_all(CapabilityConfig(data=[path], shots=2))
    with pytest.raises(ConfigError, match="data"):
        parse(CapabilityConfig, {"data": []})


def test_the_harness_runs_on_the_folder_or_names_its_pip_line(tiny, monkeypatch):
    options = {"shots": 5, "limit": 2, "dtype": "float32", "device": "cpu"}
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'ppomax\[eval\]'"):
        run_harness({"m": tiny}, ["mmlu"], **options)
    asked = {}

    def simple_evaluate(**settings):
        asked.update(settings)
        return {"results": {"mmlu": {"acc,none": 0.25, "alias": "mmlu", "x": [1]}}}

    module = types.ModuleType("lm_eval")
    module.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    found = run_harness({"m": tiny}, ["mmlu"], **options)
    assert found["results"] == {"m": {"mmlu": {"acc,none": 0.25, "alias": "mmlu"}}}
    assert asked["model_args"] == f"pretrained={tiny},dtype=float32"
    assert (asked["num_fewshot"], asked["limit"]) == (5, 2)
