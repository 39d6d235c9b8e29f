"""Replies to a file: whole or not there, gone on with, told as they end."""

import json
import os
import threading

import pytest

from ppomax.data.sources import SourceConfig, load_prompts
from ppomax.errors import ConfigError, ModelError
from ppomax.eval import generate, writing
from ppomax.eval.replies import write_replies
from ppomax.eval.writing import generate_file, write_rows
from ppomax.rollout import EngineSettings, SamplingParams
from ppomax.rollout.native import NativeEngine
from ppomax.rollout.transformers_engine import TransformersEngine

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


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_stopped_and_called_again_is_never_stopped(
    tiny, rows, tmp_path, monkeypatch, stop_after, kind, capsys
):
    monkeypatch.setattr(
        generate, "EngineSettings", lambda slots: EngineSettings(kind=kind, slots=2)
    )
    write_rows(tmp_path / "whole", tiny, rows, PARAMS, **OPTIONS)
    out = tmp_path / "out"
    written = stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    assert f"3 of 8 replies are kept in {unfinished(out)}" in capsys.readouterr().err
    assert not out.exists()
    with unfinished(out).open("a") as file:
        file.write('{"row": 0, "rep')  # torn
    before = [line["row"] for line in written]
    written = stop_after(99)
    write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    assert f"3 of 8 replies are there, in {unfinished(out)}" in capsys.readouterr().err
    assert sorted(before + [line["row"] for line in written]) == list(range(len(rows)))
    assert out.read_text() == (tmp_path / "whole").read_text()
    assert not unfinished(out).exists()
    assert [line["id"] for line in lines_of(out)] == [row.id for row in rows]


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_reply_is_on_the_disk_while_others_are_being_written(
    tiny, rows, tmp_path, monkeypatch, kind
):
    out, seen = tmp_path / "out", []
    monkeypatch.setattr(
        generate, "EngineSettings", lambda slots: EngineSettings(kind=kind, slots=2)
    )

    def look(inner):
        def step(*args, **kwargs):
            seen.append(len(lines_of(unfinished(out))) if unfinished(out).exists() else 0)
            return inner(*args, **kwargs)

        return step

    monkeypatch.setattr(NativeEngine, "_extend", look(NativeEngine._extend))
    monkeypatch.setattr(TransformersEngine, "_next", look(TransformersEngine._next))
    write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    assert set(seen) >= {0, 2, 4, 6}


def test_torn_lines_and_lines_of_no_use_are_passed_over(tiny, rows, tmp_path, stop_after, capsys):
    out = tmp_path / "out"
    stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    call = lines_of(unfinished(out))[0]["call"]
    bad = [{"row": 0}, {"row": 99, "response": "x", "finished": True}, {"row": 1, "response": 5}]
    with unfinished(out).open("a") as file:
        file.writelines(json.dumps({"call": call, **line}) + "\n" for line in bad)
        file.write('["not an object"]\n{"torn')
    written = stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    assert "2 of 8 replies are there" in capsys.readouterr().err
    assert len(written) == 2  # and the torn line does not swallow the first of them
    written = stop_after(99)
    write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    assert len(written) == len(rows) - 4
    assert len(lines_of(out)) == len(rows)


