import gzip
import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.data import raw as raw_module
from ppomax.data.formats import (
    _CONTENT,
    BadRow,
    detect_format,
    iter_raw,
    parse_preference,
    parse_prompt,
    parse_sft,
    parse_text,
    place,
)
from ppomax.errors import ConfigError, DataError

U, A, S = "user", "assistant", "system"
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def pairs_of(found):
    assert not isinstance(found, BadRow), found
    return [(list(row.prompt), row.chosen, row.rejected) for row in found]


def only(found):
    assert not isinstance(found, BadRow), found
    (row,) = found
    return row


# --- preference layouts

ONE = (turns((U, "q")), "good", "bad")
PAIRS = {
    "strings": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "pair", ONE),
    "prompt as messages": (
        {"prompt": turns((S, "s"), (U, "q")), "chosen": "good", "rejected": "bad"},
        "pair",
        (turns((S, "s"), (U, "q")), "good", "bad"),
    ),
    "answers as messages": (
        {"prompt": turns((U, "q")), "chosen": turns((A, "good")), "rejected": turns((A, "bad"))},
        "pair",
        ONE,
    ),
    "implicit prompt": (
        {"chosen": turns((U, "q"), (A, "good")), "rejected": turns((U, "q"), (A, "bad"))},
        "pair",
        ONE,
    ),
    "prompt text and whole dialogues": (
        {
            "prompt": "q",
            "chosen": turns((U, "q"), (A, "good")),
            "rejected": turns((U, "q"), (A, "bad")),
        },
        "pair",
        ONE,
    ),
    "a conversation that continues the prompt": (
        {
            "prompt": turns((U, "q")),
            "chosen": turns((A, "x"), (U, "y"), (A, "good")),
            "rejected": turns((A, "x"), (U, "y"), (A, "bad")),
        },
        "pair",
        (turns((U, "q"), (A, "x"), (U, "y")), "good", "bad"),
    ),
    "implicit prompt of plain strings": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        "pair",
        (turns((U, "The sky is")), " blue.", " black."),
    ),
    "implicit prompt of Chinese strings": (
        {"chosen": "天空是蓝色的", "rejected": "天空是绿色的"},
        "pair",
        (turns((U, "天空是")), "蓝色的", "绿色的"),
    ),
    "HH text": (
        {"chosen": HH + " so ", "rejected": HH + "  thus\n"},
        "hh",
        (turns((U, "hi"), (A, "hello"), (U, "why?")), "so", "thus"),
    ),
    "HH text in the prompt": (
        {"prompt": HH, "chosen": " so", "rejected": " thus"},
        "pair",
        (turns((U, "hi"), (A, "hello"), (U, "why?")), "so", "thus"),
    ),
    "PKU SafeRLHF": (
        {"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1},
        "two-responses",
        ONE,
    ),
    "LLaMA-Factory Alpaca ranking": (
        {"instruction": "a", "input": "b", "chosen": "good", "rejected": "bad"},
        "alpaca-pair",
        (turns((U, "a\nb")), "good", "bad"),
    ),
    "LLaMA-Factory ShareGPT ranking": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
            "system": "s",
        },
        "sharegpt-pair",
        (turns((S, "s"), (U, "q")), "good", "bad"),
    ),
}


@pytest.mark.parametrize(("raw", "layout", "expected"), PAIRS.values(), ids=PAIRS)
def test_every_preference_layout_is_found_and_read(raw, layout, expected):
    assert detect_format(raw) == layout
    assert pairs_of(parse_preference(raw, "f:1")) == [expected]


def test_a_ranked_list_becomes_all_its_pairs_and_weighs_as_one_row():
    raw = {"id": 7, "prompt": "q", "responses": ["b", "a", "c"], "ranks": [1, 0, 2]}
    found = parse_preference(raw, "f:1")
    assert {(row.chosen, row.rejected) for row in found} == {("a", "b"), ("a", "c"), ("b", "c")}
    assert sum(row.weight for row in found) == pytest.approx(1)
    assert len({row.id for row in found}) == 3
    assert all(row.id.startswith("7#") for row in found)


