"""The data sets that come with the package are what their README says they are."""

import json
from collections import Counter
from importlib import resources

import pytest

from ppomax.data.sources import BUNDLED, SourceConfig, load_preferences, load_prompts, load_text
from ppomax.data.splits import overlap

FOLDER = resources.files("ppomax.data") / "bundled"


@pytest.fixture(scope="module")
def pairs():
    return load_preferences([SourceConfig(path="bundled:preferences")], max_bad_rows=0.0)


@pytest.fixture(scope="module")
def prompts():
    return load_prompts([SourceConfig(path="bundled:prompts")], max_bad_rows=0.0)


def group(row):
    return f"{row.meta['lang']}-{row.meta['kind']}"


def longer_wins(rows):
    return sum(len(row.chosen) > len(row.rejected) for row in rows) / len(rows)


def test_all_three_files_are_read_without_a_bad_row_or_a_duplicate(pairs, prompts):
    text = load_text([SourceConfig(path="bundled:text")], max_bad_rows=0.0)
    for loaded in (pairs, prompts, text):
        assert loaded.bad == []
        assert loaded.duplicates == []
    assert len(pairs.rows) >= 400
    assert len(prompts.rows) >= 120
    assert len(text.rows) >= 100


def test_the_four_parts_have_their_shares(pairs):
    counts = Counter(map(group, pairs.rows))
    wanted = {"en-helpful": 0.6, "en-harmless": 0.2, "zh-helpful": 0.15, "zh-harmless": 0.05}
    assert counts.keys() == wanted.keys()
    for name, share in wanted.items():
        assert counts[name] / len(pairs.rows) == pytest.approx(share, abs=0.03)


def test_the_longer_answer_wins_about_half_the_time_in_every_part(pairs):
    assert 0.45 <= longer_wins(pairs.rows) <= 0.60
    for name in {group(row) for row in pairs.rows}:
        part = [row for row in pairs.rows if group(row) == name]
        assert 0.40 <= longer_wins(part) <= 0.60, name


def test_no_held_out_prompt_is_among_the_pairs(pairs, prompts):
    assert overlap(pairs.rows, prompts.rows) == []


def test_ids_are_unique_and_texts_are_neither_empty_nor_identical(pairs, prompts):
    for rows in (pairs.rows, prompts.rows):
        assert len({row.id for row in rows}) == len(rows)
    assert not {row.id for row in pairs.rows} & {row.id for row in prompts.rows}
    for row in pairs.rows:
        assert row.chosen.strip()
        assert row.rejected.strip()
        assert row.chosen.split() != row.rejected.split()
        assert all(message["content"].strip() for message in row.prompt)


def test_dialogues_take_turns_and_end_with_the_user(pairs, prompts):
    dialogues = [row.prompt for row in pairs.rows] + [row.messages for row in prompts.rows]
    for messages in dialogues:
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert sum(len(row.prompt) > 1 for row in pairs.rows) / len(pairs.rows) > 0.1


def test_every_pair_says_what_is_wrong_with_the_other_answer(pairs):
    flaws = Counter(row.meta["flaw"] for row in pairs.rows)
    assert len(flaws) == 11
    assert min(flaws.values()) >= 10


def test_the_readme_states_the_counts_of_the_files():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in BUNDLED:
        lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert f"| `{name}.jsonl` | {len(lines)} |" in readme
    rows = [json.loads(line) for line in (FOLDER / "preferences.jsonl").open(encoding="utf-8")]
    for name, count in Counter(row["flaw"] for row in rows).items():
        assert f"{name} {count}" in readme
    counts = Counter((row["lang"], row["kind"]) for row in rows)
    for (lang, kind), count in counts.items():
        part = [row for row in rows if (row["lang"], row["kind"]) == (lang, kind)]
        several = sum(len(row["prompt"]) > 1 for row in part)
        longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in part) / count
        assert f"| {lang} | {kind} | {count} | {several} | {longer:.0%} |" in readme
