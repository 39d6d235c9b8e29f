"""Win rates: intervals that cover, tests that are exact, length held fixed."""

import math

import numpy as np
import pytest
import statsmodels.api as sm

from ppomax.eval import winrate
from ppomax.eval.statistics import sign_test_p, wilson_interval
from ppomax.eval.winrate import (
    cluster_bootstrap,
    detectable,
    length_controlled,
    win_rate,
)

SPLITS = [(0.5, 0.0, 0.5), (0.44, 0.26, 0.3), (0.62, 0.33, 0.05)]
"""Win, tie, lose: a coin, and two of figure 10."""


@pytest.mark.slow
@pytest.mark.parametrize("n", [30, 100, 300])
@pytest.mark.parametrize("split", SPLITS)
def test_intervals_of_the_win_rate_cover_93_to_97_percent(n, split):
    generator = np.random.default_rng(n)
    truth = split[0] + split[1] / 2
    drawn = generator.choice([1.0, 0.5, 0.0], size=(2500, n), p=split)
    hits = [low <= truth <= high for low, high in (win_rate(x, range(n)).interval for x in drawn)]
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [30, 100, 300])
def test_intervals_cover_where_the_rows_of_a_prompt_agree(n):
    """Three rows a prompt, of which two thirds repeat the first: rows alone would be too sure."""
    generator = np.random.default_rng(n)
    names = np.repeat(np.arange(n), 3)
    covered = naive = 0
    for _ in range(2500):
        rows = generator.choice([1.0, 0.5, 0.0], size=(n, 3), p=(0.45, 0.25, 0.3))
        same = generator.random((n, 3)) < 2 / 3
        values = np.where(same, rows[:, :1], rows).reshape(-1)
        low, high = win_rate(values, names.tolist()).interval
        covered += low <= 0.575 <= high
        low, high = win_rate(values, range(3 * n)).interval
        naive += low <= 0.575 <= high
    assert 0.93 <= covered / 2500 <= 0.97
    assert naive / 2500 < 0.93


@pytest.mark.slow
@pytest.mark.parametrize("n", [30, 100, 300])
def test_wilson_intervals_of_win_tie_and_lose_cover_93_to_97_percent(n):
    """Over shares from 5 to 95%; at one share coverage swings with n, as counts are whole."""
    generator = np.random.default_rng(n)
    shares = generator.uniform(0.05, 0.95, 4000)
    counts = generator.binomial(n, shares)
    intervals = [wilson_interval(count, n) for count in counts]
    hits = [low <= p <= high for p, (low, high) in zip(shares, intervals, strict=True)]
    assert 0.93 <= np.mean(hits) <= 0.97


def test_the_interval_is_wilsons_where_nothing_ties_and_prompts_differ():
    values = [1.0] * 30 + [0.0] * 20
    found = win_rate(values, range(50))
    assert found.rate == 0.6
    assert found.interval == pytest.approx(wilson_interval(30 * 49 / 50, 50 * 49 / 50))


def test_all_ties_are_no_proof_of_equality():
    found = win_rate([0.5] * 30, range(30))
    assert (found.rate, found.standard_error) == (0.5, 0.0)
    assert found.interval == pytest.approx(wilson_interval(15, 30))


def test_rounding_is_no_spread():
    values = [0.1 + 0.2, 0.3] * 15  # differ in the last bit
    found = win_rate(values, range(30))
    assert 0 < found.standard_error < 1e-9
    assert found.interval == pytest.approx(wilson_interval(9, 30))


def test_the_standard_error_is_that_of_a_regression_with_clusters():
    generator = np.random.default_rng(0)
    values, names = generator.choice([0, 0.5, 1], 60), generator.integers(0, 15, 60)
    fit = sm.OLS(values, np.ones(60)).fit(
        cov_type="cluster", cov_kwds={"groups": names, "use_correction": False}
    )
    groups = len(set(names.tolist()))
    expected = fit.bse[0] * math.sqrt(groups / (groups - 1))
    assert win_rate(values, names.tolist()).standard_error == pytest.approx(expected)