def test_scores_rank_from_the_highest_and_ties_make_no_pair():
    raw = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 2, 0.5]}
    found = parse_preference(raw, "f:1")
    assert {(row.chosen, row.rejected) for row in found} == {("b", "a"), ("b", "c")}
    assert [row.weight for row in found] == [0.5, 0.5]


def test_others_are_the_lower_ranks_in_order():
    raw = {"prompt": "q", "chosen": "a", "rejected": "b", "others": ["c", "d"]}
    found = parse_preference(raw, "f:1")
    assert {(row.chosen, row.rejected) for row in found} == set(combinations("abcd", 2))


def test_equal_answers_in_a_list_make_no_pair_and_leave_the_rest():
    raw = {"prompt": "q", "chosen": "a", "rejected": "b", "others": [" b"]}
    assert {(row.chosen, row.rejected) for row in parse_preference(raw, "f:1")} == {
        ("a", "b"),
        ("a", " b"),
    }


def test_the_safety_label_is_used_when_asked_for():
    raw = {
        "prompt": "q",
        "response_0": "x",
        "response_1": "y",
        "better_response_id": 1,
        "safer_response_id": 0,
    }
    assert only(parse_preference(raw, "f:1")).chosen == "y"
    assert only(parse_preference(raw, "f:1", "two-responses-safer")).chosen == "x"


@pytest.mark.parametrize("column", ["strength", "margin"])
def test_how_much_better_is_kept(column):
    raw = {"prompt": "q", "chosen": "a", "rejected": "b", column: 3}
    assert only(parse_preference(raw, "f:1")).strength == 3.0


def test_content_is_kept_as_it_is_but_for_hh_text():
    row = only(parse_preference({"prompt": " q\n", "chosen": " a ", "rejected": "b\n"}, "f:1"))
    assert (row.prompt[0]["content"], row.chosen, row.rejected) == (" q\n", " a ", "b\n")


def test_scalar_leftovers_become_meta_and_nested_ones_do_not():
    raw = {"prompt": "q", "completion": "a", "lang": "en", "n": 2, "x": [1], "y": {}, "z": None}
    assert only(parse_sft(raw, "f:1")).meta == {"lang": "en", "n": 2}


def test_the_id_is_the_rows_own_or_follows_from_its_content():
    raw = {"prompt": "q", "completion": "a"}
    assert only(parse_sft(raw | {"id": 12}, "f:1")).id == "12"
    first, again = only(parse_sft(raw, "f:1")), only(parse_sft(dict(reversed(raw.items())), "f:2"))
    other = only(parse_sft(raw | {"completion": "b"}, "f:1"))
    assert first.id == again.id != other.id


# --- SFT and prompts

QA = turns((U, "q"), (A, "a"))
SFT = {
    "messages": ({"messages": QA}, "messages", QA),
    "bare messages": (QA, "messages", QA),
    "completion": ({"prompt": "q", "completion": "a"}, "completion", QA),
    "completion with system": (
        {"prompt": "q", "completion": "a", "system": "s"},
        "completion",
        turns((S, "s"), *((m["role"], m["content"]) for m in QA)),
    ),
    "completion as messages": (
        {"prompt": turns((U, "q")), "completion": turns((A, "a"))},
        "completion",
        QA,
    ),
    "alpaca": (
        {
            "instruction": "do",
            "input": "this",
            "output": "a",
            "system": "s",
            "history": [["q", "x"]],
        },
        "alpaca",
        turns((S, "s"), (U, "q"), (A, "x"), (U, "do\nthis"), (A, "a")),
    ),
    "alpaca with nulls": (
        {"instruction": "q", "input": None, "output": "a", "history": None},
        "alpaca",
        QA,
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "Human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        "sharegpt",
        turns((S, "s"), (U, "q"), (A, "a")),
    ),
    "list of turns": (["q", "a"], "turn-list", QA),
    "turns column": ({"turns": ["q", "a"]}, "turns", QA),
    "preference row": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pair", QA),
    "ranked row": ({"prompt": "q", "responses": ["b", "a"], "scores": [1, 2]}, "ranked", QA),
}


