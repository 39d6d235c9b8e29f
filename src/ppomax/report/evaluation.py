"""Tables of evaluations: policies by their scorers, reward models on preference pairs.

Pure functions of evaluation records; what a record lacks is None or left out.
"""

from collections.abc import Mapping
from typing import Any

from ppomax.report.read import as_interval, as_number, listed, mapping, sides
from ppomax.report.tables import turns
from ppomax.report.text import clip


def scorer_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per scorer: means of both sides, difference, wins, with intervals as given."""
    numbers = ("difference", "win", "tie", "lose", "win_rate")
    return [
        {
            "name": clip(str(row.get("name", "")), 80),
            "role": clip(str(row.get("role", "")), 40),
            "means": [as_number(row.get(f"{side}_mean")) for side in sides(report)],
            **{key: as_number(row.get(key)) for key in numbers},
            "ci95": as_interval(row.get("ci95")),
            "win_ci95": as_interval(row.get("win_ci95")),
        }
        for row in listed(report.get("scorers"))
    ]


def group_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The difference in each group of prompts."""
    return [
        {
            "group": clip(str(row.get("group", "")), 80),
            "n": as_number(row.get("n")),
            "difference": as_number(row.get("difference")),
            "ci95": as_interval(row.get("ci95")),
        }
        for row in listed(report.get("by"))
    ]


def policy_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Numbers of the replies of each policy: `key` and `values`, baseline first."""
    policies = mapping(report.get("policies"))
    both = [mapping(policies.get(side)) for side in sides(report)]
    keys = list(dict.fromkeys(key for side in both for key in side))
    rows = [{"key": str(key), "values": [as_number(s.get(key)) for s in both]} for key in keys]
    return [row for row in rows if any(value is not None for value in row["values"])]


def pair_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy overall, by subset and of choosing by length: `group`, `n`, `accuracy`, `ci95`."""
    overall = mapping(result.get("accuracy"))
    rows = [("all pairs", overall)] if overall else []
    rows += [
        (f"{row.get('column', '')}: {row.get('value', '')}", row)
        for row in listed(result.get("subsets"))
    ]
    rows += [
        (f"by length alone, {name}", mapping(row))
        for name, row in mapping(result.get("baselines")).items()
    ]
    return [
        {
            "group": clip(name, 120),
            "n": as_number(row.get("n")),
            "accuracy": as_number(row.get("accuracy")),
            "ci95": as_interval(row.get("ci95")),
        }
        for name, row in rows
    ]


def calibration_rows(result: Mapping[str, Any]) -> list[tuple[str, float | None, str]]:
    """Name, value and meaning of the calibration numbers."""
    found = mapping(result.get("calibration"))
    meanings = {
        "ece": "mean distance of confidence and accuracy over bins of equal size",
        "ece_noise_mean": "the same if the model were perfectly calibrated, with as few pairs",
        "ece_noise_p95": "an error above this is not chance",
        "brier": "mean squared error of the probability; 0.25 for a coin",
        "nll": "nats per pair; 0.693 for a coin",
        "temperature": "scores divided by this are best calibrated; above 1: too sure",
        "nll_at_temperature": "nats per pair after that",
    }
    return [(key, as_number(found.get(key)), meaning) for key, meaning in meanings.items()]


def length_rows(result: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """What length explains."""
    found = mapping(result.get("length"))
    names = {
        "score_length_correlation": "Correlation of score and length, all answers",
        "difference_correlation": "Correlation of score difference and length difference in a pair",
        "longer_preferred_by_model": "Share of pairs whose longer answer the model prefers",
        "longer_preferred_by_people": "Share of pairs whose longer answer people prefer",
        "chosen_mean": "Mean tokens of the preferred answer",
        "rejected_mean": "Mean tokens of the other answer",
    }
    return [(name, as_number(found.get(key))) for key, name in names.items()]


def score_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Quantiles of the scores of preferred and other answers side by side."""
    both = [mapping(mapping(result.get("scores")).get(key)) for key in ("chosen", "rejected")]
    keys = dict.fromkeys(key for side in both for key in side)
    return [{"key": str(key), "values": [as_number(s.get(key)) for s in both]} for key in keys]


def worst_pairs(result: Mapping[str, Any], text_limit: int) -> list[dict[str, Any]]:
    """The pairs on which a reward model and people disagree most."""
    return [
        {
            "id": clip(str(row.get("id", "")), 80),
            "prompt": turns(row.get("prompt"), text_limit),
            "replies": [
                {
                    "name": name,
                    "text": clip(str(row.get(key, "")), text_limit),
                    "score": as_number(row.get(f"{key}_score")),
                }
                for key, name in (("chosen", "preferred by people"), ("rejected", "other answer"))
            ],
        }
        for row in listed(result.get("worst"))
    ]
