"""Statistics of an evaluation: intervals, tests, calibration. Pure functions of numpy arrays.

No file, model or random state of its own: what is random takes a seed. Nothing here needs scipy.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """The mean of a - b over pairs, with its uncertainty."""

    mean: float
    standard_error: float | None
    """None for a single pair: nothing is known of the spread."""
    interval: Interval | None
    num_pairs: int


class WinTieLose(NamedTuple):
    """Counts of pairs won, tied and lost by the first side."""

    win: int
    tie: int
    lose: int

    @property
    def win_rate(self) -> float:
        """Share of pairs won, a tie counted half."""
        return (self.win + 0.5 * self.tie) / (self.win + self.tie + self.lose)

    def interval(self, level: float = 0.95) -> Interval:
        """Wilson interval of `win_rate`; with ties it is wider than it need be."""
        return wilson_interval(
            self.win + 0.5 * self.tie, self.win + self.tie + self.lose, level=level
        )


class ReliabilityBin(NamedTuple):
    """Predictions of about the same probability, and how often they came true."""

    num: int
    probability: float
    """Mean predicted probability."""
    frequency: float
    """Mean outcome."""
    interval: Interval
    """Wilson 95% interval of `frequency`."""


class Calibration(NamedTuple):
    """Expected calibration error beside what perfect calibration would show on as few rows."""

    ece: float
    noise_mean: float
    noise_p95: float
    """An `ece` above this is not explained by the number of rows (one-sided 5% test)."""


def wilson_interval(successes: float, n: float, level: float = 0.95) -> Interval:
    """Score interval of a proportion.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference":

        (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)

    Args:
        successes: may be fractional (a tie counted half).
        n: trials, > 0.
        level: coverage, in (0, 1).

    Raises:
        ValueError: `n` is not positive or `successes` is outside [0, n].
    """
    if not n > 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval: {successes} successes of {n} trials")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = successes / n
    center = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else max(0.0, (center - half) / scale)
    high = 1.0 if successes == n else min(1.0, (center + half) / scale)
    return Interval(low, high)


def regularized_incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), the cumulative distribution of Beta(a, b) at x.

    Press et al., Numerical Recipes, section 6.4: the continued fraction by Lentz's method, on the
    side of the mean where it converges fast. Relative error about 1e-13.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - regularized_incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front + a * math.log(x) + b * math.log1p(-x)) / a
    return front * _beta_fraction(a, b, x)


def _beta_fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        step = 1.0
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d, tiny)
            c = _away_from_zero(1 + term / c, tiny)
            step = c * d
            value *= step
        if abs(step - 1) < 1e-15:
            break
    return value


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t: bisection on its distribution function.

    P(T > t) = I_w(ν/2, 1/2) / 2 with w = ν / (ν + t²) for t > 0 (Abramowitz & Stegun 26.5.27).

    Raises:
        ValueError: `probability` outside (0, 1) or `degrees` not positive.
    """
    if not 0 < probability < 1 or not degrees > 0:
        raise ValueError(f"t_quantile: probability {probability}, degrees of freedom {degrees}")
    tail = min(probability, 1 - probability)
    low, high = 0.0, 1.0
    while _t_tail(high, degrees) > tail:
        low, high = high, high * 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _t_tail(middle, degrees) > tail else (low, middle)
    return math.copysign((low + high) / 2, probability - 0.5)


def _t_tail(t: float, degrees: float) -> float:
    return regularized_incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t)) / 2


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> PairedDifference:
    """Mean of a - b with the paired t-interval (Student 1908): mean ± t(n-1) · s / √n.

    Raises:
        ValueError: no pairs, or lengths differ.
    """
    first, second = _same_length(a, b)
    difference = first - second
    num, mean = len(difference), float(difference.mean())
    if num == 1:
        return PairedDifference(mean, None, None, 1)
    error = float(difference.std(ddof=1)) / math.sqrt(num)
    half = t_quantile(0.5 + level / 2, num - 1) * error
    return PairedDifference(mean, error, Interval(mean - half, mean + half), num)


def clustered_standard_error(values: ArrayLike, clusters: Sequence[object]) -> float:
    """Standard error of the mean when rows come in groups (several replies to one prompt).

    Liang & Zeger 1986; Miller 2024 (2411.00640), section 2.2, with the usual G / (G - 1):

        √( G/(G-1) · Σ_g (Σ_{i in g} (x_i - mean))² ) / n

    With one row per cluster it is s / √n.

    Raises:
        ValueError: no rows, lengths differ, or fewer than two clusters.
    """
    x = _filled(values)
    if len(clusters) != len(x):
        raise ValueError(f"{len(x)} values but {len(clusters)} cluster names")
    sums: dict[object, float] = {}
    for name, residual in zip(clusters, x - x.mean(), strict=True):
        sums[name] = sums.get(name, 0.0) + float(residual)
    groups = len(sums)
    if groups < 2:
        raise ValueError("clustered_standard_error: needs two clusters or more, found 1")
    return math.sqrt(groups / (groups - 1) * sum(s * s for s in sums.values())) / len(x)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[Floats], float],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap of a statistic of rows (Efron & Tibshirani 1993, section 13.3).

    `values` is [n] or [n, columns]; whole rows are drawn. Same seed, same interval.
    """
    x = _filled(values)
    generator = np.random.default_rng(seed)
    found = [statistic(x[generator.integers(len(x), size=len(x))]) for _ in range(resamples)]
    low, high = np.quantile(found, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(low), float(high))


def win_tie_lose(a: ArrayLike, b: ArrayLike, *, tie: float = 0.0) -> WinTieLose:
    """How often a beats b; a difference of at most `tie` is a tie."""
    first, second = _same_length(a, b)
    difference = first - second
    win, lose = int((difference > tie).sum()), int((difference < -tie).sum())
    return WinTieLose(win, len(difference) - win - lose, lose)


def sign_test_p(wins: int, losses: int) -> float:
    """Two-sided exact sign test: probability of a split at least as uneven from a fair coin.

    Ties are left out (Dixon & Mood 1946).
    """
    n, k = wins + losses, min(wins, losses)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return float(min(1.0, 2 * tail / (1 << n)))


def pearson(a: ArrayLike, b: ArrayLike) -> float | None:
    """Pearson's correlation; None where one side does not vary or there is one row."""
    first, second = _same_length(a, b)
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(first @ first)) * math.sqrt(float(second @ second))
    return float(np.clip(first @ second / scale, -1, 1)) if scale > 0 else None


