"""Tables of evaluations: policies by their scorers, reward models on preference pairs.

Pure functions of evaluation records; what a record lacks is None or left out.
"""

from collections.abc import Mapping
from typing import Any

from ppomax.report.read import as_interval, as_number, listed, mapping, sides
from ppomax.report.tables import turns
from ppomax.report.text import between, clip, number, percent, visible
from ppomax.report.verdict import preference_verdict


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
        (f"by a rule alone, {name}", mapping(row))
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


def difference_rows(result: Mapping[str, Any]) -> dict[str, Any]:
    """The model's accuracy minus each rule's on the same pairs: `rules` and `rows` of `cells`."""
    found = listed(result.get("differences"))
    rules = list(dict.fromkeys(str(row.get("baseline")) for row in found))
    groups: dict[str, dict[str, Any]] = {}
    for row in found:
        groups.setdefault(_group_name(row), {})[str(row.get("baseline"))] = row
    return {
        "rules": rules,
        "rows": [
            {"group": clip(name, 120), "cells": [paired_text(row.get(rule)) for rule in rules]}
            for name, row in groups.items()
        ],
    }


def comparison_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every two models on the same pairs."""
    return [
        {
            "models": clip(f"{row.get('first', '')} − {row.get('second', '')}", 200),
            "group": clip(_group_name(row), 120),
            "n": as_number(row.get("n")),
            "difference": paired_text(row),
            "bootstrap": between(as_interval(row.get("bootstrap_ci95")), "percent"),
            "only": f"{number(as_number(row.get('only_first')))} / "
            f"{number(as_number(row.get('only_second')))}",
        }
        for row in listed(report.get("comparisons"))
    ]


def paired_text(row: object) -> str:
    """A difference of accuracies with its 95% interval and McNemar's p."""
    found = mapping(row)
    difference = as_number(found.get("difference"))
    if difference is None:
        return "–"
    interval = between(as_interval(found.get("ci95")), "percent")
    return f"{percent(difference)} ({interval}; p {number(as_number(found.get('p')))})"


def _group_name(row: Mapping[str, Any]) -> str:
    column = row.get("column", "")
    return f"{column}: {row.get('value', '')}" if column else "all pairs"


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
        "ece_at_temperature": "calibration error after that",
        "ece_at_temperature_noise_mean": "the same if it were perfectly calibrated then",
        "ece_at_temperature_noise_p95": "an error above this is not chance",
    }
    return [(key, as_number(found.get(key)), meaning) for key, meaning in meanings.items()]


def length_rows(result: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """What length explains."""
    found = mapping(result.get("length"))
    names = {
        "score_length_correlation": "Correlation of score and length, all answers",
        "within_pair_correlation": "Correlation of score and length within a pair",
        "preference_correlation": "Correlation of people's preference and length within a pair",
        "given_preference_correlation": "Correlation of score and length within a pair, given "
        "which answer people prefer",
        "longer_preferred_by_model": "Share of pairs whose longer answer the model prefers",
        "longer_preferred_by_people": "Share of pairs whose longer answer people prefer",
        "chosen_mean": "Mean tokens of the preferred answer",
        "rejected_mean": "Mean tokens of the other answer",
    }
    return [(name, as_number(found.get(key))) for key, name in names.items()]


def longer_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy by which answer is the longer one, in the form of `pair_rows`."""
    return [
        {
            "group": f"longer: {clip(str(row.get('longer', '')), 40)}",
            "n": as_number(row.get("n")),
            "accuracy": as_number(row.get("accuracy")),
            "ci95": as_interval(row.get("ci95")),
        }
        for row in listed(mapping(result.get("length")).get("when"))
    ]


def best_of_n_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The curve of the best of n replies, as numbers."""
    found = mapping(result.get("best_of_n"))
    columns = [found.get(key) for key in ("n", "kl", "proxy", "gold", "gold_gain_ci95")]
    if not all(isinstance(column, list) for column in columns):
        return []
    return [
        {
            "n": as_number(n),
            "kl": as_number(kl),
            "proxy": as_number(proxy),
            "gold": as_number(gold),
            "gain": between(as_interval(interval)),
        }
        for n, kl, proxy, gold, interval in zip(*columns, strict=False)
    ]


def preference_lines(result: Mapping[str, Any]) -> list[str]:
    """An evaluation's main numbers as plain lines for a terminal."""
    lines = []
    several = result.get("kind") == "comparison"
    for one in listed(result.get("models")) if several else [result]:
        lines += [visible(str(one.get("model", "")))] if several else []
        rows = [("all", mapping(one.get("accuracy")))]
        rows += [(f"{r.get('column')} {r.get('value')}", r) for r in listed(one.get("subsets"))]
        rows += [(name, mapping(row)) for name, row in mapping(one.get("baselines")).items()]
        lines += [f"{visible(name):<28} {_rate(row)}" for name, row in rows]
        lines += [
            f"model - {row.get('baseline'):<20} {paired_text(row)}"
            for row in listed(one.get("differences"))
            if row.get("column") == ""
        ]
        lines += [f"warning: {visible(line)}" for line in preference_verdict(one)["warnings"]]
    lines += [
        visible(f"{row.get('first')} - {row.get('second')}: {paired_text(row)}")
        for row in listed(result.get("comparisons"))
        if row.get("column") == ""
    ]
    lines += [visible(line) for line in left_out_lines(result)]
    return lines + [visible(str(note)) for note in result.get("notes") or ()]


def left_out_lines(result: Mapping[str, Any]) -> list[str]:
    """What of the files was not judged, and why."""
    kinds = {name: as_number(n) or 0 for name, n in mapping(result.get("quarantined")).items()}
    over_long, lines = as_number(result.get("over_long")), []
    if kinds:
        named = ", ".join(f"{name} {number(count)}" for name, count in kinds.items())
        lines.append(clip(f"{number(sum(kinds.values()))} rows cannot be used ({named})", 400))
    if over_long:
        length = number(as_number(result.get("max_length")))
        lines.append(f"{number(over_long)} pairs left out: longer than {length} tokens")
    return lines


def _rate(row: Mapping[str, Any]) -> str:
    low, high = as_interval(row.get("ci95")) or (0.0, 1.0)
    return f"{row.get('accuracy', 0.0):.3f}  [{low:.3f}, {high:.3f}]  n {row.get('n')}"


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