@pytest.mark.parametrize(("raw", "layout", "expected"), SFT.values(), ids=SFT)
def test_every_sft_layout_is_found_and_read(raw, layout, expected):
    assert detect_format(raw) == layout
    assert list(only(parse_sft(raw, "f:1")).messages) == expected


@pytest.mark.parametrize(("raw", "_", "expected"), SFT.values(), ids=SFT)
def test_every_sft_row_is_a_prompt_without_its_last_answer(raw, _, expected):
    assert list(only(parse_prompt(raw, "f:1")).messages) == expected[:-1]


@pytest.mark.parametrize(("raw", "_", "expected"), PAIRS.values(), ids=PAIRS)
def test_every_preference_row_is_a_prompt(raw, _, expected):
    assert list(only(parse_prompt(raw, "f:1")).messages) == expected[0]


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "q"},
        {"prompt": turns((U, "q"))},
        {"messages": turns((U, "q"))},
        {"turns": ["q"]},
        ["q"],
        {"instruction": "q", "input": ""},
        {"prompt": "\n\nHuman: q\n\nAssistant:"},
    ],
)
def test_every_prompt_layout_is_read(raw):
    assert list(only(parse_prompt(raw, "f:1")).messages) == turns((U, "q"))


def test_text_rows_keep_their_text():
    assert only(parse_text({"text": " a\nb "}, "f:1")).text == " a\nb "
    assert only(parse_text("chunk", "f:1")).text == "chunk"


# --- defects


def pair(**columns):
    return {"prompt": "q", "chosen": "good", "rejected": "bad"} | columns


