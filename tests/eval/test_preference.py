"""Evaluation of preference pairs: worked examples and properties."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppomax.errors import ModelError
from ppomax.eval.preference import MAX_SUBSETS, OTHERS, accuracy, evaluate_pairs
from ppomax.eval.statistics import wilson_interval
from ppomax.eval.winrate import win_rate


def evaluate(good, bad, good_lengths=None, bad_lengths=None, meta=None, **kwargs):
    n = len(good)
    return evaluate_pairs(
        good,
        bad,
        [5] * n if good_lengths is None else good_lengths,
        [5] * n if bad_lengths is None else bad_lengths,
        [{} for _ in range(n)] if meta is None else meta,
        ids=[f"pair-{i}" for i in range(n)],
        prompts=[[{"role": "user", "content": f"question {i}"}] for i in range(n)],
        chosen=[f"good {i}" for i in range(n)],
        rejected=[f"bad {i}" for i in range(n)],
        **kwargs,
    )


def test_accuracy_counts_a_tie_half():
    found = evaluate([2, 1, 0, 5], [1, 1, 3, 4])["accuracy"]
    assert (found["right"], found["tie"], found["wrong"]) == (2, 1, 1)
    assert found["accuracy"] == 0.625
    assert found["ci95"] == list(win_rate([1, 0.5, 0, 1], range(4)).interval)


def test_pairs_of_one_prompt_are_not_independent():
    difference, prompts = np.array([1.0, 1, -1, 1] * 20), [str(i) for i in range(80)]
    alone = accuracy(difference, prompts)["ci95"]
    assert alone == pytest.approx(wilson_interval(60 * 79 / 80, 79))
    copies = accuracy(np.tile(difference, 6), prompts * 6)["ci95"]
    assert copies == pytest.approx(alone, abs=1e-9)


def test_subsets_are_those_the_rows_name():
    meta = [
        {"lang": "en", "kind": "helpful"},
        {"lang": "en", "kind": "harmless"},
        {"lang": "zh", "kind": "helpful"},
        {"lang": None},
    ]
    rows = evaluate([1, 0, 1, 1], [0, 1, 0, 0], meta=meta)["subsets"]
    found = {(row["column"], row["value"]): (row["n"], row["accuracy"]) for row in rows}
    assert found == {
        ("lang", "en"): (2, 0.5),
        ("lang", "zh"): (1, 1.0),
        ("kind", "helpful"): (2, 1.0),
        ("kind", "harmless"): (1, 0.0),
        ("lang, kind", "en, helpful"): (1, 1.0),
        ("lang, kind", "en, harmless"): (1, 0.0),
        ("lang, kind", "zh, helpful"): (1, 1.0),
    }


def test_a_column_of_many_values_is_cut_and_no_pair_is_lost():
    n = MAX_SUBSETS + 20
    meta = [{"source": f"s{i:03d}"} for i in range(n)]
    rows = evaluate(np.ones(n), np.zeros(n), meta=meta)["subsets"]
    assert len(rows) == MAX_SUBSETS
    assert sum(row["n"] for row in rows) == n
    assert [row["n"] for row in rows if row["value"] == OTHERS] == [21]


def test_length_baselines_are_each_others_mirror():
    found = evaluate([0, 0, 0], [1, 1, 1], [9, 9, 4], [3, 9, 5])["baselines"]
    assert found["longer wins"]["accuracy"] == 0.5
    assert found["shorter wins"]["accuracy"] == 0.5
    assert (found["longer wins"]["right"], found["longer wins"]["tie"]) == (1, 1)


def test_a_model_that_scores_length_is_seen_to():
    good, bad = np.array([10, 4, 7, 3]), np.array([5, 8, 2, 9])
    found = evaluate(good * 0.1, bad * 0.1, good, bad)
    assert found["length"]["score_length_correlation"] == pytest.approx(1)
    assert found["length"]["given_preference_correlation"] == pytest.approx(1)
    assert found["length"]["longer_preferred_by_model"] == 1
    assert found["length"]["longer_preferred_by_people"] == 0.5
    assert found["accuracy"]["accuracy"] == found["baselines"]["longer wins"]["accuracy"]


def test_histogram_holds_every_pair_and_splits_at_zero():
    histogram = evaluate([3, 1, 0, -1], [0, 0, 2, 4])["histogram"]
    counts, edges = np.array(histogram["counts"]), np.array(histogram["edges"])
    assert counts.sum() == 4
    assert np.isclose(edges, 0).any()
    assert counts[edges[:-1] > -1e-9].sum() == 2
    assert histogram["mean"] == pytest.approx((3 + 1 - 2 - 5) / 4)


def test_calibration_reads_a_pair_from_the_models_side():
    # σ(ln 3) = 3/4 for every pair and three of four right: no error at all
    gap = np.log(3.0)
    found = evaluate([gap, gap, gap, 0], [0, 0, 0, gap])["calibration"]
    assert found["ece"] == pytest.approx(0)
    assert found["reliability"] == [
        {
            "n": 4,
            "confidence": pytest.approx(0.75),
            "accuracy": 0.75,
            "ci95": list(wilson_interval(3, 4)),
        }
    ]
    assert found["temperature"] == pytest.approx(1, rel=1e-4)
    assert found["brier"] == pytest.approx((3 * 0.25**2 + 0.75**2) / 4)
    assert found["nll"] == pytest.approx(-(3 * np.log(0.75) + np.log(0.25)) / 4)


def test_equal_scores_are_half_right_with_no_confidence():
    found = evaluate([1, 2], [1, 2])["calibration"]
    (row,) = found["reliability"]
    assert (row["n"], row["confidence"], row["accuracy"]) == (2, 0.5, 0.5)
    assert (found["ece"], found["brier"]) == (0, 0.25)


def test_overconfident_scores_get_a_high_temperature():
    generator = np.random.default_rng(0)
    gap = generator.normal(size=3000)
    right = generator.random(3000) < 1 / (1 + np.exp(-np.abs(gap)))
    difference = 4 * np.where(right, np.abs(gap), -np.abs(gap))
    found = evaluate(difference, np.zeros(3000))["calibration"]
    assert found["temperature"] == pytest.approx(4, rel=0.1)
    assert found["ece"] > found["ece_noise_p95"]
    assert found["nll_at_temperature"] < found["nll"]


def test_worst_pairs_come_worst_first_with_their_texts():
    found = evaluate([0, 5, 1], [4, 1, 2], num_worst=2)["worst"]
    assert [row["id"] for row in found] == ["pair-0", "pair-2"]
    assert found[0] == {
        "id": "pair-0",
        "prompt": [{"role": "user", "content": "question 0"}],
        "chosen": "good 0",
        "rejected": "bad 0",
        "chosen_score": 0,
        "rejected_score": 4,
    }


def test_scores_that_are_not_numbers_are_refused_in_one_line():
    with pytest.raises(ModelError, match=r"1 of 2 scores are not finite.*'pair-1'") as error:
        evaluate([1, float("nan")], [0, 0])
    assert "\n" not in str(error.value)


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="rows"):
        evaluate([1, 2], [0, 0], good_lengths=[3])
    with pytest.raises(ValueError, match="rows"):
        evaluate([], [])


pairs = st.lists(
    st.tuples(st.integers(-40, 40), st.integers(-40, 40), st.integers(1, 9), st.integers(1, 9)),
    min_size=1,
    max_size=30,
)


def flat(value, place=""):
    """Leaves of nested dicts and lists by their path."""
    if not isinstance(value, dict | list):
        return {place: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: leaf for key, part in items for k, leaf in flat(part, f"{place}/{key}").items()}


@pytest.mark.slow
@given(pairs, st.randoms())
def test_order_of_pairs_changes_no_number(rows, random):
    shuffled = random.sample(rows, len(rows))
    one, other = (
        evaluate(*(np.array(column, dtype=float) for column in zip(*r, strict=True)))
        for r in (rows, shuffled)
    )
    for key in ("accuracy", "subsets", "baselines"):
        first, second = flat(one[key]), flat(other[key])
        assert list(first) == list(second)
        for place, value in first.items():  # sums over prompts round by their order
            same = pytest.approx(value) if isinstance(value, float) else value
            assert second[place] == same, place
    assert one["histogram"]["counts"] == other["histogram"]["counts"]
    assert one["calibration"]["ece"] == pytest.approx(other["calibration"]["ece"])


@pytest.mark.slow
@given(pairs)
def test_any_result_is_plain_json_and_swapping_answers_mirrors_accuracy(rows):
    good, bad, good_lengths, bad_lengths = zip(*rows, strict=True)
    found = evaluate(good, bad, good_lengths, bad_lengths)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    mirrored = evaluate(bad, good, bad_lengths, good_lengths)
    total = found["accuracy"]["accuracy"] + mirrored["accuracy"]["accuracy"]
    assert total == pytest.approx(1)


def test_same_seed_same_result():
    good, bad = np.random.default_rng(0).normal(size=(2, 80))
    assert evaluate(good, bad, seed=4) == evaluate(good, bad, seed=4)
