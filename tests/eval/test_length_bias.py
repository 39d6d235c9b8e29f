"""Length in a reward model's choices: what people's taste explains and what it does not."""

import numpy as np
import pytest

from ppomax.eval.length_bias import length_bias


def test_a_model_of_the_preference_alone_adds_no_length():
    generator = np.random.default_rng(0)
    longer = generator.normal(size=4000)
    length = 50 + 10 * longer  # people prefer the longer answer by chance more often
    good, bad = np.where(longer > -0.5, length + 20, length), length
    noise = generator.normal(size=(2, 4000)) * 0.1
    found = length_bias(1 + noise[0], noise[1], good, bad)
    assert found["preference_correlation"] > 0.7
    assert found["within_pair_correlation"] > 0.7, "people's own taste is in it"
    assert abs(found["given_preference_correlation"]) < 0.06, "and out of it here"


def test_a_model_of_length_alone_is_right_where_people_like_length():
    good, bad = np.array([9.0, 8, 7, 2, 5]), np.array([3.0, 4, 1, 6, 5])
    found = length_bias(good, bad, good, bad)
    assert found["within_pair_correlation"] == pytest.approx(1)
    assert found["given_preference_correlation"] == pytest.approx(1)
    assert found["longer_preferred_by_model"] == 1
    assert found["longer_preferred_by_people"] == 0.75
    rates = {row["longer"]: (row["n"], row["accuracy"]) for row in found["when"]}
    expected = {"preferred answer": (3, 1.0), "other answer": (1, 0.0), "neither": (1, 0.5)}
    assert rates == expected


def test_equal_lengths_say_nothing():
    same = np.full(3, 4.0)
    found = length_bias(np.array([1.0, 2, 3]), np.zeros(3), same, same)
    assert found["within_pair_correlation"] is found["given_preference_correlation"] is None
    assert found["longer_preferred_by_model"] is None
    assert [row["longer"] for row in found["when"]] == ["neither"]


def test_the_sides_of_a_pair_do_not_matter_to_what_sees_both():
    generator = np.random.default_rng(1)
    good, bad, long, short = generator.normal(size=(4, 50)) + 9
    one, other = length_bias(good, bad, long, short), length_bias(bad, good, short, long)
    assert one["within_pair_correlation"] == pytest.approx(other["within_pair_correlation"])
    assert one["preference_correlation"] == pytest.approx(-other["preference_correlation"])
