"""How much of a reward model's choice is length. Takes arrays, no model.

Two answers to one prompt share its difficulty, so what counts is inside a pair: the difference of
the scores against the difference of the lengths. People prefer longer answers too, so part of that
correlation is right; it is given with and without the share that the preference itself explains.
"""

import math
from typing import Any

import numpy as np

from ppomax.eval.statistics import Floats, pearson, wilson_interval


def length_bias(
    good: Floats, bad: Floats, good_length: Floats, bad_length: Floats
) -> dict[str, Any]:
    """Correlations of score and length, and accuracy by which answer is longer.

    `within_pair_correlation` sees every pair from both sides, so it holds what people's own taste
    for length brings in (`preference_correlation`: of being preferred with length, on its own).
    `given_preference_correlation` is the partial correlation once it is known which answer is
    preferred: what the model adds.
    """
    gap, length_gap = good - bad, good_length - bad_length
    unequal = length_gap != 0
    return {
        "score_length_correlation": pearson(
            np.append(good, bad), np.append(good_length, bad_length)
        ),
        "within_pair_correlation": _through_zero(gap, length_gap),
        "given_preference_correlation": pearson(gap, length_gap),
        "preference_correlation": _through_zero(np.ones_like(gap), length_gap),
        "longer_preferred_by_model": _share((gap * np.sign(length_gap))[unequal]),
        "longer_preferred_by_people": _share(length_gap[unequal]),
        "chosen_mean": float(good_length.mean()),
        "rejected_mean": float(bad_length.mean()),
        "when": [
            {"longer": name, **_rate(gap[inside])}
            for name, inside in (
                ("preferred answer", length_gap > 0),
                ("other answer", length_gap < 0),
                ("neither", ~unequal),
            )
            if inside.any()
        ],
    }


def _rate(gap: Floats) -> dict[str, Any]:
    right = float((gap > 0).sum() + 0.5 * (gap == 0).sum())
    interval = wilson_interval(right, len(gap))
    return {"n": len(gap), "accuracy": right / len(gap), "ci95": list(interval)}


def _share(signed: Floats) -> float | None:
    """Share of positive numbers, zeros half; None of nothing."""
    return float((np.sign(signed).mean() + 1) / 2) if len(signed) else None


def _through_zero(a: Floats, b: Floats) -> float | None:
    """Correlation of (a, -a) with (b, -b): both sides of each pair."""
    scale = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(np.clip(a @ b / scale, -1, 1)) if scale > 0 else None
