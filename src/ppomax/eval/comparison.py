"""Two judges on the same rows, and what choosing by one is worth to the other. No model here."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ppomax.eval.statistics import (
    Floats,
    Interval,
    clustered_standard_error,
    sign_test_p,
)
from ppomax.eval.winrate import NO_SPREAD


class PairedAccuracy(NamedTuple):
    """Accuracy of one judge minus another's on the same rows."""

    difference: float
    standard_error: float | None
    """Clustered by prompt; None with fewer than two prompts."""
    interval: Interval | None
    """95%, from the standard error; where that is 0, an exact one."""
    p_value: float
    """McNemar's exact test: of the rows on which they differ, is either right more often?"""
    only_first: int
    """Rows that the first alone has right (or less wrong, where a tie counts half)."""
    only_second: int
    num: int


def paired_accuracy(
    first: ArrayLike, second: ArrayLike, clusters: Sequence[object]
) -> PairedAccuracy:
    """How much more often the first is right.

    McNemar 1947, as the exact sign test on discordant rows; the standard error lets rows of one
    prompt depend on each other (Miller 2024, 2411.00640, sections 2.2 and 4.2).

    Args:
        first, second: 1 where the judge is right, 0 where wrong, 0.5 where it cannot tell.
        clusters: for each row, what it shares with others (its prompt).
    """
    gap = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    error = clustered_standard_error(gap, clusters) if len(set(clusters)) > 1 else None
    mean = float(gap.mean())
    interval = None if error is None else _interval(gap, mean, error, len(set(clusters)))
    wins, losses = int((gap > 0).sum()), int((gap < 0).sum())
    return PairedAccuracy(mean, error, interval, sign_test_p(wins, losses), wins, losses, len(gap))


def _interval(gap: Floats, mean: float, error: float, groups: int) -> Interval:
    """Mean ± 1.96 SE; where no prompt differs from another, one that tells how few there are.

    A kind of prompt of which there is none among n has at most a share u = 1 - 0.025^(1/n) (Clopper
    & Pearson 1934), and its difference is anything in [-1, 1]: (1 - u) mean ± u.
    """
    if error > NO_SPREAD:
        half = NormalDist().inv_cdf(0.975) * error
        return Interval(max(mean - half, -1.0), min(mean + half, 1.0))
    unseen = 1 - 0.025 ** (1 / groups)
    return Interval((1 - unseen) * mean - unseen, (1 - unseen) * mean + unseen)


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[object], *, seed: int, resamples: int = 2000
) -> Interval:
    """95% percentile interval of a mean when whole clusters are drawn (Efron & Tibshirani 1993).

    With one row per cluster it is the ordinary bootstrap of rows. Same seed, same interval.
    """
    x = np.asarray(values, dtype=np.float64)
    _, place = np.unique([str(name) for name in clusters], return_inverse=True)
    sums, sizes = np.bincount(place, weights=x), np.bincount(place)
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = generator.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high))


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> float:
    """Expected gold score of the reply that the proxy likes best among `n` of the given ones.

    The mean over all subsets of size n, without drawing any (Nakano et al. 2021, 2112.09332,
    appendix I): with replies in order of the proxy, the i-th is the best of C(i-1, n-1) of the
    C(N, n) subsets. Replies of equal proxy score share their places.

    Raises:
        ValueError: `n` is not in [1, number of replies].
    """
    scores, values = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    total = len(scores)
    if not 1 <= n <= total or len(values) != total:
        raise ValueError(f"best_of_n: best of {n} among {total} replies, {len(values)} gold scores")
    weights = np.array([math.comb(i, n - 1) for i in range(total)], dtype=np.float64)
    weights /= math.comb(total, n)
    _, tied = np.unique(scores, return_inverse=True)
    ordered: Floats = values[np.argsort(scores, kind="stable")]
    groups = np.sort(tied)
    means = np.bincount(groups, weights=ordered) / np.bincount(groups)
    return float((weights * means[groups]).sum())


def best_of_n_kl(n: int) -> float:
    """Largest KL of best-of-n to the sampler, in nats: log n - (n - 1)/n (Nakano et al. 2021)."""
    return math.log(n) - (n - 1) / n
