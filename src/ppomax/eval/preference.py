"""What a reward model's scores say about preference pairs. Takes arrays and texts, no model.

A pair is two answers to one prompt, the first preferred by people. The model's probability that it
prefers the first is σ(score difference) (Bradley & Terry 1952), as in the ranking loss.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ppomax.errors import ModelError
from ppomax.eval import statistics
from ppomax.eval.comparison import cluster_bootstrap, paired_accuracy
from ppomax.eval.length_bias import length_bias
from ppomax.eval.statistics import Floats
from ppomax.eval.winrate import win_rate
from ppomax.types import Message

SUBSET_COLUMNS = ("lang", "kind", "source")
MAX_SUBSETS = 30
"""Values of one column that get a row of their own; the rarest of more go into one row."""
OTHERS = "(all others)"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MAX_HISTOGRAMS = 4
"""Values of one column whose score differences are drawn, the commonest: more cannot be told
apart in grey."""


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
    likelihoods: tuple[ArrayLike, ArrayLike] | None = None,
    likelihood_tokens: tuple[ArrayLike, ArrayLike] | None = None,
    columns: Sequence[str] = SUBSET_COLUMNS,
    seed: int = 0,
    bins: int = 10,
    num_worst: int = 10,
) -> dict[str, Any]:
    """Accuracy, calibration and length bias of scores on preference pairs, ready for JSON.

    Every argument has one entry per pair; lengths are tokens of the response. A tie counts half.

    Args:
        meta: rows' other columns; accuracy is given by each of `columns`.
        likelihoods: log-probs of chosen and rejected answers under a language model, for two more
            baselines.
        likelihood_tokens: the answers' tokens in that model's own; default the lengths.

    Returns:
        `kind` ("preference"), `num_pairs`, `accuracy`, `subsets`, `baselines`, `differences` (the
        model against each baseline, per subset), `histogram`, `histograms`, `calibration`,
        `length`, `scores`, `score_histogram`, `worst`: see the functions below.

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
    baselines = _baselines(good_length, bad_length, likelihoods, likelihood_tokens)
    groups = _groups(meta, columns)
    prompted = clusters_of(prompts)
    return {
        "kind": "preference",
        "num_pairs": len(ids),
        "num_prompts": len(set(prompted)),
        "seed": seed,
        "accuracy": accuracy(difference, prompted),
        "subsets": [
            {
                "column": group.column,
                "value": group.value,
                **accuracy(difference[group.inside], _inside(prompted, group.inside)),
            }
            for group in groups
        ],
        "baselines": {name: accuracy(gap, prompted) for name, gap in baselines.items()},
        "differences": [
            {
                "column": group.column,
                "value": group.value,
                "baseline": name,
                **against(difference, gap, prompted, group.inside),
            }
            for group in (Group("", "all", np.ones(len(ids), dtype=np.bool_)), *groups)
            for name, gap in baselines.items()
        ],
        "histogram": difference_histogram(difference),
        "histograms": _histograms(difference, groups),
        "calibration": calibration(difference, seed=seed, bins=bins),
        "length": length_bias(good, bad, good_length, bad_length),
        "scores": {"chosen": _distribution(good), "rejected": _distribution(bad)},
        "score_histogram": _score_histogram(good, bad),
        "worst": _worst(difference, good, bad, ids, prompts, chosen, rejected, num_worst),
    }


def accuracy(difference: Floats, prompts: Sequence[str]) -> dict[str, Any]:
    """Share of positive differences, ties half, with counts and a Wilson interval.

    The interval lets pairs of one prompt depend on each other (`winrate.win_rate`).
    """
    won = statistics.win_tie_lose(difference, np.zeros_like(difference))
    return {
        "n": len(difference),
        "accuracy": won.win_rate,
        "ci95": list(win_rate(correct(difference), prompts).interval),
        "right": won.win,
        "tie": won.tie,
        "wrong": won.lose,
    }


def correct(difference: Floats) -> Floats:
    """1 where the preferred answer has more, 0 where it has less, 0.5 where they are equal."""
    return np.asarray((np.sign(difference) + 1) / 2, dtype=np.float64)


def clusters_of(prompts: Sequence[Sequence[Message]]) -> list[str]:
    """A name for each pair's prompt: pairs of one prompt are not independent."""
    return [
        "\x1e".join(f"{turn['role']}\x1f{turn['content']}" for turn in prompt) for prompt in prompts
    ]


def against(
    difference: Floats, other: Floats, prompts: Sequence[str], inside: NDArray[np.bool_]
) -> dict[str, Any]:
    """How much more often one rule is right than another on the same pairs."""
    found = paired_accuracy(
        correct(difference[inside]),
        correct(other[inside]),
        _inside(prompts, inside),
    )
    return {
        "n": found.num,
        "difference": found.difference,
        "standard_error": found.standard_error,
        "ci95": None if found.interval is None else list(found.interval),
        "p": found.p_value,
        "only_first": found.only_first,
        "only_second": found.only_second,
    }