BAD_PAIRS = [
    (None, "unknown-format"),
    (3, "unknown-format"),
    ({}, "unknown-format"),
    ({"question": "q"}, "unknown-format"),
    ({"text": "t"}, "unknown-format"),
    ({"messages": QA}, "unknown-format"),
    ({"prompt": "q"}, "missing-field"),
    ({"prompt": "q", "chosen": "a"}, "missing-field"),
    (pair(rejected=None), "missing-field"),
    ({"prompt": "q", "response_0": "a"}, "missing-field"),
    ({"prompt": "q", "response_0": "a", "response_1": "b"}, "missing-field"),
    ({"prompt": "q", "responses": ["a", "b"]}, "missing-field"),
    ({"responses": ["a", "b"], "ranks": [0, 1]}, "missing-field"),
    (pair(chosen=[{"role": "assistant"}]), "missing-field"),
    (pair(chosen=[{"content": "a"}]), "missing-field"),
    (pair(chosen=3), "wrong-type"),
    (pair(prompt=3), "wrong-type"),
    (pair(prompt=[3]), "wrong-type"),
    (pair(prompt=[{"role": "user", "content": ["q"]}]), "wrong-type"),
    (pair(strength="much"), "wrong-type"),
    (pair(margin=-1), "wrong-type"),
    (pair(strength=float("nan")), "wrong-type"),
    (pair(strength=10**400), "wrong-type"),
    (pair(strength=True), "wrong-type"),
    (pair(others="c"), "wrong-type"),
    (pair(system=3), "wrong-type"),
    ({"prompt": "q", "responses": ["a", "b"], "ranks": [0]}, "wrong-type"),
    ({"prompt": "q", "responses": ["a", "b"], "ranks": [0, "1"]}, "wrong-type"),
    (
        {"prompt": "q", "responses": [str(i) for i in range(101)], "ranks": [*range(101)]},
        "wrong-type",
    ),
    (
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2},
        "wrong-type",
    ),
    (
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": True},
        "wrong-type",
    ),
    (pair(prompt=" \n"), "empty-prompt"),
    (pair(prompt=[]), "empty-prompt"),
    (pair(prompt=turns((S, "s"))), "empty-prompt"),
    (pair(prompt=turns((U, ""), (A, "x"), (U, "q"))), "empty-prompt"),
    ({"chosen": "no", "rejected": "yes"}, "empty-prompt"),
    ({"chosen": turns((A, "x")), "rejected": turns((A, "y"))}, "empty-prompt"),
    (pair(chosen=""), "empty-answer"),
    (pair(rejected=" \n"), "empty-answer"),
    (pair(chosen=[]), "empty-answer"),
    (pair(others=["c", ""]), "empty-answer"),
    (pair(prompt=turns((U, "q"), (A, " "), (U, "q"))), "empty-answer"),
    ({"prompt": "q", "responses": [], "ranks": []}, "empty-answer"),
    ({"chosen": HH, "rejected": HH + " so"}, "empty-answer"),
    (pair(chosen="bad\n"), "identical-pair"),
    (pair(rejected="good", others=["good "]), "identical-pair"),
    ({"chosen": HH + " so", "rejected": HH + "  so "}, "identical-pair"),
    ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]}, "no-order"),
    ({"prompt": "q", "responses": ["a"], "scores": [1]}, "no-order"),
    (
        {"chosen": turns((U, "q"), (A, "a")), "rejected": turns((U, "p"), (A, "b"))},
        "prompt-mismatch",
    ),
    (
        {
            "prompt": "elsewhere",
            "chosen": turns((U, "q"), (A, "a")),
            "rejected": turns((U, "q"), (A, "b")),
        },
        "prompt-mismatch",
    ),
    ({"chosen": HH + " so", "rejected": HH + " so\n\nAssistant: again"}, "prompt-mismatch"),
    (pair(prompt=turns((U, "q"), (U, "q"))), "not-alternating"),
    (pair(prompt=turns((A, "x"), (U, "q"))), "not-alternating"),
    (pair(prompt=turns((U, "q"), (S, "s"))), "not-alternating"),
    (pair(prompt=turns((S, "s"), (U, "q")), system="s"), "not-alternating"),
    (pair(prompt=turns(("tool", "q"))), "unknown-role"),
    (pair(prompt=turns((U, "q"), (A, "x"))), "last-turn"),
    (pair(chosen=turns((U, "q"))), "last-turn"),
    (pair(chosen="half \ud800"), "not-utf8"),
]


@pytest.mark.parametrize(("raw", "kind"), BAD_PAIRS)
def test_a_defective_preference_row_is_named(raw, kind):
    found = parse_preference(raw, "f:9")
    assert isinstance(found, BadRow), found
    assert (found.where, found.kind) == ("f:9", kind)
    assert found.reason
    assert "\n" not in found.reason


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ({"prompt": "q"}, "missing-field"),
        ({"instruction": "q"}, "missing-field"),
        ({"output": "a"}, "missing-field"),
        ({"completion": "a"}, "missing-field"),
        ({"text": "a"}, "unknown-format"),
        ({"messages": "q"}, "wrong-type"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "wrong-type"),
        ({"instruction": "q", "output": "a", "history": 3}, "wrong-type"),
        ({"messages": []}, "empty-prompt"),
        ([], "empty-prompt"),
        ({"instruction": "", "output": "a"}, "empty-prompt"),
        ({"instruction": "q", "output": " "}, "empty-answer"),
        ({"messages": turns((U, "q"), (A, ""), (U, "q"), (A, "a"))}, "empty-answer"),
        ({"messages": turns((U, "q"), (A, "a"), (A, "b"))}, "not-alternating"),
        ({"messages": turns((U, "q"), (S, "s"), (A, "b"))}, "not-alternating"),
        ({"messages": turns(("narrator", "q"))}, "unknown-role"),
        ({"messages": turns((U, "q"))}, "last-turn"),
        (["q", "a", "q"], "last-turn"),
        (["q", 1], "wrong-type"),
    ],
)
def test_a_defective_sft_row_is_named(raw, kind):
    found = parse_sft(raw, "f:9")
    assert isinstance(found, BadRow), found
    assert found.kind == kind


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ({"prompt": ""}, "empty-prompt"),
        ({"prompt": turns((U, "q"), (A, "a"))}, "last-turn"),
        ({"text": "t"}, "unknown-format"),
        ("t", "unknown-format"),
        ({"turns": []}, "empty-prompt"),
        ({"turns": [3]}, "wrong-type"),
    ],
)
def test_a_defective_prompt_row_is_named(raw, kind):
    found = parse_prompt(raw, "f:9")
    assert isinstance(found, BadRow), found
    assert found.kind == kind


