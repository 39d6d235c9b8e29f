"""Votes: on disk before they are answered, undone by another line, kept to their pairs."""

import json
import os
from collections import Counter
from itertools import count

import pytest

from ppomax.annotate import votes as votes_module
from ppomax.annotate.queue import next_pair, question_of, swapped, unswap
from ppomax.annotate.votes import RESERVED_SECONDS, Conflict, Votes, read_votes
from ppomax.errors import DataError
from ppomax.eval.pairs import append_verdict, read_verdicts


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def book(pairs, tmp_path):
    """`book(...)`: the votes in `votes.jsonl`; called again it reads what is on disk."""

    def start(quota=1, given=None, clock=lambda: 0.0):
        return Votes(given or pairs, tmp_path / "votes.jsonl", quota=quota, clock=clock)

    return start


def vote_all(votes, name, choose=lambda pair: "first"):
    """Vote until nothing is left; the pairs in the order seen."""
    seen = []
    while (pair := votes.current(name)) is not None:
        votes.vote(name, pair.pair, choose(pair), "", 1.0)
        seen.append(pair.pair)
    return seen


# --- sides and order


def test_sides_are_a_fair_coin_fixed_by_person_and_pair():
    names = [f"pair {number}" for number in range(2000)]
    ann, bea = ([swapped(person, name) for name in names] for person in ("ann", "bea"))
    assert ann == [swapped("ann", name) for name in names]
    for sides in (ann, bea, [a == b for a, b in zip(ann, bea, strict=True)]):
        assert 900 < sum(sides) < 1100  # 4.5 standard deviations


@pytest.mark.parametrize(
    ("seen", "turned", "side"),
    [
        ("first", False, "a"),
        ("second", False, "b"),
        ("first", True, "b"),
        ("second", True, "a"),
        ("tie", True, "tie"),
        ("skip", False, "skip"),
    ],
)
def test_a_choice_by_place_names_the_right_side(seen, turned, side):
    assert unswap(seen, turned) == side


def test_who_always_picks_the_better_text_never_picks_the_worse_model(book, tmp_path, make):
    given = [make(number) for number in range(20)]
    votes = book(given=given)
    turned = []
    while (pair := votes.current("ann")) is not None:
        left = pair.b if swapped("ann", pair.pair) else pair.a  # what the page shows first
        turned.append(left is pair.b)
        votes.vote("ann", pair.pair, "first" if "better" in left.response else "second", "", 1.0)
    assert 0 < sum(turned) < 20
    assert [vote["verdict"] for vote in lines(tmp_path / "votes.jsonl")] == ["b"] * 20


def test_pairs_with_fewest_votes_come_first_in_an_order_of_ones_own():
    names = [f"pair {number}" for number in range(50)]
    assert next_pair("ann", names, Counter(names[1:]), 2) == names[0]
    assert next_pair("ann", names, Counter(names), 1) is None
    firsts = {next_pair(f"person {number}", names, {}, 1) for number in range(20)}
    assert len(firsts) > 10


def test_the_question_follows_the_kind_of_the_prompt(make):
    asked = {
        kind: question_of(make(0, kind=kind)) for kind in ("helpful", "", "harmful", "sensitive")
    }
    assert asked == {
        "helpful": "helpful",
        "": "helpful",
        "harmful": "harmless",
        "sensitive": "harmless",
    }


# --- on disk


def test_a_vote_has_the_shared_form(book, pairs, tmp_path):
    votes = book()
    votes.vote("安娜", pairs[2].pair, "tie", "两个都差", 3.25)
    (row,) = lines(tmp_path / "votes.jsonl")
    assert row.pop("time").startswith("20")
    assert row == {
        "pair": pairs[2].pair,
        "prompt_id": "p2",
        "a": "sft",
        "b": "ppo",
        "annotator": "安娜",
        "question": "harmless",
        "verdict": "tie",
        "note": "两个都差",
        "seconds": 3.25,
    }


def test_a_vote_is_synced_before_the_next_pair_is_known(book, pairs, tmp_path, monkeypatch):
    votes = book()
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or real(fd))
    for number in range(3):
        votes.vote("ann", votes.current("ann").pair, "first", "", 1.0)
        assert (tmp_path / "votes.jsonl").stat().st_size in synced, number
    votes.undo("ann", votes.last("ann"))
    assert (tmp_path / "votes.jsonl").stat().st_size in synced


def test_a_vote_that_cannot_be_written_is_not_taken_in(book, pairs, monkeypatch):
    votes = book()
    pair = votes.current("ann").pair

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        votes.vote("ann", pair, "first", "", 1.0)
    assert votes.progress("ann").mine == 0
    assert votes.current("ann").pair == pair
    monkeypatch.undo()
    votes.vote("ann", pair, "second", "", 1.0)
    again = book()
    assert len(again.given) == 1
    side = unswap("second", swapped("ann", pair))
    assert again.given["ann", pair].verdict == side


