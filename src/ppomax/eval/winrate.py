"""Win, tie, lose and how far to trust them. Takes numbers, knows no judge, model or file.

A pair's value is 1 where the candidate won, 0 where it lost, ½ for a tie. Rows on the same prompt
(several questions or annotators) are one cluster: prompts are what was sampled.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ppomax.eval.extras import need
from ppomax.eval.statistics import (
    Floats,
    Interval,
    bootstrap_interval,
    clustered_standard_error,
    wilson_interval,
)

POWER = 0.8
"""Chance to see a difference that is there, as sample sizes are usually planned (Cohen 1988)."""
Z95 = NormalDist().inv_cdf(0.975)
NO_SPREAD = 1e-9
"""A standard error up to this is 0 but for rounding."""
LEVEL = 0.05
"""Of the two-sided test."""
POINTS = (0.05, 0.10)
"""Differences from 50% for which the number of prompts needed is given."""


class WinRate(NamedTuple):
    """Mean value of pairs, with its uncertainty."""

    rate: float
    standard_error: float
    """Clustered by prompt; 0 where every prompt came out alike."""
    interval: Interval
    num_prompts: int


class Detectable(NamedTuple):
    """What the sample could have shown."""

    difference: float
    """Smallest distance from 50% seen with 80% power at this number of prompts."""
    needed: dict[str, int]
    """Prompts needed to see 5 and 10 points (keys `5` and `10`), at this spread of values."""


class LengthControlled(NamedTuple):
    """Win rate between replies of equal length, by a fitted model."""

    rate: float
    interval: Interval
    length_effect: float
    """Log-odds for the longer reply of one standard deviation of the length difference."""
    length_p: float
    """Probability of an effect as large if length did not matter (Wald)."""


def win_rate(values: ArrayLike, clusters: Sequence[object]) -> WinRate:
    """Ties half: mean, standard error clustered by prompt, and a Wilson interval.

    Wilson's interval at the effective number of pairs m(1-m)/SE², which is larger than their number
    where there are ties and smaller where rows of a prompt agree (Kott & Carr 1997, Korn & Graubard
    1998 do so for surveys). Covers 94 to 96% from 30 pairs on where m ± 1.96 SE falls to 88% near
    the ends. Where the standard error says nothing (every prompt alike, or one prompt) the number
    of prompts is taken: all ties of 30 is not proof of equality.
    """
    x = np.asarray(values, dtype=np.float64)
    groups = len(set(clusters))
    mean = float(x.mean())
    error = clustered_standard_error(x, clusters) if groups > 1 else 0.0
    effective = mean * (1 - mean) / error**2 if error > NO_SPREAD else float(groups)
    effective = effective if effective > 0 else float(groups)
    return WinRate(mean, error, wilson_interval(mean * effective, effective), groups)


def cluster_bootstrap(values: ArrayLike, clusters: Sequence[object], *, seed: int) -> Interval:
    """Percentile bootstrap of the win rate: prompts are drawn, with all their rows."""
    _, index = np.unique(np.array([str(name) for name in clusters]), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    columns = np.stack([sums, np.bincount(index)], axis=1)
    return bootstrap_interval(columns, _ratio, seed=seed)


def _ratio(columns: Floats) -> float:
    total = columns.sum(axis=0)
    return float(total[0] / total[1])


def detectable(rate: WinRate) -> Detectable:
    """Minimum detectable difference and the prompts needed, from the spread that was found.

    A t-test of the mean against 50%; where every prompt came out alike the spread is unknown and
    that of a coin without ties, ½, is taken.
    """
    power = need("statsmodels.stats.power", "power analysis").TTestPower()
    spread = rate.standard_error * math.sqrt(rate.num_prompts) or 0.5
    size = _solved(power, nobs=max(2, rate.num_prompts), effect_size=None)
    needed = {
        f"{100 * points:.0f}": math.ceil(_solved(power, nobs=None, effect_size=points / spread))
        for points in POINTS
    }
    return Detectable(min(0.5, size * spread), needed)


def _solved(power: Any, *, nobs: float | None, effect_size: float | None) -> float:  # noqa: ANN401
    if effect_size is not None and effect_size > 2:  # two rows already show it
        return 3.0
    found = power.solve_power(effect_size=effect_size, nobs=nobs, alpha=LEVEL, power=POWER)
    return float(np.asarray(found).reshape(-1)[0])


def length_controlled(
    values: ArrayLike, length_difference: ArrayLike, clusters: Sequence[object]
) -> LengthControlled | None:
    """The win rate had both replies been of one length; None where it cannot be told.

    After Dubois et al. 2024 (2404.04475): logit P(win) = θ + φ tanh(d/s) with d the candidate's
    length minus the baseline's and s its root mean square; the result is σ(θ). Ours besides:
    a term for the sign of d, without which a judge that takes the longer reply however little
    longer it is moves θ; the pairs with a longer and with a shorter candidate weighted alike, and
    log-F(1, 1) priors as one row of weight 1 per coefficient (Greenland & Mansournia 2015), so
    that a judge who looks at nothing but length gives finite estimates around 50%; and a standard
    error clustered by prompt, or the model's own where that is larger.
    """
    y, d = np.asarray(values, dtype=np.float64), np.asarray(length_difference, dtype=np.float64)
    scale = float(np.sqrt((d**2).mean()))
    if len(y) < 3 or not (d > 0).any() or not (d < 0).any() or len(set(clusters)) < 2:
        return None
    columns = np.stack([np.ones_like(y), np.sign(d), np.tanh(d / scale)], axis=1)
    fit = _logistic(
        np.concatenate([columns, np.eye(3)]),
        np.append(y, np.full(3, 0.5)),
        np.append(_balanced(d), np.ones(3)),
        [*clusters, *(("prior", place) for place in range(3))],
    )
    theta, error = float(fit.coefficients[0]), fit.error(np.array([1.0, 0.0, 0.0]))
    longer = np.array([0.0, 1.0, math.tanh(1.0)])
    effect, effect_error = float(longer @ fit.coefficients), fit.error(longer)
    low, high = theta - Z95 * error, theta + Z95 * error
    return LengthControlled(
        rate=_sigmoid(theta),
        interval=Interval(_sigmoid(low), _sigmoid(high)),
        length_effect=effect,
        length_p=math.erfc(abs(effect) / effect_error / math.sqrt(2)),
    )


def _balanced(d: Floats) -> Floats:
    """Weights under which longer and shorter candidates count alike, of mean 1."""
    longer, shorter = d > 0, d < 0
    each = (longer.sum() + shorter.sum()) / 2
    weights = np.ones_like(d)
    weights[longer], weights[shorter] = each / longer.sum(), each / shorter.sum()
    return weights


class _Fit(NamedTuple):
    """A logistic regression and two covariances of its coefficients."""

    coefficients: Floats
    plain: Floats
    clustered: Floats

    def error(self, direction: Floats) -> float:
        """Standard error of a combination of coefficients: the larger of the two."""
        return math.sqrt(max(float(direction @ c @ direction) for c in self[1:]))


def _logistic(x: Floats, y: Floats, weights: Floats, clusters: Sequence[object]) -> _Fit:
    """Newton's method; the clustered covariance is the sandwich of Liang & Zeger 1986.

    As `statsmodels` GLM fits it (a test compares), a hundred times faster for small designs.
    """
    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ beta))
        gradient = x.T @ (weights * (y - p))
        information = (x * (weights * p * (1 - p))[:, None]).T @ x
        step = np.linalg.solve(information, gradient)
        step *= min(1.0, 2.0 / (float(np.abs(step).max()) + 1e-300))  # far from the optimum
        beta = beta + step
        if float(np.abs(step).max()) < 1e-10:
            break
    plain = np.linalg.inv(information)
    names = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    scores = np.zeros((len(names), x.shape[1]))
    np.add.at(scores, [names[name] for name in clusters], x * (weights * (y - p))[:, None])
    meat = len(names) / (len(names) - 1) * scores.T @ scores
    return _Fit(beta, np.asarray(plain, float), np.asarray(plain @ meat @ plain, float))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