@pytest.mark.parametrize(
    ("raw", "kind"),
    [({"text": " "}, "empty-text"), ({"text": 3}, "wrong-type"), ({}, "unknown-format")],
)
def test_a_defective_text_row_is_named(raw, kind):
    assert parse_text(raw, "f:9").kind == kind


def test_a_layout_that_is_asked_for_is_held_to():
    found = parse_sft({"prompt": "q", "completion": "a"}, "f:9", "messages")
    assert found.kind == "missing-field"
    found = parse_preference(["q", "a"], "f:9", "pair")
    assert found.kind == "missing-field"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "q", HH, "user", "gpt", "\ud800"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner)
    ),
    max_leaves=8,
)
COLUMNS = sorted(_CONTENT | {"lang", "safer_response_id"})


@pytest.mark.slow
@settings(max_examples=200)
@given(VALUES | st.dictionaries(st.sampled_from(COLUMNS) | st.text(), VALUES, max_size=8))
def test_no_json_value_makes_a_parser_raise(raw):
    for parse in (parse_preference, parse_sft, parse_prompt, parse_text):
        found = parse(raw, "f:1")
        if isinstance(found, BadRow):
            assert found.kind
            assert found.reason
            assert "\n" not in found.reason
        else:
            assert found


CONTENT = st.text(min_size=1).filter(lambda text: text.strip() and text.isprintable())


@pytest.mark.slow
@settings(max_examples=100)
@given(st.lists(CONTENT, min_size=2, max_size=6))
def test_a_dialogue_reads_the_same_in_every_layout(texts):
    texts = texts[: len(texts) // 2 * 2]
    messages = [
        {"role": A if index % 2 else U, "content": text} for index, text in enumerate(texts)
    ]
    sharegpt = [
        {"from": "gpt" if m["role"] == A else "human", "value": m["content"]} for m in messages
    ]
    history = [texts[i : i + 2] for i in range(0, len(texts) - 2, 2)]
    alpaca = {"instruction": texts[-2], "output": texts[-1], "history": history}
    for raw in ({"messages": messages}, {"conversations": sharegpt}, texts, alpaca):
        assert list(only(parse_sft(raw, "f:1")).messages) == messages


# --- files

ROWS = [{"prompt": "q", "n": 1}, {"prompt": "天", "n": 2}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", LINES.rstrip("\n")),
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n")),
        ("a.JSONL.GZ".lower(), LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json.gz", json.dumps(ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", LINES),
    ],
)
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path, name, text):
    assert list(iter_raw(write(tmp_path / name, text))) == list(enumerate(ROWS, start=1))