def test_a_restart_at_any_moment_loses_nothing(book, pairs, tmp_path):
    path = tmp_path / "votes.jsonl"
    for number in range(len(pairs)):
        votes = book()
        assert votes.progress("ann").mine == number
        pair = votes.current("ann").pair
        votes.vote("ann", pair, "first", "", 1.0)
        with path.open("ab") as file:  # killed in the middle of the next line
            file.write(b'{"pair": "' + str(number).encode())
    assert book().current("ann") is None
    assert len(read_verdicts(path)) == len(pairs)


def test_undo_is_a_line_more_and_goes_back_vote_by_vote(book, pairs, tmp_path):
    path = tmp_path / "votes.jsonl"
    votes = book()
    for number in range(3):
        votes.vote("ann", votes.current("ann").pair, "first", f"note {number}", 1.0)
    before = path.read_bytes()
    seen = [vote.pair for vote in votes.given.values()]
    votes.undo("ann", seen[2])
    assert path.read_bytes().startswith(before)
    assert {key: value for key, value in lines(path)[3].items() if key != "time"} == {
        "pair": seen[2],
        "annotator": "ann",
        "undo": True,
    }
    assert (votes.current("ann").pair, votes.note("ann")) == (seen[2], "note 2")
    votes = book()  # a restart knows of it
    assert votes.last("ann") == seen[1]
    votes.undo("ann", seen[1])
    assert votes.current("ann").pair == seen[1]
    votes.vote("ann", seen[1], "tie", "", 1.0)
    found = {vote.pair: vote.verdict for vote in read_verdicts(path)}
    assert found == {seen[0]: votes.given["ann", seen[0]].verdict, seen[1]: "tie"}


def test_an_undo_takes_back_ones_own_vote_only(book, pairs):
    votes = book(quota=2)
    for name in ("ann", "bea"):
        votes.vote(name, pairs[0].pair, "tie", "", 1.0)
    votes.undo("ann", pairs[0].pair)
    assert set(book(quota=2).given) == {("bea", pairs[0].pair)}
    with pytest.raises(Conflict):
        votes.undo("cem", "no such pair")


def test_a_question_sent_twice_changes_nothing_the_second_time(book, pairs, tmp_path):
    votes = book()
    one, two = pairs[0].pair, pairs[1].pair
    votes.vote("ann", two, "tie", "", 1.0)
    votes.vote("ann", one, "first", "n", 1.0)
    votes.vote("ann", one, "first", "n", 9.0)
    assert len(lines(tmp_path / "votes.jsonl")) == 2
    with pytest.raises(Conflict, match="undo"):
        votes.vote("ann", one, "second", "n", 1.0)
    with pytest.raises(Conflict, match="last"):
        votes.undo("ann", two)
    votes.undo("ann", one)
    votes.undo("ann", one)
    assert len(lines(tmp_path / "votes.jsonl")) == 3
    assert votes.last("ann") == two


# --- quota


@pytest.mark.parametrize("quota", [1, 2, 3])
def test_each_pair_gets_its_quota_from_as_many_people(book, pairs, quota):
    votes = book(quota=quota)
    people = ["ann", "bea", "cem", "dai"]
    for turn in count():
        name = people[turn % 4]
        pair = votes.current(name)
        if pair is not None:
            votes.vote(name, pair.pair, "first", "", 1.0)
        elif all(votes.current(person) is None for person in people):
            break
    given = Counter(pair for _, pair in votes.given)
    assert given == {pair.pair: quota for pair in pairs}
    assert votes.progress("ann").votes == votes.progress("ann").wanted == quota * len(pairs)


def test_a_pair_that_someone_has_open_is_shown_to_nobody_else_for_a_while(book, make):
    now = [0.0]
    votes = book(given=[make(0)], clock=lambda: now[0])
    assert votes.current("ann") is not None
    assert votes.current("bea") is None
    assert votes.progress("bea").left == 1
    now[0] = RESERVED_SECONDS + 1
    open_pair = votes.current("bea")
    assert open_pair is not None
    votes.vote("ann", open_pair.pair, "first", "", 1.0)  # late, yet not lost
    votes.vote("bea", open_pair.pair, "first", "", 1.0)
    assert votes.progress("ann").votes == 1
    assert len(votes.given) == 2


def test_a_skipped_pair_is_no_vote_and_goes_to_someone_else(book, pairs):
    votes = book()
    skipped = vote_all(votes, "ann", lambda pair: "skip")
    assert sorted(skipped) == sorted(pair.pair for pair in pairs)
    progress = votes.progress("ann")
    assert (progress.mine, progress.left, progress.votes, progress.seconds) == (6, 0, 0, None)
    assert len(vote_all(votes, "bea")) == len(pairs)


