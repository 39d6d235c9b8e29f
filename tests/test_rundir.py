import json
from pathlib import Path

import pytest

from ppomax import rundir
from ppomax.errors import ConfigError
from ppomax.rundir import (
    append_jsonl,
    create,
    cut_back,
    read_jsonl,
    write_environment,
    write_text,
)


def rows(path):
    return list(read_jsonl(path))


# --- JSONL


def test_appended_rows_come_back_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = [{"stage": "ppo", "step": 1, "x": 0.1}, {"text": 'a\n"b"\r\u2028 汉字 \\ \x00 🙂'}]
    append_jsonl(path, first)
    append_jsonl(path, [])
    append_jsonl(path, [{"step": 2, "none": None}])
    assert rows(path) == [*first, {"step": 2, "none": None}]
    assert len(path.read_bytes().splitlines()) == 3
    assert "汉字" in path.read_text(encoding="utf-8")


def test_numbers_come_back_with_all_their_digits(tmp_path):
    values = {"a": 1 / 3, "b": 5e-324, "c": 2**63, "d": -0.0, "e": 1e308}
    append_jsonl(tmp_path / "m.jsonl", [values])
    assert rows(tmp_path / "m.jsonl") == [values]


def test_a_missing_or_empty_file_has_no_rows(tmp_path):
    assert rows(tmp_path / "none.jsonl") == []
    (tmp_path / "empty.jsonl").write_text("")
    assert rows(tmp_path / "empty.jsonl") == []


def test_lines_that_are_no_objects_are_passed_over(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n\n[1]\nnull\n{"b"\n{"c": 3}\n')
    assert rows(path) == [{"a": 1}, {"c": 3}]


def torn_at(tmp_path, row, cut):
    path = tmp_path / "m.jsonl"
    append_jsonl(path, [{"step": 1}, row])
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    return path


ROW = {"step": 2, "x": 12.5, "s": "abc"}
START = len(b'{"step": 1}\n')


@pytest.mark.parametrize("kept", range(len(json.dumps(ROW)) + 1))
def test_a_torn_last_line_is_left_out_wherever_it_was_torn(tmp_path, kept):
    path = torn_at(tmp_path, ROW, START + kept)
    assert rows(path) == [{"step": 1}]


def test_a_whole_last_line_is_not_taken_for_a_torn_one(tmp_path):
    path = torn_at(tmp_path, ROW, START + len(json.dumps(ROW)) + 1)
    assert rows(path) == [{"step": 1}, ROW]


@pytest.mark.parametrize("lost", [1, 2])
def test_a_line_torn_inside_a_character_is_left_out_like_any_other(tmp_path, lost):
    path = tmp_path / "samples.jsonl"
    append_jsonl(path, [{"step": 1}, {"text": "汉"}])
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex("汉".encode()) + 3 - lost])
    assert rows(path) == [{"step": 1}]


@pytest.mark.parametrize("lost", [1, 2])
def test_a_file_torn_inside_a_character_is_cut_back_like_any_other(tmp_path, lost):
    path = tmp_path / "samples.jsonl"
    append_jsonl(path, [{"stage": "ppo", "step": 1}, {"stage": "ppo", "step": 2, "text": "汉"}])
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex("汉".encode()) + 3 - lost])
    cut_back(path, {"ppo": 5})
    assert rows(path) == [{"stage": "ppo", "step": 1}]


def test_half_a_character_in_a_text_stops_no_run(tmp_path):
    path = tmp_path / "samples.jsonl"
    row = {"stage": "ppo", "step": 1, "text": "half \ud83d 汉"}
    append_jsonl(path, [row])
    assert rows(path) == [row]
    cut_back(path, {"ppo": 1})
    assert rows(path) == [row]


# --- cutting back


def test_rows_past_the_resumed_step_of_their_stage_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = [
        {"stage": "critic", "step": 7, "x": 1 / 3},
        {"stage": "ppo", "step": 0},
        {"stage": "ppo", "step": 3, "attempt": 1},
    ]
    append_jsonl(
        path,
        [
            *kept[:2],
            {"stage": "ppo", "step": 4},
            kept[2],
            {"stage": "critic", "step": 8},
            {"stage": "other", "step": 0},
        ],
    )
    cut_back(path, {"ppo": 3, "critic": 7})
    assert rows(path) == kept
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cutting_back_to_nothing_empties_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"stage": "ppo", "step": 0}, {"stage": "ppo", "step": 1}])
    cut_back(path, {})
    assert path.read_bytes() == b""


def test_cutting_back_drops_a_torn_line_and_what_follows_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"stage": "ppo", "step": 1}])
    with path.open("a") as file:
        file.write('{"stage": "ppo", "st')
    cut_back(path, {"ppo": 9})
    append_jsonl(path, [{"stage": "ppo", "step": 2}])
    assert rows(path) == [{"stage": "ppo", "step": 1}, {"stage": "ppo", "step": 2}]


def test_cutting_back_a_file_that_is_not_there_makes_none(tmp_path):
    cut_back(tmp_path / "metrics.jsonl", {"ppo": 1})
    assert list(tmp_path.iterdir()) == []


def test_cutting_back_twice_is_cutting_back_once(tmp_path):
    path = tmp_path / "m.jsonl"
    append_jsonl(path, [{"stage": "s", "step": step, "text": "é"} for step in range(5)])
    cut_back(path, {"s": 2})
    once = path.read_bytes()
    cut_back(path, {"s": 2})
    assert path.read_bytes() == once


def test_a_crash_while_cutting_back_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    append_jsonl(path, [{"stage": "s", "step": step} for step in range(5)])
    before = path.read_bytes()

    def stop(*_args, **_keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            cut_back(path, {"s": 2})
    assert path.read_bytes() == before
    cut_back(path, {"s": 2})
    assert len(rows(path)) == 3
    assert [item.name for item in tmp_path.iterdir()] == ["m.jsonl"]


# --- small files


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "done.json"
    write_text(path, "old é")
    assert path.read_text(encoding="utf-8") == "old é"

    def stop(_descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rundir.os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old é"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["done.json"]


# --- the directory


def test_a_run_directory_is_made_with_its_config(tmp_path):
    create(tmp_path / "runs" / "a", "out: runs/a\n")
    assert (tmp_path / "runs" / "a" / "config.yaml").read_text() == "out: runs/a\n"


def test_a_directory_with_other_files_can_become_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    create(tmp_path, "a: 1\n")
    assert (tmp_path / "config.yaml").exists()


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(tmp_path):
    create(tmp_path / "a", "a: 1\n")
    with pytest.raises(ConfigError, match=r"setting out: .*already holds a run.*ppomax resume"):
        create(tmp_path / "a", "a: 2\n")
    assert (tmp_path / "a" / "config.yaml").read_text() == "a: 1\n"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ConfigError, match="setting out: cannot write") as caught:
            create(place, "a: 1\n")
        assert "\n" not in str(caught.value)


def test_the_environment_names_versions_machine_command_and_what_is_passed(tmp_path):
    import torch

    write_environment(tmp_path, {"seed": 3, "device": "cpu"})
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["versions"]["torch"] == torch.__version__
    assert {"transformers", "python", "ppomax"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1
    assert isinstance(found["command"], list)
    assert (found["seed"], found["device"]) == (3, "cpu")
    assert "commit" in found