def test_parquet_rows_come_out_the_same_and_nulls_count_as_absent(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [{"messages": QA, "text": None}, {"messages": None, "text": "t"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = [raw for _, raw in iter_raw(path)]
    assert found == rows
    assert list(only(parse_sft(found[0], place(path, 1))).messages) == QA
    assert only(parse_text(found[1], place(path, 2))).where == f"{path}:row 2"
    path.write_bytes(b"PAR1 broken")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(iter_raw(path))


def test_parquet_without_pyarrow_names_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = write(tmp_path / "a.parquet", "x")
    with pytest.raises(ConfigError, match=r'pip install "ppomax\[parquet\]"'):
        list(iter_raw(path))


def test_one_object_in_a_json_file_is_one_row(tmp_path):
    for row in ({"messages": QA}, {"prompt": "q", "responses": ["a"], "ranks": [0]}):
        assert list(iter_raw(write(tmp_path / "a.json", json.dumps(row)))) == [(1, row)]


def test_a_line_that_cannot_be_read_is_a_bad_row_with_its_number(tmp_path):
    lines = b'{"a": 1}\n\n{"a": \n{"a": "\xff"}\n' + b"[" * 100_000 + b"\n3\n"
    path = write(tmp_path / "a.jsonl", lines)
    found = dict(iter_raw(path))
    assert list(found) == [1, 3, 4, 5, 6]
    kinds = {number: row.kind for number, row in found.items() if isinstance(row, BadRow)}
    assert kinds == {3: "not-json", 4: "not-utf8", 5: "not-json"}
    assert found[3].where == f"{path}:3"
    assert found[6] == 3


def test_a_broken_json_file_is_one_bad_row(tmp_path):
    ((number, row),) = iter_raw(write(tmp_path / "a.json", '[{"a": 1},'))
    assert (number, row.kind) == (1, "not-json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz"])
def test_an_empty_file_is_an_error(tmp_path, name):
    for text in ("", "\n \n"):
        with pytest.raises(DataError, match="holds no rows"):
            list(iter_raw(write(tmp_path / name, text)))


def test_what_is_no_readable_file_is_an_error_of_one_line(tmp_path):
    truncated = gzip.compress(LINES.encode() * 99)[:-20]
    (tmp_path / "cut.jsonl.gz").write_bytes(truncated)
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "a.csv").write_text("a,b")
    for name, message in (
        ("none.jsonl", "no such file"),
        ("", "is a folder"),
        ("cut.jsonl.gz", "damaged gzip"),
        ("not.jsonl.gz", "damaged gzip"),
        ("a.csv", "unknown kind of file"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            list(iter_raw(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "sources": [{"url": "u"}]},
        {"instruction": "q", "output": "a", "tags": [{"a": 1}]},
    ],
)
def test_a_json_file_of_one_row_is_that_row_whatever_lists_are_in_it(tmp_path, row):
    path = write(tmp_path / "a.json", json.dumps(row).encode())
    assert [value for _, value in iter_raw(path)] == [row]
    many = write(tmp_path / "b.json", json.dumps({"version": "1", "rows": [row, row]}).encode())
    assert [value for _, value in iter_raw(many)] == [row, row]


def test_a_question_beside_two_plain_answers_is_their_prompt():
    for name in ("question", "query"):
        row = {"system": "s", name: "What is 2+2?", "chosen": "It is 4", "rejected": "It is 5"}
        wanted = (turns((S, "s"), (U, "What is 2+2?")), "It is 4", "It is 5")
        assert pairs_of(parse_preference(row, "f:1")) == [wanted]
        assert only(parse_sft(row, "f:1")).messages[-1]["content"] == "It is 4"


def test_hh_text_with_the_line_ends_of_windows_is_hh_text():
    row = {name: (HH + " " + name).replace("\n", "\r\n") for name in ("chosen", "rejected")}
    assert detect_format(row) == "hh"
    plain = {name: HH + " " + name for name in row}
    assert pairs_of(parse_preference(row, "f:1")) == pairs_of(parse_preference(plain, "f:1"))


def test_a_path_is_not_taken_for_a_hub_id():
    for path in ("data/none.jsonl", "./none/here", "a/b/c", "none", "data/none.csv"):
        with pytest.raises(DataError, match="no such file"):
            list(iter_raw(path))


@pytest.mark.slow
def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.gz", b"\n" * (8 * 2**20))
    monkeypatch.setattr(raw_module, "BOMB_BYTES", 2**22)
    monkeypatch.setattr(raw_module, "BOMB_RATIO", 100)
    with pytest.raises(DataError, match="100-fold"):
        list(iter_raw(path))
    monkeypatch.setattr(raw_module, "MAX_BYTES", 2**21)
    with pytest.raises(DataError, match="GiB decompressed"):
        list(iter_raw(path))
    monkeypatch.setattr(raw_module, "MAX_LINE_BYTES", 2**20)
    with pytest.raises(DataError, match=r"a\.jsonl:1: line of more than 1 MiB"):
        list(iter_raw(write(tmp_path / "a.jsonl", b" " * 2**22)))
    monkeypatch.setattr(raw_module, "MAX_JSON_BYTES", 2**20)
    with pytest.raises(DataError, match=r"write it as \.jsonl"):
        list(iter_raw(write(tmp_path / "a.json", b" " * 2**22)))


def test_a_hub_id_needs_its_extra_and_is_read_with_it(monkeypatch):
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "ppomax\[hub\]"'):
        list(iter_raw("org/name"))
    fake = type(pytest)("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "org/none":
            raise FileNotFoundError("no data set\nof that name")
        return ROWS

    fake.load_dataset = load_dataset
    monkeypatch.setitem(modules, "datasets", fake)
    for path in ("org/name", "hub:org/name:test[:10%]", "org/name:test"):
        assert list(iter_raw(path)) == list(enumerate(ROWS, start=1))
    assert asked == [("org/name", "train"), ("org/name", "test[:10%]"), ("org/name", "test")]
    assert place("org/name:test", 3) == "org/name:test:row 3"
    with pytest.raises(DataError, match="no data set"):
        list(iter_raw("org/none"))


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["", " ", "word " * 150, "天" * 1200, "x" * 9000]), max_size=20))
def test_the_pieces_of_a_text_are_the_text_and_none_is_too_long(tmp_path_factory, lines):
    text = "".join(line + "\n" for line in lines)
    path = write(tmp_path_factory.mktemp("text") / "a.txt", text)
    if not text.strip():
        return
    pieces = [(number, piece) for number, piece in iter_raw(path)]
    assert all(0 < len(piece) <= 4000 for _, piece in pieces)
    assert "".join("".join(p for _, p in pieces).split()) == "".join(text.split())
    for number, piece in pieces:
        start = piece.split("\n")[0][:20]
        assert start in text.split("\n")[number - 1]