def reliability_table(
    probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int = 10
) -> list[ReliabilityBin]:
    """Predicted probability against observed frequency in bins of about equal mass.

    Rows of equal probability share a bin (that of their mean rank), so the order of the rows
    does not matter. Empty bins are left out. Outcomes are in [0, 1], ½ for a tie.
    """
    p, y = _same_length(probabilities, outcomes)
    bin_of = _equal_mass_bins(p, bins)
    table = []
    for index in np.unique(bin_of):
        inside = bin_of == index
        num, hits = int(inside.sum()), float(y[inside].sum())
        mean = float(p[inside].mean())
        table.append(ReliabilityBin(num, mean, hits / num, wilson_interval(hits, num)))
    return table


def ece(
    probabilities: ArrayLike,
    outcomes: ArrayLike,
    *,
    seed: int,
    bins: int = 10,
    simulations: int = 1000,
) -> Calibration:
    """Expected calibration error over equal-mass bins, with its noise floor.

    Naeini et al. 2015; Nguyen & O'Connor 2015 (equal mass): Σ_b n_b/n · |frequency - probability|.
    ECE is biased upwards on few rows, so the floor is the ECE of outcomes drawn from the model's
    own probabilities (consistency resampling, Bröcker & Smith 2007).
    """
    p, y = _same_length(probabilities, outcomes)
    bin_of = _equal_mass_bins(p, bins)
    generator = np.random.default_rng(seed)
    drawn = [
        _ece((generator.random(len(p)) < p).astype(np.float64), p, bin_of)
        for _ in range(simulations)
    ]
    noise = float(np.mean(drawn)), float(np.quantile(drawn, 0.95))
    return Calibration(_ece(y, p, bin_of), *noise)


def _ece(outcomes: Floats, probabilities: Floats, bin_of: NDArray[np.intp]) -> float:
    return float(np.abs(np.bincount(bin_of, weights=outcomes - probabilities)).sum()) / len(bin_of)


def _equal_mass_bins(p: Floats, bins: int) -> NDArray[np.intp]:
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - counts / 2
    return (mean_rank * bins / len(p)).astype(np.intp)[inverse]


def brier(probabilities: ArrayLike, outcomes: ArrayLike) -> float:
    """Mean squared error of probabilities (Brier 1950); ¼ for an undecided coin."""
    p, y = _same_length(probabilities, outcomes)
    return float(((p - y) ** 2).mean())


def nll_binary(logits: ArrayLike, outcomes: ArrayLike) -> float:
    """Mean negative log-likelihood in nats of outcomes under σ(logits): log(1 + eˣ) - y·x."""
    x, y = _same_length(logits, outcomes)
    return float((np.logaddexp(0.0, x) - y * x).mean())


def fit_temperature(
    logits: ArrayLike, outcomes: ArrayLike, *, low: float = 0.01, high: float = 100.0
) -> float:
    """The T in [low, high] under which σ(logits / T) has the least NLL.

    Guo et al. 2017 (1706.04599), section 4.2, for one logit. Golden-section search over log T,
    where the NLL has one minimum (it is convex in 1/T). T > 1: the model is too sure of itself.
    A bound is returned where the NLL has no minimum inside (every answer right, or none).
    """
    x, y = _same_length(logits, outcomes)
    shrink = (math.sqrt(5) - 1) / 2
    left, right = math.log(low), math.log(high)

    def loss(log_t: float) -> float:
        return nll_binary(x / math.exp(log_t), y)

    inner, outer = right - shrink * (right - left), left + shrink * (right - left)
    at_inner, at_outer = loss(inner), loss(outer)
    while right - left > 1e-7:
        if at_inner <= at_outer:
            right, outer, at_outer = outer, inner, at_inner
            inner = right - shrink * (right - left)
            at_inner = loss(inner)
        else:
            left, inner, at_inner = inner, outer, at_outer
            outer = left + shrink * (right - left)
            at_outer = loss(outer)
    middle = (left + right) / 2
    best = min((math.log(low), middle, math.log(high)), key=loss)
    return math.exp(best)


def _filled(values: ArrayLike) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        raise ValueError("no values")
    return x


def _same_length(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    first, second = _filled(a), _filled(b)
    if first.shape != second.shape:
        raise ValueError(f"shapes differ: {first.shape} and {second.shape}")
    return first, second
