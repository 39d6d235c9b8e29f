"""Preference pairs out of votes: the majority, in the form that training reads."""

from dataclasses import replace

import pytest

from ppomax.annotate.export import export_preferences, preferences
from ppomax.data.check import check_files
from ppomax.data.sources import SourceConfig, load_preferences
from ppomax.errors import ConfigError, DataError
from ppomax.eval.pairs import Verdict, append_verdict, write_pairs


def vote(pair, verdict, annotator="ann", question="helpful"):
    time = "2026-11-25T10:00:00+00:00"
    names = (pair.a.name, pair.b.name)
    return Verdict(pair.pair, pair.prompt_id, *names, annotator, question, verdict, time, 1.0)


@pytest.fixture
def files(tmp_path, pairs):
    """Pair file and vote file with one vote each way."""
    source, votes = tmp_path / "pairs.jsonl", tmp_path / "votes.jsonl"
    write_pairs(source, pairs)
    append_verdict(votes, vote(pairs[0], "a"))
    append_verdict(votes, vote(pairs[2], "b", question="harmless"))
    append_verdict(votes, vote(pairs[3], "tie"))
    append_verdict(votes, vote(pairs[4], "skip"))
    return source, votes


@pytest.mark.parametrize(
    ("verdicts", "chosen"),
    [
        ("a", "plain 0"),
        ("b", "better 0"),
        ("aab", "plain 0"),
        ("b--", "better 0"),
        ("ab", None),
        ("-", None),
        ("", None),
    ],
)
def test_the_majority_of_those_who_prefer_one_reply_counts(make, verdicts, chosen):
    pair = make(0)
    names = {"-": "tie"}
    given = [vote(pair, names.get(v, v), f"person {i}") for i, v in enumerate(verdicts)]
    found = preferences([pair], [*given, vote(pair, "skip", "zoe")])
    assert [row["chosen"] for row in found.rows] == ([chosen] if chosen else [])
    if chosen:
        row = found.rows[0]
        counts = sorted((verdicts.count("a"), verdicts.count("b")), reverse=True)
        assert [row["votes_chosen"], row["votes_rejected"]] == counts
        assert row["votes_tie"] == verdicts.count("-")
        assert row["rejected"] != chosen


def test_the_two_questions_are_counted_apart(make):
    pair = make(0)
    given = [
        vote(pair, "a"),
        vote(pair, "b", question="harmless"),
        vote(pair, "b", "bea", "harmless"),
    ]
    found = preferences([pair], given).rows
    assert {row["kind"]: row["chosen"] for row in found} == {
        "helpful": "plain 0",
        "harmless": "better 0",
    }
    assert len({row["id"] for row in found}) == 2


def test_replies_that_training_would_refuse_are_left_out_and_counted(make):
    empty, same = make(0, a=" "), make(1, a="x", b="x ")
    found = preferences([empty, same, make(2)], [vote(empty, "b"), vote(same, "a")])
    assert found.rows == []
    assert dict(found.left_out) == {
        "with an empty reply": 1,
        "with equal replies": 1,
        "without a vote": 1,
    }


def test_what_is_exported_is_what_training_reads(files, pairs, tmp_path):
    out = tmp_path / "prefs.jsonl"
    said = export_preferences(*files, out)
    assert said == [
        f"2 preference pairs in {out} (helpful 1, harmless 1)",
        "left out: 3 without a vote; 1 without a majority",
    ]
    (checked,) = check_files([out]).files
    assert (checked.kind, checked.rows, checked.pairs) == ("preference", 2, 2)
    assert checked.refused == checked.duplicates == []
    assert checked.values["kind"] == {"helpful": 1, "harmless": 1}
    assert checked.values["label_by"] == {"people": 2}
    helpful, harmless = load_preferences([SourceConfig(path=str(out))]).rows
    assert (helpful.prompt, helpful.chosen, helpful.rejected) == (
        pairs[0].messages,
        "plain 0",
        "better 0",
    )
    assert (harmless.chosen, harmless.rejected) == ("better 2", "plain 2")
    assert harmless.meta["lang"] == "en"


def test_an_export_over_a_file_that_is_read_is_refused(files):
    before = [path.read_bytes() for path in files]
    for path in files:
        with pytest.raises(ConfigError, match="name another"):
            export_preferences(*files, path)
    assert [path.read_bytes() for path in files] == before


def test_votes_that_decide_nothing_or_are_missing_are_an_error(files, pairs, tmp_path, make):
    source, votes = files
    with pytest.raises(DataError, match="no such file"):
        export_preferences(source, tmp_path / "none.jsonl", tmp_path / "prefs.jsonl")
    votes.unlink()
    append_verdict(votes, vote(pairs[0], "tie"))
    with pytest.raises(DataError, match="5 without a vote"):
        export_preferences(source, votes, tmp_path / "prefs.jsonl")
    append_verdict(votes, replace(vote(make(9), "a")))
    with pytest.raises(DataError, match="not one of the 6 pairs"):
        export_preferences(source, votes, tmp_path / "prefs.jsonl")
    assert not (tmp_path / "prefs.jsonl").exists()