def test_the_sign_test_counts_the_tails_of_a_fair_coin():
    tails = sum(math.comb(10, k) for k in (0, 1, 2)) * 2 / 2**10
    assert sign_test_p(8, 2) == pytest.approx(tails)
    assert sign_test_p(0, 0) == 1.0


def test_the_bootstrap_draws_prompts_not_rows():
    values = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0] * 10
    prompts = [row // 3 for row in range(60)]
    rows = cluster_bootstrap(values, range(60), seed=0)
    clusters = cluster_bootstrap(values, prompts, seed=0)
    assert clusters.high - clusters.low > 1.4 * (rows.high - rows.low)
    assert cluster_bootstrap(values, prompts, seed=0) == clusters


def test_what_could_be_seen_is_seen_with_80_percent_power():
    generator = np.random.default_rng(0)
    pilot = win_rate(generator.choice([1.0, 0.5, 0.0], 200, p=(0.375, 0.25, 0.375)), range(200))
    edge = detectable(pilot).difference
    hits = 0
    for _ in range(1000):
        p = (0.375 + edge, 0.25, 0.375 - edge)
        values = generator.choice([1.0, 0.5, 0.0], 200, p=p)
        low, high = win_rate(values, range(200)).interval
        hits += not low <= 0.5 <= high
    assert 0.75 <= hits / 1000 <= 0.86
    needed = detectable(pilot).needed
    spread = pilot.standard_error * math.sqrt(200)
    normal = ((1.96 + 0.8416) * spread / 0.05) ** 2
    assert needed["5"] == pytest.approx(normal, rel=0.01, abs=3)
    assert needed["10"] == pytest.approx(normal / 4, rel=0.03, abs=3)


def test_the_logistic_fit_is_that_of_statsmodels():
    generator = np.random.default_rng(1)
    x = np.stack([np.ones(80), generator.normal(size=80)], axis=1)
    y, w = generator.choice([0, 0.5, 1], 80), generator.uniform(0.5, 2, 80)
    names = generator.integers(0, 20, 80)
    fit = winrate._logistic(x, y, w, names.tolist())
    model = sm.GLM(y, x, family=sm.families.Binomial(), var_weights=w)
    assert fit.coefficients == pytest.approx(model.fit().params, rel=1e-6)
    assert fit.plain == pytest.approx(np.asarray(model.fit().cov_params()), rel=1e-5)
    robust = model.fit(cov_type="cluster", cov_kwds={"groups": names, "use_correction": False})
    groups = len(set(names.tolist()))
    expected = np.asarray(robust.cov_params()) * groups / (groups - 1)
    assert fit.clustered == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("judge", ["always", "often", "by how much"])
def test_a_judge_of_length_is_within_2_points_of_half_at_equal_length(judge):
    """The candidate is longer in 80% of pairs, and no better."""
    generator = np.random.default_rng(0)
    rates = []
    for _ in range(200):
        d = generator.normal(0.84, 1, 300) * 200
        p = {"always": d > 0, "often": np.where(d > 0, 0.8, 0.2)}.get(judge)
        p = 1 / (1 + np.exp(-1.5 * d / 200)) if p is None else p
        found = length_controlled((generator.random(300) < p).astype(float), d, range(300))
        assert found.length_p < 0.05
        rates.append(found.rate)
    assert abs(np.mean(rates) - 0.5) < 0.02


def test_length_control_keeps_a_difference_that_is_there():
    generator = np.random.default_rng(0)
    d = generator.normal(0.84, 1, (200, 300))
    p = 1 / (1 + np.exp(-0.5 - 1.5 * d))
    drawn = (generator.random(d.shape) < p).astype(float)
    found = [length_controlled(y, x, range(300)) for y, x in zip(drawn, d, strict=True)]
    truth = 1 / (1 + math.exp(-0.5))
    assert abs(np.mean([f.rate for f in found]) - truth) < 0.02
    assert np.mean([f.interval[0] <= truth <= f.interval[1] for f in found]) > 0.9


def test_length_cannot_be_held_fixed_where_one_side_is_always_longer():
    assert length_controlled([1, 0, 1, 0], [5, 5, 3, 1], range(4)) is None
