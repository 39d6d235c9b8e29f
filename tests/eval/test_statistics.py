"""Statistics of an evaluation against scipy, worked examples and properties."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.eval.statistics import (
    WinTieLose,
    bootstrap_interval,
    brier,
    clustered_standard_error,
    ece,
    fit_temperature,
    nll_binary,
    paired_difference,
    pearson,
    regularized_incomplete_beta,
    reliability_table,
    t_quantile,
    wilson_interval,
    win_tie_lose,
)

finite = st.floats(-100, 100, allow_nan=False, width=32)


def test_wilson_interval_of_eight_in_ten_is_the_textbook_one():
    # z = 1.96, p = 0.8: (0.8 + 0.192 ± 1.96 √(0.016 + 0.0096)) / 1.384
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)


@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_interval_agrees_with_scipy(n, share, level):
    successes = round(share * n)
    expected = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    low, high = wilson_interval(successes, n, level)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)
    assert low <= successes / n <= high


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5), (math.nan, 5)])
def test_wilson_interval_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="wilson_interval"):
        wilson_interval(successes, n)


@given(st.floats(0.05, 5000), st.floats(0.05, 5000), st.floats(0, 1))
def test_incomplete_beta_agrees_with_scipy(a, b, x):
    expected = scipy.special.betainc(a, b, x)
    assert regularized_incomplete_beta(a, b, x) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.floats(0.001, 0.999), st.floats(1, 20000))
def test_t_quantile_agrees_with_scipy(probability, degrees):
    expected = scipy.stats.t.ppf(probability, degrees)
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_t_quantile_of_the_printed_table():
    assert t_quantile(0.975, 1) == pytest.approx(12.7062, abs=1e-4)
    assert t_quantile(0.975, 9) == pytest.approx(2.2622, abs=1e-4)
    assert t_quantile(0.025, 9) == pytest.approx(-t_quantile(0.975, 9), rel=1e-14)
    assert t_quantile(0.5, 3) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("probability", "degrees"), [(0, 3), (1, 3), (0.5, 0)])
def test_t_quantile_refuses_what_has_none(probability, degrees):
    with pytest.raises(ValueError, match="t_quantile"):
        t_quantile(probability, degrees)


def test_paired_difference_by_hand():
    # differences 1, 2, 3: mean 2, s = 1, se = 1/√3, t(2) = 4.3027
    found = paired_difference([2, 4, 6], [1, 2, 3])
    assert found.mean == pytest.approx(2)
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))
    assert found.interval[0] == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4)
    assert found.num_pairs == 3


@pytest.mark.slow
@given(st.lists(st.tuples(finite, finite), min_size=3, max_size=40))
def test_paired_difference_agrees_with_scipy(pairs):
    a, b = np.array(pairs, dtype=float).T
    found = paired_difference(a, b, level=0.9)
    if np.ptp(a - b) < 1e-6:
        return
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.9)
    assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-7, abs=1e-9)
    mirrored = paired_difference(b, a, level=0.9)
    assert mirrored.mean == -found.mean


def test_one_pair_has_a_mean_and_no_interval():
    found = paired_difference([1.0], [0.25])
    assert (found.mean, found.standard_error, found.interval) == (0.75, None, None)


def test_pairs_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        paired_difference([1, 2], [1])
    with pytest.raises(ValueError, match="no values"):
        paired_difference([], [])


@given(st.lists(finite, min_size=2, max_size=30))
def test_clusters_of_one_row_give_the_plain_standard_error(values):
    found = clustered_standard_error(values, range(len(values)))
    assert found == pytest.approx(scipy.stats.sem(np.array(values, dtype=float)), abs=1e-9)


def test_copies_of_a_row_in_one_cluster_add_no_certainty():
    values = np.array([0.0, 1.0, 3.0, 4.5])
    alone = clustered_standard_error(values, "abcd")
    copied = clustered_standard_error(np.repeat(values, 5), list("aaaaabbbbbcccccddddd"))
    assert copied == pytest.approx(alone)


def test_clustered_error_by_hand():
    # mean 2; residuals -2 -1 | 1 2; sums -3, 3; √(2/1 · 18) / 4 = 1.5
    assert clustered_standard_error([0, 1, 3, 4], ["a", "a", "b", "b"]) == pytest.approx(1.5)


def test_one_cluster_is_refused():
    with pytest.raises(ValueError, match="two clusters"):
        clustered_standard_error([1, 2], ["a", "a"])
    with pytest.raises(ValueError, match="cluster names"):
        clustered_standard_error([1, 2], ["a"])


def test_bootstrap_of_the_mean_agrees_with_its_t_interval_and_repeats():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(values, lambda x: float(x.mean()), seed=1)
    expected = paired_difference(values, np.zeros(400)).interval
    assert (low, high) == pytest.approx(expected, abs=0.01)
    assert bootstrap_interval(values, np.mean, seed=1) == (low, high)
    assert bootstrap_interval(values, np.mean, seed=2) != (low, high)


def test_bootstrap_draws_whole_rows():
    rows = np.column_stack([np.arange(50.0), np.arange(50.0)])
    found = bootstrap_interval(rows, lambda x: float(np.abs(x[:, 0] - x[:, 1]).max()), seed=0)
    assert found == (0.0, 0.0)


def test_win_tie_lose_by_hand():
    found = win_tie_lose([1, 2, 3, 4], [0, 2.05, 5, 4], tie=0.1)
    assert found == WinTieLose(win=1, tie=2, lose=1)
    assert found.win_rate == 0.5
    assert found.interval() == wilson_interval(2, 4)


@pytest.mark.slow
@given(st.lists(st.tuples(finite, finite), min_size=1), st.floats(0, 5))
def test_swapping_sides_swaps_wins_and_losses(pairs, tie):
    a, b = np.array(pairs, dtype=float).T
    one, other = win_tie_lose(a, b, tie=tie), win_tie_lose(b, a, tie=tie)
    assert one == WinTieLose(other.lose, other.tie, other.win)
    assert sum(one) == len(pairs)
    assert one.win_rate + other.win_rate == pytest.approx(1)


@given(st.lists(st.tuples(finite, finite), min_size=3, max_size=30))
def test_pearson_agrees_with_scipy(pairs):
    a, b = np.array(pairs, dtype=float).T
    if np.ptp(a) < 1e-3 or np.ptp(b) < 1e-3:
        return
    assert pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-6)


def test_pearson_of_a_constant_is_none():
    assert pearson([1, 1, 1], [1, 2, 3]) is None
    assert pearson([1], [2]) is None


def test_reliability_table_by_hand():
    table = reliability_table([0.9, 0.6, 0.8, 0.5], [1, 0, 1, 1], bins=2)
    assert [(row.num, row.probability, row.frequency) for row in table] == [
        (2, pytest.approx(0.55), 0.5),
        (2, pytest.approx(0.85), 1.0),
    ]
    assert table[0].interval == wilson_interval(1, 2)


def test_equal_probabilities_share_the_bin_of_their_mean_rank():
    table = reliability_table([0.1, 0.2, 0.2, 0.2, 0.2, 0.2], [0, 1, 0, 1, 1, 1], bins=2)
    assert [(row.num, row.frequency) for row in table] == [(1, 0), (5, 0.8)]


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.randoms())
def test_order_of_rows_changes_no_bin(rows, random):
    rounded = [(round(p, 1), float(y)) for p, y in rows]
    shuffled = random.sample(rounded, len(rounded))
    one, other = (reliability_table(*zip(*r, strict=True)) for r in (rounded, shuffled))
    assert [(row.num, row.frequency) for row in one] == [(row.num, row.frequency) for row in other]
    assert sum(row.num for row in one) == len(rows)


def test_ece_by_hand():
    # bins {0.5, 0.6}: |0.5 - 0.55|; {0.8, 0.9}: |1 - 0.85|; mean 0.1
    assert ece([0.9, 0.6, 0.8, 0.5], [1, 0, 1, 1], seed=0, bins=2).ece == pytest.approx(0.1)


def test_calibrated_predictions_stay_under_the_noise_floor_and_overconfident_ones_do_not():
    generator = np.random.default_rng(0)
    truth = generator.uniform(0.5, 1, size=2000)
    outcomes = generator.random(2000) < truth
    honest = ece(truth, outcomes, seed=0)
    boastful = ece(np.sqrt(truth), outcomes, seed=0)
    assert honest.ece < honest.noise_p95
    assert boastful.ece > 2 * boastful.noise_p95
    assert 0 < honest.noise_mean < honest.noise_p95
    assert ece(truth, outcomes, seed=0) == honest


def test_noise_floor_is_passed_by_chance_in_about_one_of_twenty():
    generator = np.random.default_rng(3)
    above = 0
    for trial in range(200):
        p = generator.uniform(size=100)
        found = ece(p, generator.random(100) < p, seed=trial, simulations=100)
        above += found.ece > found.noise_p95
    assert 2 <= above <= 22  # Binomial(200, 0.05): mean 10, standard deviation 3


def test_brier_and_nll_by_hand():
    assert brier([0.5, 0.5], [1, 0]) == 0.25
    assert brier([1.0, 0.2], [1, 0]) == pytest.approx(0.02)
    assert nll_binary([0.0, 0.0], [1, 0]) == pytest.approx(math.log(2))
    assert nll_binary([1000.0, -1000.0], [1, 0]) == 0
    assert nll_binary([-1000.0], [1]) == 1000


def test_temperature_recovers_the_scale_the_logits_were_blown_up_by():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=20000) * 2
    outcomes = generator.random(20000) < 1 / (1 + np.exp(-logits))
    assert fit_temperature(3 * logits, outcomes) == pytest.approx(3, rel=0.05)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(-8, 8), st.booleans()), min_size=2, max_size=30))
def test_no_other_temperature_is_better(rows):
    logits, outcomes = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    best = nll_binary(logits / fit_temperature(logits, outcomes), outcomes)
    grid = [nll_binary(logits / t, outcomes) for t in np.geomspace(0.01, 100, 200)]
    assert best <= min(grid) + 1e-9


def test_temperature_without_a_minimum_is_a_bound():
    assert fit_temperature([1, 2], [1, 1]) == pytest.approx(0.01)
    assert fit_temperature([-1, -2], [1, 1]) == pytest.approx(100)
