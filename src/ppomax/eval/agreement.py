"""How far raters (judges and people) agree on the same items. Takes verdicts by name of item."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ppomax.eval.extras import need
from ppomax.eval.outcomes import Side

SIDES: tuple[Side, ...] = ("a", "tie", "b")
Ratings = Mapping[str, Side]
"""One rater's verdict on each item it judged."""


def agreement(raters: Mapping[str, Ratings]) -> dict[str, Any]:
    """Every two raters, each against the others, and Krippendorff's α of all; JSON-ready."""
    return {
        "pairs": [
            {"raters": [first, second], **two_raters(raters[first], raters[second])}
            for first, second in combinations(raters, 2)
        ],
        "against_others": [
            {"rater": name, **against_others(name, raters)} for name in raters if len(raters) > 1
        ],
        "alpha": krippendorff_alpha(list(raters.values())),
    }


def two_raters(first: Ratings, second: Ratings) -> dict[str, Any]:
    """Raw agreement with ties, without them (items on which both took a side), and Cohen's κ."""
    items = [item for item in first if item in second]
    same = [first[item] == second[item] for item in items]
    sided = [item for item in items if "tie" not in (first[item], second[item])]
    agreed = [first[item] == second[item] for item in sided]
    return {
        "n": len(items),
        "raw": sum(same) / len(items) if items else None,
        "n_without_ties": len(sided),
        "raw_without_ties": sum(agreed) / len(sided) if sided else None,
        "kappa": cohen_kappa([first[item] for item in items], [second[item] for item in items]),
    }


def cohen_kappa(first: Sequence[Side], second: Sequence[Side]) -> float | None:
    """Cohen 1960: agreement beyond that of two independent raters with these margins.

    None where nothing was rated by both, or where both gave one and the same answer throughout.
    """
    table = np.zeros((3, 3))
    for a, b in zip(first, second, strict=True):
        table[SIDES.index(a), SIDES.index(b)] += 1
    if table.sum() == 0 or (table > 0).sum() == 1:
        return None
    rater = need("statsmodels.stats.inter_rater", "Cohen's kappa")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the variance of a degenerate table, which is not used
        value = float(rater.cohens_kappa(table, return_results=False))
    return value if np.isfinite(value) else None


def krippendorff_alpha(raters: Sequence[Ratings]) -> float | None:
    """Krippendorff 2011, nominal, any number of raters and gaps; None where it is not defined."""
    items = sorted({item for ratings in raters for item in ratings})
    codes = [[_code(ratings.get(item)) for item in items] for ratings in raters]
    table = np.array(codes, dtype=np.float64)
    if table.size == 0:
        return None
    shared = table[:, (~np.isnan(table)).sum(axis=0) > 1]
    if len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None
    package = need("krippendorff", "Krippendorff's alpha")
    return float(package.alpha(reliability_data=table, level_of_measurement="nominal"))


def against_others(name: str, raters: Mapping[str, Ratings]) -> dict[str, Any]:
    """One rater against the majority of the others, item by item (no majority is a tie)."""
    others = {other: ratings for other, ratings in raters.items() if other != name}
    items = {item for ratings in others.values() for item in ratings}
    pooled: dict[str, Side] = {
        item: majority([r[item] for r in others.values() if item in r]) for item in items
    }
    return two_raters(raters[name], pooled)


def majority(votes: Sequence[Side]) -> Side:
    """The side with more votes than the other; a tie where neither has, or ties have the most."""
    a, b, tie = (votes.count(side) for side in ("a", "b", "tie"))
    if a == b or tie > max(a, b):
        return "tie"
    return "a" if a > b else "b"


def _code(side: Side | None) -> float:
    return float("nan") if side is None else float(SIDES.index(side))