def test_a_text_is_cut_at_blank_lines(tmp_path):
    paragraph = "a" * 1500 + "\n"
    path = write(tmp_path / "a.txt", (paragraph + "\n") * 5)
    assert [number for number, _ in iter_raw(path)] == [1, 5, 9]


# --- the development data


def rows_of(path, parse, layout=None):
    return [
        parse(raw, place(path, number), layout)
        for number, raw in iter_raw(path)
        if not isinstance(raw, BadRow)
    ]


PREFERENCES = {
    "hh_helpful": 1610,
    "hh_harmless": 1716,
    "oasst_zh": 585,
    "dpo_en": 300,
    "dpo_zh": 300,
}
DIALOGUES = {
    "lima": 1027,
    "seed_en": 175,
    "seed_zh": 174,
    "oasst_zh": 530,
    "alpaca_en": 996,
    "alpaca_zh": 1000,
    "safety_sft": 1871,
}
PROMPTS = {
    "lottery_en": 262,
    "moss_zh": 62,
    "dangerousqa": 197,
    "catqa_en": 550,
    "catqa_zh": 550,
    "i_malicious": 100,
    "q_harm": 97,
    "i_controversial": 40,
}


@pytest.mark.parametrize(
    ("folder", "name", "count", "parse"),
    [
        *(("pref", name, count, parse_preference) for name, count in PREFERENCES.items()),
        *(("pref", name, count, parse_prompt) for name, count in PREFERENCES.items()),
        *(("sft", name, count, parse_sft) for name, count in DIALOGUES.items()),
        *(("sft", name, count, parse_prompt) for name, count in DIALOGUES.items()),
        *(("prompts", name, count, parse_prompt) for name, count in PROMPTS.items()),
        ("ptx", "en_c4_demo", 300, parse_text),
    ],
)
def test_every_row_of_the_real_files_is_usable(shared_data, folder, name, count, parse):
    found = rows_of(shared_data / folder / f"{name}.jsonl", parse)
    assert len(found) == count
    assert [row for row in found if isinstance(row, BadRow)] == []


