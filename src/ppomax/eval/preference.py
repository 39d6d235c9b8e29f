"""What a reward model's scores say about preference pairs. Takes arrays and texts, no model.

A pair is two answers to one prompt, the first preferred by people. The model's probability that it
prefers the first is σ(score difference) (Bradley & Terry 1952), as in the ranking loss.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ppomax.errors import ModelError
from ppomax.eval import statistics
from ppomax.eval.statistics import Floats
from ppomax.types import Message

SUBSET_COLUMNS = ("lang", "kind", "source")
MAX_SUBSETS = 30
"""Values of one column that get a row of their own; the rarest of more go into one row."""
OTHERS = "(all others)"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def evaluate_pairs(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    meta: Sequence[Mapping[str, Any]],
    *,
    ids: Sequence[str],
    prompts: Sequence[Sequence[Message]],
    chosen: Sequence[str],
    rejected: Sequence[str],
    seed: int = 0,
    bins: int = 10,
    num_worst: int = 10,
) -> dict[str, Any]:
    """Accuracy, calibration and length bias of scores on preference pairs, ready for JSON.

    Every argument has one entry per pair; lengths are tokens of the response. `meta` may hold the
    columns `lang`, `kind` and `source`, by each of which accuracy is given. A tie counts half.

    Returns:
        `kind` ("preference"), `num_pairs`, `accuracy`, `subsets`, `baselines`, `histogram`,
        `calibration`, `length`, `scores`, `worst`: see the functions below.

    Raises:
        ModelError: a score is not finite.
        ValueError: no pairs, or lengths differ.
    """
    good, bad = _scores(chosen_scores, ids), _scores(rejected_scores, ids)
    good_length = np.asarray(chosen_lengths, dtype=np.float64)
    bad_length = np.asarray(rejected_lengths, dtype=np.float64)
    sizes = {len(column) for column in (good, bad, good_length, bad_length, meta, ids, prompts)}
    sizes |= {len(chosen), len(rejected)}
    if len(sizes) != 1 or not ids:
        raise ValueError(f"evaluate_pairs: columns of {sorted(sizes)} rows")
    difference = good - bad
    return {
        "kind": "preference",
        "num_pairs": len(ids),
        "seed": seed,
        "accuracy": accuracy(difference),
        "subsets": _subsets(difference, meta),
        "baselines": {
            "longer wins": accuracy(good_length - bad_length),
            "shorter wins": accuracy(bad_length - good_length),
        },
        "histogram": difference_histogram(difference),
        "calibration": calibration(difference, seed=seed, bins=bins),
        "length": _length_bias(good, bad, good_length, bad_length),
        "scores": {"chosen": _distribution(good), "rejected": _distribution(bad)},
        "worst": _worst(difference, good, bad, ids, prompts, chosen, rejected, num_worst),
    }


def accuracy(difference: Floats) -> dict[str, Any]:
    """Share of positive differences, ties half, with the Wilson interval and counts."""
    won = statistics.win_tie_lose(difference, np.zeros_like(difference))
    return {
        "n": len(difference),
        "accuracy": won.win_rate,
        "ci95": list(won.interval()),
        "right": won.win,
        "tie": won.tie,
        "wrong": won.lose,
    }


def difference_histogram(difference: Floats, num_bins: int = 40) -> dict[str, Any]:
    """Counts of chosen - rejected score (Zheng et al. 2023, figure 2); zero is an edge."""
    reach = float(np.abs(difference).max()) or 1.0
    counts, edges = np.histogram(difference, bins=num_bins, range=(-reach, reach))
    return {
        "counts": counts.tolist(),
        "edges": edges.tolist(),
        "mean": float(difference.mean()),
        "median": float(np.median(difference)),
        "std": float(difference.std()),
    }


def calibration(difference: Floats, *, seed: int, bins: int = 10) -> dict[str, Any]:
    """How far σ(|difference|) is from how often the model is right.

    The preferred answer is first in every row, so σ(difference) has no second outcome to be
    compared with. Each pair is therefore read from the model's side: its confidence is that of
    the answer it prefers, in [½, 1], and the outcome whether people agree (½ for a tie).
    Brier score, NLL and temperature are the same either way.
    """
    confidence = _sigmoid(np.abs(difference))
    agreed = np.where(difference == 0, 0.5, (difference > 0).astype(np.float64))
    always = np.ones_like(difference)
    temperature = statistics.fit_temperature(difference, always)
    error = statistics.ece(confidence, agreed, seed=seed, bins=bins)
    table = statistics.reliability_table(confidence, agreed, bins=bins)
    return {
        "reliability": [
            {
                "n": row.num,
                "confidence": row.probability,
                "accuracy": row.frequency,
                "ci95": list(row.interval),
            }
            for row in table
        ],
        "ece": error.ece,
        "ece_noise_mean": error.noise_mean,
        "ece_noise_p95": error.noise_p95,
        "brier": statistics.brier(_sigmoid(difference), always),
        "nll": statistics.nll_binary(difference, always),
        "temperature": temperature,
        "nll_at_temperature": statistics.nll_binary(difference / temperature, always),
    }


def _subsets(difference: Floats, meta: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy by each column that has values, and by language and kind together."""
    columns = {name: [_label(row.get(name)) for row in meta] for name in SUBSET_COLUMNS}
    languages, kinds = columns["lang"], columns["kind"]
    if min(len(set(languages) - {""}), len(set(kinds) - {""})) > 1:
        columns["lang, kind"] = [
            f"{lang}, {kind}" if lang and kind else ""
            for lang, kind in zip(languages, kinds, strict=True)
        ]
    return [
        {"column": name, "value": value, **accuracy(difference[inside])}
        for name, values in columns.items()
        for value, inside in _groups(values)
    ]