def test_the_time_of_a_vote_is_the_median(book, pairs):
    votes = book()
    for pair, seconds in zip(pairs, (1.0, 100.0, 3.0), strict=False):
        votes.vote("ann", pair.pair, "tie", "", seconds)
    assert votes.progress("ann").seconds == 3.0
    assert votes.progress("bea").seconds is None


# --- other files


def test_votes_on_other_pairs_are_refused_and_named(book, pairs, make, tmp_path):
    book().vote("ann", pairs[0].pair, "first", "", 1.0)
    with pytest.raises(DataError, match=r"votes.jsonl: .*'ann'.*'p0'.*not one of the 2 pairs"):
        book(given=[make(7), make(8)])


def test_votes_on_the_same_texts_of_other_models_are_refused(book, pairs, tmp_path):
    vote = votes_module.Verdict(
        pairs[0].pair, "p0", "ppo", "sft", "ann", "helpful", "a", "2026-11-25T00:00:00+00:00", 1.0
    )
    append_verdict(tmp_path / "votes.jsonl", vote)
    with pytest.raises(DataError, match=r"ppo against sft .* sft against ppo"):
        book()


def test_no_vote_file_yet_is_no_votes(pairs, tmp_path):
    assert read_votes(pairs, tmp_path / "none.jsonl") == []


# --- over HTTP


def test_the_page_is_told_the_texts_and_not_who_wrote_them(serve, pairs):
    with serve() as client:
        status, state = client.ask("next", annotator="ann")
    assert status == 200
    shown = next(pair for pair in pairs if pair.pair == state["pair"]["id"])
    assert set(state["pair"]) == {"id", "question", "lang", "messages", "first", "second", "note"}
    assert {state["pair"]["first"], state["pair"]["second"]} == {
        shown.a.response,
        shown.b.response,
    }
    assert "sft" not in json.dumps(state)
    assert "ppo" not in json.dumps(state)
    assert state["undo"] is None


def test_two_people_at_once_over_http_and_a_restart_between(serve, tmp_path):
    path = tmp_path / "votes.jsonl"
    open_pairs = {}
    for _ in range(2):
        with serve(quota=2) as client:
            for name in ("ann", "bea"):
                open_pairs[name] = client.ask("next", annotator=name)[1]
            for _ in range(3):
                for name in ("ann", "bea"):
                    pair = open_pairs[name]["pair"]
                    fields = {"pair": pair["id"], "choice": "second", "seconds": 0.5}
                    before = len(read_verdicts(path)) if path.exists() else 0
                    status, open_pairs[name] = client.ask("vote", annotator=name, **fields)
                    assert status == 200
                    assert len(read_verdicts(path)) == before + 1
    assert open_pairs["ann"]["pair"] is None
    assert open_pairs["bea"]["progress"] == {
        "mine": 6,
        "left": 0,
        "votes": 12,
        "wanted": 12,
        "seconds": 0.5,
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"annotator": ""},
        {"annotator": "x" * 41},
        {"annotator": " ann"},
        {"annotator": "an\u202en"},
        {"annotator": "an\x1b[31mn"},
        {"annotator": ["ann"]},
        {"seconds": -1},
        {"seconds": "1"},
        {"seconds": float("inf")},
        {"choice": "a"},
        {"choice": None},
        {"note": "x" * 2001},
        {"pair": "x" * 65},
        {"extra": 1},
    ],
)
def test_a_wrong_field_is_refused_and_writes_nothing(serve, pairs, tmp_path, fields):
    right = {"annotator": "ann", "pair": pairs[0].pair, "choice": "first", "seconds": 1}
    with serve() as client:
        status, answer = client.ask("vote", **right | fields)
    assert status == 400
    assert answer["error"]
    assert not (tmp_path / "votes.jsonl").exists()


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 9000, b'"\\ud800"', b"null"])
def test_a_body_that_is_no_question_is_refused(serve, body):
    with serve() as client:
        assert client.send("POST", "/api/vote", body)[0] == 400


def test_conflicts_and_full_disks_have_their_status(serve, pairs, monkeypatch):
    vote = {"annotator": "ann", "pair": pairs[0].pair, "choice": "first", "seconds": 1}
    with serve() as client:
        assert client.ask("vote", **vote | {"pair": "none"})[0] == 409
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "full")))
        assert client.ask("vote", **vote) == (503, {"error": "not saved: full"})
        monkeypatch.undo()
        assert client.ask("next", annotator="ann")[1]["progress"]["mine"] == 0
        assert client.ask("vote", **vote)[1]["progress"]["mine"] == 1
        assert client.ask("vote", **vote | {"choice": "second"})[0] == 409
        status, state = client.ask("undo", annotator="ann", pair=pairs[0].pair)
        assert (status, state["pair"]["id"], state["undo"]) == (200, pairs[0].pair, None)
