"""Pair and verdict files: what is written comes back, a crash costs no other vote."""

import json
from dataclasses import asdict, replace

import pytest

from ppomax.errors import DataError
from ppomax.eval.pairs import (
    Reply,
    Verdict,
    append_verdict,
    make_pair,
    pair_hash,
    read_pairs,
    read_verdicts,
    swapped_hash,
    verdicts_for,
    write_pairs,
)

ASK = ({"role": "user", "content": "你好?\udcff"},)
PAIR = make_pair("p1", ASK, Reply("sft", "x"), Reply("ppo", "y"), kind="helpful", lang="zh")


def vote(**changes):
    fields = {
        "pair": PAIR.pair,
        "prompt_id": "p1",
        "a": "sft",
        "b": "ppo",
        "annotator": "ann",
        "question": "helpful",
        "verdict": "a",
        "time": "2026-11-25T10:00:00+00:00",
        "seconds": 1.5,
    }
    return Verdict(**(fields | changes))


def test_pairs_come_back_as_written_lone_surrogates_included(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", [PAIR])
    assert read_pairs(tmp_path / "pairs.jsonl") == [PAIR]


def test_the_hash_depends_on_prompt_replies_and_order_but_not_on_names():
    assert pair_hash("p1", ASK, "x", "y") == PAIR.pair
    other = ({"role": "user", "content": "other"},)
    changed = [
        pair_hash("p2", ASK, "x", "y"),
        pair_hash("p1", other, "x", "y"),
        pair_hash("p1", ASK, "xy", ""),
        pair_hash("p1", ASK, "y", "x"),
    ]
    assert len({PAIR.pair, *changed}) == 5
    assert swapped_hash(PAIR) == changed[-1]


def test_an_edited_pair_file_is_refused(tmp_path):
    row = asdict(PAIR) | {"a": {"name": "sft", "response": "edited"}}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"pairs.jsonl:1: pair"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_a_line_cut_short_costs_no_other_vote(tmp_path):
    file = tmp_path / "votes.jsonl"
    append_verdict(file, vote())
    with file.open("ab") as out:
        out.write('{"pair": "你'.encode()[:-1])
    append_verdict(file, vote(annotator="bea", note="é"))
    assert [v.annotator for v in read_verdicts(file)] == ["ann", "bea"]
    assert read_verdicts(file)[1] == vote(annotator="bea", note="é")


def test_the_last_vote_of_an_annotator_counts_and_a_skip_takes_it_back(tmp_path):
    file = tmp_path / "votes.jsonl"
    for found in ("a", "b"):
        append_verdict(file, vote(verdict=found))
    append_verdict(file, vote(annotator="bea", verdict="tie"))
    append_verdict(file, vote(question="harmless", verdict="a"))
    assert [v.verdict for v in read_verdicts(file)] == ["b", "tie", "a"]
    append_verdict(file, vote(verdict="skip"))
    found = verdicts_for(PAIR, {PAIR.pair: read_verdicts(file)})
    assert [(v.annotator, v.question) for v in found] == [("bea", "helpful"), ("ann", "harmless")]


def test_a_vote_on_the_swapped_pair_is_turned_round():
    turned = vote(pair=swapped_hash(PAIR), a="ppo", b="sft")
    assert verdicts_for(PAIR, {turned.pair: [turned]}) == [
        replace(turned, pair=PAIR.pair, a="sft", b="ppo", verdict="b")
    ]


@pytest.mark.parametrize(
    ("key", "value"), [("verdict", "A"), ("question", "nice"), ("pair", 3), ("seconds", "fast")]
)
def test_a_wrong_field_is_named_with_its_line(tmp_path, key, value):
    row = asdict(vote()) | {key: value}
    (tmp_path / "v.jsonl").write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"v.jsonl:2: {key}: "):
        read_verdicts(tmp_path / "v.jsonl")
