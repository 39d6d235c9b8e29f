"""Agreement of raters: worked examples and limiting cases."""

import pytest

from ppomax.eval.agreement import agreement, krippendorff_alpha, majority, two_raters


def ratings(text):
    """Letters in order as verdicts on items 0, 1, ...: `-` is a gap, `=` a tie."""
    sides = {"a": "a", "b": "b", "=": "tie"}
    return {str(i): sides[letter] for i, letter in enumerate(text) if letter != "-"}


def test_two_raters_by_hand():
    # 8 items: equal on aa, aa, bb, ==, aa; apart on ab, =a, b=
    found = two_raters(ratings("aab=ab=a"[:6] + "=b"), ratings("aab=aa" + "a="))
    assert found["n"] == 8
    assert found["raw"] == pytest.approx(5 / 8)
    assert found["n_without_ties"] == 5
    assert found["raw_without_ties"] == pytest.approx(4 / 5)
    # margins: first a 3, b 3, tie 2; second a 5, b 1, tie 2: chance (15 + 3 + 4) / 64
    chance = 22 / 64
    assert found["kappa"] == pytest.approx((5 / 8 - chance) / (1 - chance))


def test_only_items_that_both_rated_count():
    found = two_raters(ratings("ab-="), ratings("-ba="))
    assert (found["n"], found["raw"]) == (2, 1.0)
    assert two_raters(ratings("a-"), ratings("-b")) == {
        "n": 0,
        "raw": None,
        "n_without_ties": 0,
        "raw_without_ties": None,
        "kappa": None,
    }


def test_agreement_beyond_chance_is_not_defined_for_one_answer_throughout():
    assert two_raters(ratings("aaa"), ratings("aaa"))["kappa"] is None
    assert krippendorff_alpha([ratings("aaa"), ratings("aaa")]) is None


def test_alpha_by_hand():
    # Four items, two raters: aa, bb, ab, ab. Observed disagreement 2/4. Values: a 4, b 4 of 8;
    # expected 2 * 4 * 4 / (8 * 7) = 32/56. alpha = 1 - (1/2) / (4/7)
    assert krippendorff_alpha([ratings("abaa"), ratings("abbb")]) == pytest.approx(1 - 0.5 * 7 / 4)
    assert krippendorff_alpha([ratings("ab="), ratings("ab=")]) == pytest.approx(1.0)


def test_each_rater_stands_against_the_majority_of_the_others():
    raters = {"x": ratings("aabb"), "y": ratings("aabb"), "odd": ratings("bbaa")}
    found = {row["rater"]: row for row in agreement(raters)["against_others"]}
    assert found["odd"]["raw"] == 0.0
    assert found["x"]["raw"] == 0.0  # the others are split, so no majority: ties throughout
    assert found["x"]["n_without_ties"] == 0


@pytest.mark.parametrize(
    ("votes", "side"),
    [
        (["a"], "a"),
        (["a", "b"], "tie"),
        (["a", "a", "b"], "a"),
        (["a", "tie", "tie"], "tie"),
        (["b", "tie"], "b"),
        ([], "tie"),
    ],
)
def test_the_majority_is_the_side_with_more_votes_unless_ties_have_the_most(votes, side):
    assert majority(votes) == side