def test_real_ranked_lists_become_all_pairs_of_different_answers(shared_data):
    path = shared_data / "pref" / "oasst_zh.jsonl"
    raws = [raw for _, raw in iter_raw(path)]
    expected = 0
    for raw in raws:
        answers = [raw["chosen"], raw["rejected"], *raw["others"]]
        expected += sum(a.strip() != b.strip() for a, b in combinations(answers, 2))
    found = rows_of(path, parse_preference)
    assert sum(len(pairs) for pairs in found) == expected > 1300
    assert all(sum(row.weight for row in pairs) == pytest.approx(1) for pairs in found)


def test_hh_text_reads_as_the_same_rows_do_in_messages(shared_data):
    for name in ("helpful", "harmless"):
        known = {
            (row["chosen"], row["rejected"]): row["prompt"]
            for _, row in iter_raw(shared_data / "pref" / f"hh_{name}.jsonl")
        }
        path = shared_data / "raw" / f"hh_{name}_text_sample.jsonl"
        assert {detect_format(raw) for _, raw in iter_raw(path)} == {"hh"}
        found = rows_of(path, parse_preference)
        assert len(found) == 200
        for row in map(only, found):
            assert known[row.chosen, row.rejected] == list(row.prompt)


def test_the_edge_cases_of_hh_are_refused_each_for_its_reason(shared_data):
    found = rows_of(shared_data / "raw" / "hh_edge_cases.jsonl", parse_preference)
    kinds = {number: row.kind for number, row in enumerate(found, start=1)}
    assert kinds == {
        **dict.fromkeys([1, 8, 10, 11, 14], "empty-answer"),
        **dict.fromkeys([3, 4, 5, 7, 16, 18, 19, 20], "prompt-mismatch"),
        **dict.fromkeys([2, 6, 9, 12, 13, 15, 17], "not-alternating"),
    }


@pytest.mark.parametrize(
    ("name", "layout", "parse", "count"),
    [
        ("pku_saferlhf_sample.json", "two-responses", parse_preference, 31),
        ("llamafactory_sharegpt_dpo_50.json", "sharegpt-pair", parse_preference, 50),
        ("llamafactory_alpaca_50.json", "alpaca", parse_sft, 50),
        ("moss_rlhf_ppo_train.json", "turn-list", parse_prompt, 31),
        ("moss_rlhf_ppo_valid.json", "turn-list", parse_prompt, 31),
    ],
)
def test_the_original_formats_are_found_and_read(shared_data, name, layout, parse, count):
    path = shared_data / "raw" / name
    assert {detect_format(raw) for _, raw in iter_raw(path)} == {layout}
    found = rows_of(path, parse)
    assert len(found) == count
    assert not any(isinstance(row, BadRow) for row in found)


def test_the_original_sharegpt_rows_are_those_of_the_converted_file(shared_data):
    known = {
        (row["chosen"], row["rejected"]): row["prompt"]
        for _, row in iter_raw(shared_data / "pref" / "dpo_zh.jsonl")
    }
    found = rows_of(shared_data / "raw" / "llamafactory_sharegpt_dpo_50.json", parse_preference)
    same = [known.get((row.chosen, row.rejected)) == list(row.prompt) for row in map(only, found)]
    assert all(same)


def test_the_safer_answer_differs_from_the_better_one_in_real_rows(shared_data):
    path = shared_data / "raw" / "pku_saferlhf_sample.json"
    better = rows_of(path, parse_preference)
    safer = rows_of(path, parse_preference, "two-responses-safer")
    assert any(only(a).chosen != only(b).chosen for a, b in zip(better, safer, strict=True))


def test_real_texts_lose_nothing_but_outer_blanks(shared_data):
    for path in sorted((shared_data / "ptx").glob("*.txt")):
        pieces = [piece for _, piece in iter_raw(path)]
        assert all(isinstance(piece, str) and len(piece) <= 4000 for piece in pieces)
        assert "".join("".join(pieces).split()) == "".join(path.read_text("utf-8").split())
