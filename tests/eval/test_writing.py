"""Replies to a file: whole or not there, gone on with, told as they end."""

import json
from pathlib import Path

import pytest

from ppomax.data.sources import SourceConfig, load_prompts
from ppomax.errors import ConfigError, ModelError
from ppomax.eval import generate, writing
from ppomax.eval.replies import write_replies
from ppomax.eval.writing import generate_file, write_rows
from ppomax.rollout import EngineSettings, SamplingParams

PARAMS = SamplingParams(max_new_tokens=6)
OPTIONS = {"seed": 3, "dtype": "float32"}


@pytest.fixture
def rows(small_data):
    return load_prompts([SourceConfig(path=small_data["prompts"])]).rows


@pytest.fixture
def stop_after(monkeypatch):
    """Makes whoever writes a reply's line stop behind so many."""

    append = writing.rundir.append_jsonl

    def arrange(count):
        written = []

        def stops(path, lines):
            if len(written) == count:
                raise KeyboardInterrupt
            written.extend(lines)
            append(path, lines)

        monkeypatch.setattr(writing.rundir, "append_jsonl", stops)
        return written

    return arrange


def unfinished(path):
    return path.with_name(f"{path.name}.unfinished")


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_stopped_and_called_again_is_never_stopped(
    tiny, rows, tmp_path, monkeypatch, stop_after, kind
):
    monkeypatch.setattr(
        generate, "EngineSettings", lambda slots: EngineSettings(kind=kind, slots=2)
    )
    write_rows(tmp_path / "whole", tiny, rows, PARAMS, **OPTIONS)
    out = tmp_path / "out"
    written = stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    assert not out.exists()
    with unfinished(out).open("a") as file:
        file.write('{"row": 0, "rep')  # torn
    before = [line["row"] for line in written]
    written = stop_after(99)
    write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    assert sorted(before + [line["row"] for line in written]) == list(range(len(rows)))
    assert out.read_text() == (tmp_path / "whole").read_text()
    assert not unfinished(out).exists()
    assert [json.loads(line)["id"] for line in out.open()] == [row.id for row in rows]


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"dtype": "bfloat16"}, {"system": "Rhyme."}, {"temperature": 0.3}, {"rows": 7}],
)
def test_replies_of_another_call_are_not_gone_on_with(tiny, rows, tmp_path, stop_after, change):
    out = tmp_path / "out"
    written = stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    written.clear()
    options = OPTIONS | {k: v for k, v in change.items() if k in ("seed", "dtype", "system")}
    params = PARAMS.model_copy(update={k: v for k, v in change.items() if k == "temperature"})
    asked = rows[: change.get("rows")]
    with pytest.raises(KeyboardInterrupt):
        write_rows(out, tiny, asked, params, **options)
    assert len(written) == 3  # from the first one on
    lines = [json.loads(line) for line in unfinished(out).open()]
    assert len(lines) == 4
    if "seed" in change:
        assert {line["reply"]["seed"] for line in lines[1:]} == {4}


def test_replies_of_another_model_are_not_gone_on_with(
    tiny, rows, tmp_path, stop_after, monkeypatch
):
    out = tmp_path / "out"
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    written = stop_after(99)
    monkeypatch.setattr(writing, "fingerprint", lambda _: "other weights")
    write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    assert len(written) == len(rows)


def test_it_says_how_far_it_is(tiny, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writing, "SECONDS_OF_LINES", 0.0)
    write_rows(tmp_path / "out", tiny, rows, PARAMS, **OPTIONS)
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == [f"{n}/8" for n in range(1, 9)]
    assert "tok/s" in said[-1]
    assert "left" in said[1]
    monkeypatch.setattr(writing, "SECONDS_OF_LINES", 1e9)
    write_rows(tmp_path / "out", tiny, rows, PARAMS, **OPTIONS)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["8/8"]


def test_each_reply_is_told_once_as_it_stands_in_the_file(tiny, rows):
    told = {}

    def note(row, reply, tokens):
        assert row not in told
        told[row] = (reply, tokens)

    found = generate.generate_rows(tiny, rows, PARAMS, **OPTIONS, told=note)
    assert [told[row][0] for row in range(len(rows))] == found
    assert all(0 < tokens <= 6 for _, tokens in told.values())
    assert all(tokens == 6 for reply, tokens in told.values() if not reply["finished"])


def test_a_prompt_that_stands_twice_has_two_replies(tiny, rows):
    first, second = generate.generate_rows(tiny, [rows[0], rows[0]], PARAMS, **OPTIONS)
    assert first["id"] == second["id"]
    assert first["response"] != second["response"]


def test_a_prompt_that_does_not_fit_is_named_by_its_line_and_nothing_is_lost(tiny, tmp_path):
    place = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Say tea."}, {"prompt": "so " * 3000}, {"prompt": "so " * 2500}]
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    out.write_text("mine\n")
    with pytest.raises(ModelError, match=r"prompts\.jsonl:2: prompt has \d+ tokens.*\(1 more"):
        generate_file(tiny, str(place), out, PARAMS, **OPTIONS, limit=None)
    assert out.read_text() == "mine\n"
    assert generate_file(tiny, str(place), out, PARAMS, **OPTIONS, limit=1) == 1


def test_to_what_is_no_file_replies_go_at_once(tiny, small_data, tmp_path):
    options = OPTIONS | {"limit": 2}
    assert generate_file(tiny, small_data["prompts"], Path("/dev/null"), PARAMS, **options) == 2
    with pytest.raises(ConfigError, match="option out"):
        generate_file(tiny, small_data["prompts"], tmp_path, PARAMS, **options)


def test_an_evaluation_goes_on_with_its_replies(tiny, rows, tmp_path, stop_after):
    place, said = tmp_path / "replies" / "0.jsonl", []
    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        write_replies(tiny, rows, PARAMS, place, "a", **OPTIONS, say=said.append)
    written = stop_after(99)
    found = write_replies(tiny, rows, PARAMS, place, "a", **OPTIONS, say=said.append)
    assert len(written) == len(rows) - 5
    assert len(found.texts) == len(rows)
    again = write_replies(tiny, rows, PARAMS, place, "a", **OPTIONS, say=said.append)
    assert again.texts == found.texts
    assert said[-1] == f"a: replies in {place} are used again"