def _inside(prompts: Sequence[str], inside: NDArray[np.bool_]) -> list[str]:
    return [prompt for prompt, kept in zip(prompts, inside, strict=True) if kept]


def compare(
    names: Sequence[str],
    differences: Sequence[Floats],
    meta: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[Message]],
    *,
    columns: Sequence[str] = SUBSET_COLUMNS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Every two reward models on the same pairs: overall with a bootstrap of prompts, by subset.

    Args:
        differences: chosen - rejected score of each model, one entry per pair.
    """
    prompted = clusters_of(prompts)
    groups = (Group("", "all", np.ones(len(prompted), dtype=np.bool_)), *_groups(meta, columns))
    rows = []
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            gap = correct(differences[i]) - correct(differences[j])
            for group in groups:
                row: dict[str, Any] = {"first": first, "second": names[j]}
                row |= {"column": group.column, "value": group.value}
                row |= against(differences[i], differences[j], prompted, group.inside)
                if not group.column:
                    row["bootstrap_ci95"] = list(cluster_bootstrap(gap, prompted, seed=seed))
                rows.append(row)
    return rows


def difference_histogram(
    difference: Floats, num_bins: int = 40, reach: float | None = None
) -> dict[str, Any]:
    """Counts of chosen - rejected score (Zheng et al. 2023, figure 2); zero is an edge."""
    reach = reach or float(np.abs(difference).max()) or 1.0
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
    scaled = _sigmoid(np.abs(difference) / temperature)
    after = statistics.ece(scaled, agreed, seed=seed, bins=bins)
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
        "ece_at_temperature": after.ece,
        "ece_at_temperature_noise_mean": after.noise_mean,
        "ece_at_temperature_noise_p95": after.noise_p95,
    }


class Group(NamedTuple):
    """The pairs that share a column's value."""

    column: str
    value: str
    inside: NDArray[np.bool_]


def _baselines(
    good_length: Floats,
    bad_length: Floats,
    likelihoods: tuple[ArrayLike, ArrayLike] | None,
    tokens: tuple[ArrayLike, ArrayLike] | None,
) -> dict[str, Floats]:
    """Rules that no preference was needed for; positive where the preferred answer would win."""
    found = {"longer wins": good_length - bad_length, "shorter wins": bad_length - good_length}
    if likelihoods is not None:
        good, bad = (np.asarray(side, dtype=np.float64) for side in likelihoods)
        found["likelier wins"] = good - bad
        good_tokens, bad_tokens = (
            np.asarray(side, dtype=np.float64) for side in tokens or (good_length, bad_length)
        )
        found["likelier per token wins"] = good / good_tokens - bad / bad_tokens
    return found


def _groups(meta: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Group]:
    """The values of each column that has any, and of language and kind together."""
    columns = {name: [_label(row.get(name)) for row in meta] for name in names}
    languages, kinds = columns.get("lang", []), columns.get("kind", [])
    if min(len(set(languages) - {""}), len(set(kinds) - {""})) > 1:
        columns["lang, kind"] = [
            f"{lang}, {kind}" if lang and kind else ""
            for lang, kind in zip(languages, kinds, strict=True)
        ]
    return [
        Group(name, value, inside)
        for name, values in columns.items()
        for value, inside in _by_value(values)
    ]


def _by_value(values: list[str]) -> list[tuple[str, NDArray[np.bool_]]]:
    """Each value and where it stands, in order; the rarest of a long list as one group."""
    counts = Counter(value for value in values if value)
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    kept = set(ranked if len(ranked) <= MAX_SUBSETS else ranked[: MAX_SUBSETS - 1])
    names = ["" if not value else value if value in kept else OTHERS for value in values]
    return [
        (name, np.array([found == name for found in names])) for name in sorted(set(names) - {""})
    ]


def _histograms(difference: Floats, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Figure 2 per subset: the commonest values of each column that has several, same edges."""
    reach = float(np.abs(difference).max()) or 1.0
    rows: list[dict[str, Any]] = []
    for column in dict.fromkeys(group.column for group in groups):
        own = [group for group in groups if group.column == column]
        ranked = sorted(own, key=lambda group: -int(group.inside.sum()))[:MAX_HISTOGRAMS]
        rows += [
            {
                "column": column,
                "value": group.value,
                "n": int(group.inside.sum()),
                **difference_histogram(difference[group.inside], reach=reach),
            }
            for group in ranked
            if len(own) > 1
        ]
    return rows


def _score_histogram(good: Floats, bad: Floats, num_bins: int = 40) -> dict[str, Any]:
    """Counts of the scores of preferred and other answers over the same edges."""
    both = np.append(good, bad)
    low, high = float(both.min()), float(both.max())
    edges = np.linspace(low, high if high > low else low + 1, num_bins + 1)
    return {
        "edges": edges.tolist(),
        "chosen": np.histogram(good, edges)[0].tolist(),
        "rejected": np.histogram(bad, edges)[0].tolist(),
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