def _groups(values: list[str]) -> list[tuple[str, NDArray[np.bool_]]]:
    """Each value and where it stands, in order; the rarest of a long list as one group."""
    counts = Counter(value for value in values if value)
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    kept = set(ranked if len(ranked) <= MAX_SUBSETS else ranked[: MAX_SUBSETS - 1])
    names = ["" if not value else value if value in kept else OTHERS for value in values]
    return [
        (name, np.array([found == name for found in names])) for name in sorted(set(names) - {""})
    ]


def _length_bias(
    good: Floats, bad: Floats, good_length: Floats, bad_length: Floats
) -> dict[str, Any]:
    """Correlations with length; within a pair the prompt, and so its difficulty, is held fixed."""
    both_scores, both_lengths = np.append(good, bad), np.append(good_length, bad_length)
    gap, length_gap = good - bad, good_length - bad_length
    return {
        "score_length_correlation": statistics.pearson(both_scores, both_lengths),
        "difference_correlation": statistics.pearson(gap, length_gap),
        "longer_preferred_by_model": accuracy(gap * np.sign(length_gap))["accuracy"],
        "longer_preferred_by_people": accuracy(length_gap)["accuracy"],
        "chosen_mean": float(good_length.mean()),
        "rejected_mean": float(bad_length.mean()),
    }


def _distribution(scores: Floats) -> dict[str, float]:
    """Mean, standard deviation (of these rows) and quantiles of the scores."""
    named = {f"p{round(100 * q):02d}": float(np.quantile(scores, q)) for q in QUANTILES}
    extremes = {"min": float(scores.min()), "max": float(scores.max())}
    return {"mean": float(scores.mean()), "std": float(scores.std()), **named, **extremes}


def _worst(
    difference: Floats,
    good: Floats,
    bad: Floats,
    ids: Sequence[str],
    prompts: Sequence[Sequence[Message]],
    chosen: Sequence[str],
    rejected: Sequence[str],
    num: int,
) -> list[dict[str, Any]]:
    """The pairs on which model and people disagree most (Zheng et al. 2023, table 1)."""
    order = np.argsort(difference, kind="stable")[:num]
    return [
        {
            "id": ids[i],
            "prompt": [dict(message) for message in prompts[i]],
            "chosen": chosen[i],
            "rejected": rejected[i],
            "chosen_score": float(good[i]),
            "rejected_score": float(bad[i]),
        }
        for i in order
    ]


def _scores(scores: ArrayLike, ids: Sequence[str]) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    lost = np.flatnonzero(~np.isfinite(values))
    if len(lost):
        raise ModelError(
            f"reward model: {len(lost)} of {len(values)} scores are not finite, the first for pair "
            f"{ids[lost[0]]!r}; try dtype float32 or another checkpoint"
        )
    return values


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))


def _label(value: object) -> str:
    return "" if value is None else str(value)