CHANGES = [
    {"seed": 4},
    {"dtype": "bfloat16"},
    {"system": "Rhyme."},
    {"temperature": 0.3},
    {"rows": 7},
    {"model": "other weights"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_replies_of_another_call_are_neither_taken_nor_lost(
    tiny, rows, tmp_path, stop_after, monkeypatch, change
):
    out = tmp_path / "out"
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        write_rows(out, tiny, rows, PARAMS, **OPTIONS)
    before = unfinished(out).read_text()
    options = OPTIONS | {k: v for k, v in change.items() if k in ("seed", "dtype", "system")}
    params = PARAMS.model_copy(update={k: v for k, v in change.items() if k == "temperature"})
    if "model" in change:
        monkeypatch.setattr(writing, "fingerprint", lambda _: "other weights")
    with pytest.raises(ConfigError, match=r"out\.unfinished holds something else"):
        write_rows(out, tiny, rows[: change.get("rows")], params, **options)
    assert unfinished(out).read_text() == before
    mark = tmp_path / "out.key"  # whose place it is lets them go
    written = stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        write_rows(out, tiny, rows[: change.get("rows")], params, **options, mark=mark)
    assert lines_of(unfinished(out)) == written


def test_two_calls_that_write_at_once_do_not_mix(tiny, rows, tmp_path, stop_after):
    out, mine, theirs = tmp_path / "out", OPTIONS, OPTIONS | {"seed": 4}
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "b", tiny, rows, PARAMS, **theirs)
    stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        write_rows(out, tiny, rows, PARAMS, **mine)
    with unfinished(out).open("a") as file:  # what another process has written meanwhile
        file.write(unfinished(tmp_path / "b").read_text())
    written = stop_after(99)
    write_rows(out, tiny, rows, PARAMS, **mine)
    assert len(written) == len(rows) - 2
    assert {line["seed"] for line in lines_of(out)} == {3}
    assert unfinished(out).exists()  # its replies are still there
    written = stop_after(99)
    write_rows(out, tiny, rows, PARAMS, **theirs)
    assert len(written) == len(rows) - 3
    assert {line["seed"] for line in lines_of(out)} == {4}


def test_files_of_that_name_that_are_somebodys_own_are_left_alone(tiny, rows, tmp_path):
    for text in ("my notes\n", '{"a": 1}\n'):
        unfinished(tmp_path / "out").write_text(text)
        with pytest.raises(ConfigError, match="holds something else"):
            write_rows(tmp_path / "out", tiny, rows, PARAMS, **OPTIONS)
        assert unfinished(tmp_path / "out").read_text() == text


def test_a_call_that_cannot_work_costs_nothing(tiny, rows, tmp_path, stop_after):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="float23"):
        write_rows(out, tiny, rows, PARAMS, seed=3, dtype="float23")
    with pytest.raises(ModelError):
        write_rows(out, str(tmp_path / "no-model"), rows, PARAMS, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


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


def test_each_reply_is_told_once_as_it_stands_in_the_rows(tiny, rows):
    told, begun = {}, []

    def note(row, reply, finished, tokens):
        assert row not in told
        assert begun
        told[row] = (reply, finished, tokens)

    found = generate.generate_rows(
        tiny, rows, PARAMS, **OPTIONS, began=lambda: begun.append(1), told=note
    )
    assert [told[row][:2] for row in range(len(rows))] == [
        (reply["response"], reply["finished"]) for reply in found
    ]
    assert all(0 < tokens <= 6 for _, _, tokens in told.values())
    assert all(tokens == 6 for _, finished, tokens in told.values() if not finished)
    assert len(begun) == 1


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
    assert not unfinished(out).exists()
    assert generate_file(tiny, str(place), out, PARAMS, **OPTIONS, limit=1) == 1


def test_to_a_pipe_or_through_a_link_replies_go_at_once(tiny, small_data, tmp_path):
    options = OPTIONS | {"limit": 2}
    whole = tmp_path / "whole"
    assert generate_file(tiny, small_data["prompts"], whole, PARAMS, **options) == 2
    pipe, link, behind = (tmp_path / name for name in ("pipe", "link", "behind"))
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert generate_file(tiny, small_data["prompts"], pipe, PARAMS, **options) == 2
    reader.join(30)
    behind.touch()
    link.symlink_to(behind)
    assert generate_file(tiny, small_data["prompts"], link, PARAMS, **options) == 2
    assert read == [whole.read_text()] == [behind.read_text()]
    assert link.is_symlink()
    with pytest.raises(ConfigError, match="option out"):
        generate_file(tiny, small_data["prompts"], tmp_path, PARAMS, **options)


def test_what_cannot_be_written_is_said_of_its_file(tiny, rows, tmp_path, monkeypatch):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(writing.rundir, "append_jsonl", full)
    with pytest.raises(ConfigError, match=r"option out: cannot write .*unfinished \(No space"):
        write_rows(tmp_path / "out", tiny, rows, PARAMS, **OPTIONS)


def test_a_mark_never_stands_beside_replies_that_are_not_its_own(tiny, rows, tmp_path, monkeypatch):
    place, said = tmp_path / "0.jsonl", []
    write_replies(tiny, rows, PARAMS, place, "a", **OPTIONS, say=said.append)
    write = writing.rundir.write_text

    def dies(path, text):
        if path.suffix == ".key":
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(writing.rundir, "write_text", dies)
    with pytest.raises(KeyboardInterrupt):
        write_replies(tiny, rows, PARAMS, place, "a", seed=4, dtype="float32", say=said.append)
    monkeypatch.setattr(writing.rundir, "write_text", write)
    write_replies(tiny, rows, PARAMS, place, "a", **OPTIONS, say=said.append)
    assert {line["seed"] for line in lines_of(place)} == {3}


def test_an_evaluation_goes_on_with_its_replies(tiny, rows, tmp_path, stop_after):
    place, said = tmp_path / "replies" / "0.jsonl", []
    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        write_replies(tiny, rows, PARAMS, place, "a", **OPTIONS, say=said.append)
    written = stop_after(99)
    found = write_replies(tiny, rows, PARAMS, place, "a", **OPTIONS, say=said.append)
    assert len(written) == len(rows) - 5
    assert len(found.texts) == len(rows)
    with pytest.raises(ConfigError):  # a slip costs nothing
        write_replies(tiny, rows, PARAMS, place, "a", seed=3, dtype="f", say=said.append)
    again = write_replies(tiny, rows, PARAMS, place, "a", **OPTIONS, say=said.append)
    assert again.texts == found.texts
    assert said[-1] == f"a: replies in {place} are used again"
    other = write_replies(tiny, rows, PARAMS, place, "a", seed=4, dtype="float32", say=said.append)
    assert other.texts != found.texts
    assert not list(place.parent.glob("*.unfinished"))
