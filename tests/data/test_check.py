import json

import pytest

from ppomax.data.check import check_files, longer_wins, render
from ppomax.errors import DataError
from ppomax.types import PreferenceRow


def pair(index, **columns):
    return {"prompt": f"q{index}", "chosen": "better", "rejected": "bad"} | columns


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def test_a_clean_file_is_described_and_nothing_refused(write):
    path = write("a.jsonl", [pair(0, lang="en"), pair(1, lang="zh"), pair(2, lang="zh")])
    report = check_files([path])
    (file,) = report.files
    assert (file.kind, file.rows, file.usable, file.pairs) == ("preference", 3, 3, 3)
    assert file.formats == {"pair": 3}
    assert file.values == {"lang": {"en": 1, "zh": 2}}
    assert file.longer_wins == 1
    assert report.refused == 0
    text = "\n".join(render(report))
    assert "3 rows, read as preference data (pair 3); 3 usable, 0 refused" in text
    assert "100.0%" in text
    assert "lang: zh 2, en 1" in text


def test_defects_are_listed_by_kind_with_their_lines(write):
    rows = [pair(0), pair(1, chosen=""), "{oops", pair(0), pair(2, chosen=" "), {"x": 1}]
    path = write("a.jsonl", rows)
    report = check_files([path])
    (file,) = report.files
    assert report.refused == 4
    assert file.usable == 2
    assert [(number, bad.kind) for number, bad in file.refused] == [
        (2, "empty-answer"),
        (3, "not-json"),
        (5, "empty-answer"),
        (6, "unknown-format"),
    ]
    assert [(number, bad.kind) for number, bad in file.duplicates] == [(4, "duplicate")]
    lines = render(report)
    assert "  refused, empty-answer: 2 (line 2, 5)" in lines
    assert "  refused, not-json: 1 (line 3)" in lines
    assert "  duplicate, kept: 1 (line 4)" in lines
    assert f"    {path}:2: chosen is empty" in lines
    assert file.formats == {"pair": 4, "unreadable": 1, "unknown": 1}


def test_rows_of_a_json_file_are_counted_as_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([pair(0), pair(1, rejected="")]))
    assert "  refused, empty-answer: 1 (row 2)" in render(check_files([path]))


def test_a_file_is_checked_as_what_most_of_its_rows_are(write):
    answered = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "a"}]}
        for i in range(30)
    ]
    waiting = {"messages": [{"role": "user", "content": "q"}]}
    for name, rows, kind, refused in (
        ("sft.jsonl", answered, "SFT", 0),
        ("slip.jsonl", [*answered, waiting], "SFT", 1),
        ("prompts.jsonl", [*answered, *[waiting] * 5], "prompt", 0),
        ("turns.jsonl", [{"turns": ["q"]}], "prompt", 0),
        ("asked.jsonl", [{"prompt": "q"}], "prompt", 0),
        ("text.jsonl", [{"text": "t"}], "text", 0),
        ("text.txt", ["plain"], "text", 0),
        ("noise.jsonl", ["{"], "preference", 1),
    ):
        report = check_files([write(name, rows)])
        assert (report.files[0].kind, report.refused) == (kind, refused), name
    assert check_files([write("a.jsonl", [waiting])], kind="SFT").refused == 1


def test_several_files_are_summed_up(write):
    paths = [write("a.jsonl", [pair(0)]), write("b.jsonl", [pair(0), pair(1, chosen="")])]
    assert render(check_files(paths))[-1] == "2 files, 3 rows, 1 refused"


def test_a_missing_or_empty_file_is_an_error(write, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        check_files([tmp_path / "none.jsonl"])
    with pytest.raises(DataError, match="holds no rows"):
        check_files([write("a.jsonl", [])])


def test_equal_lengths_do_not_count_as_longer_or_shorter():
    def row(chosen, rejected):
        return PreferenceRow("x", (), chosen, rejected)

    assert longer_wins([row("ab", "c"), row("a", "b"), row("a", "bc"), row("abc", "d")]) == 2 / 3
    assert longer_wins([row("a", "b")]) is None


def test_a_file_whose_labels_are_lengths_is_said_to_be(write):
    rows = [pair(i, chosen="a longer answer", rejected="no") for i in range(60)]
    assert any("one-sided" in line for line in render(check_files([write("a.jsonl", rows)])))
    rows[:2] = [pair(0, chosen="no", rejected="a longer answer")] * 2
    assert not any("one-sided" in line for line in render(check_files([write("b.jsonl", rows)])))


@pytest.mark.slow
def test_every_real_file_is_checked_as_what_it_is(shared_data):
    kinds = {"pref": "preference", "sft": "SFT", "prompts": "prompt", "ptx": "text"}
    for folder, kind in kinds.items():
        report = check_files(sorted((shared_data / folder).iterdir()))
        assert {file.kind for file in report.files} == {kind}
        assert report.refused == 0


def test_the_real_edge_cases_are_all_refused(shared_data):
    report = check_files([shared_data / "raw" / "hh_edge_cases.jsonl"])
    assert report.refused == report.files[0].rows == 20
    assert any("prompt-mismatch: 8 (line 3, 4, 5, 7, 16, 18, 19, 20)" in x for x in render(report))


def test_real_languages_and_length_bias_are_counted(shared_data):
    (file,) = check_files([shared_data / "pref" / "oasst_zh.jsonl"]).files
    assert file.values["lang"] == {"zh": 585}
    assert file.pairs > file.usable == 585
    assert file.longer_wins is not None
    assert 0.7 < file.longer_wins < 0.8
