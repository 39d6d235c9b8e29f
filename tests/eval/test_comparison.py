"""Two judges on the same rows, and best-of-n: by hand, by enumeration, by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from ppomax.eval.comparison import (
    best_of_n,
    best_of_n_kl,
    cluster_bootstrap,
    paired_accuracy,
)


def test_a_paired_difference_by_hand():
    # five rows: both right, first alone, first alone, second alone, both wrong
    found = paired_accuracy([1, 1, 1, 0, 0], [1, 0, 0, 1, 0], "abcde")
    assert found.difference == pytest.approx(1 / 5)
    assert (found.only_first, found.only_second) == (2, 1)
    gap = np.array([0, 1, 1, -1, 0])
    assert found.standard_error == pytest.approx(gap.std(ddof=1) / math.sqrt(5))
    low, high = found.interval
    assert high - low == pytest.approx(2 * 1.959964 * found.standard_error)


@pytest.mark.parametrize(("wins", "losses"), [(9, 2), (30, 41), (5, 5), (1, 0)])
def test_the_p_value_is_mcnemars_exact_one(wins, losses):
    first = [1] * wins + [0] * losses + [1] * 7
    second = [0] * wins + [1] * losses + [1] * 7
    found = paired_accuracy(first, second, range(len(first)))
    assert found.p_value == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)


def test_rows_of_one_prompt_are_not_counted_as_independent():
    right, wrong = [1, 1, 0, 1] * 20, [0, 1, 0, 0] * 20
    alone = paired_accuracy(right, wrong, range(80))
    copies = paired_accuracy(right * 4, wrong * 4, list(range(80)) * 4)
    assert copies.standard_error == pytest.approx(alone.standard_error, rel=0.02)
    assert paired_accuracy([1, 0], [0, 0], "aa").interval is None


def test_no_spread_is_no_proof_where_there_are_few_prompts():
    equal = paired_accuracy([1, 0, 1], [1, 0, 1], "abc")
    unseen = stats.binomtest(0, 3).proportion_ci(0.95, "exact").high
    assert equal.standard_error == 0
    assert equal.interval == pytest.approx((-unseen, unseen))
    better = paired_accuracy([1, 1, 1], [0, 0, 0], "abc")
    assert better.interval == pytest.approx((1 - 2 * unseen, 1))
    copies = paired_accuracy([1] * 30, [0] * 30, [i % 3 for i in range(30)])
    assert copies.interval == pytest.approx(better.interval)


@pytest.mark.parametrize("count", range(2, 12))
def test_where_all_differ_one_way_the_interval_says_what_the_exact_test_says(count):
    for found in (
        paired_accuracy([1] * count, [0] * count, range(count)),
        paired_accuracy([0] * count, [1] * count, range(count)),
    ):
        assert (found.interval.low > 0 or found.interval.high < 0) == (found.p_value < 0.05)


def test_the_bootstrap_agrees_with_the_standard_error_and_sees_clusters():
    values = np.random.default_rng(0).normal(size=400)
    low, high = cluster_bootstrap(values, range(400), seed=1)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    again = cluster_bootstrap(np.tile(values, 3), list(range(400)) * 3, seed=1)
    assert again.high - again.low == pytest.approx(high - low, rel=0.1)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    generator = np.random.default_rng(n)
    proxy, gold = generator.normal(size=(2, 5))
    subsets = itertools.combinations(range(5), n)
    expected = np.mean([gold[max(subset, key=lambda i: proxy[i])] for subset in subsets])
    assert best_of_n(proxy, gold, n) == pytest.approx(expected)


def test_replies_the_proxy_cannot_tell_apart_share_their_places():
    assert best_of_n([1, 1, 1], [0, 3, 6], 2) == pytest.approx(3)
    one, two = best_of_n([1, 1, 0], [5, 9, 0], 2), best_of_n([1, 1, 0], [9, 5, 0], 2)
    assert one == two == pytest.approx(7)
    with pytest.raises(ValueError, match="best of 3 among 2"):
        best_of_n([1, 2], [1, 2], 3)


def test_the_kl_of_best_of_n():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
