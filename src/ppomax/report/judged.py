"""Comparisons by judges and capability scores: verdict, tables, figures, samples.

Pure functions of an evaluation's record; what a record lacks is None or left out.
"""

from collections.abc import Mapping
from typing import Any

from ppomax.report.bars import Split, accuracy_bars, win_tie_lose_bars
from ppomax.report.drawing import Figure
from ppomax.report.read import as_interval, as_number, listed, mapping
from ppomax.report.tables import turns
from ppomax.report.text import clip, number, percent

RANK = {"file": 0, "openai": 1, "local": 1, "callable": 1, "reward": 2}
"""People's verdict stands first, then those who read, then those who score."""
READINGS = {
    "letter": "letter of the choice",
    "text": "text of the choice, per byte",
    "text_sum": "text of the choice, summed",
    "match": "free answer, exact match",
}


def comparisons(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Comparisons that have a verdict, people's first."""
    found = [row for row in listed(report.get("comparisons")) if as_number(row.get("n"))]
    return sorted(found, key=lambda row: RANK.get(str(row.get("judge_kind")), 3))


def judged_verdict(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the first judge found, with n, interval, what could have been seen; None: no judge."""
    rows = comparisons(report)
    if not rows:
        return None
    sign = _sign(rows[0])
    tone = {1: "good", -1: "bad"}.get(sign, "unclear")
    signs = {_sign(row) for row in rows}
    warnings = [text for row in rows for text in _warnings(row)]
    if {1, -1} <= signs and len({row.get("candidate") for row in rows}) == 1:
        warnings.insert(0, "The judges contradict each other: read the samples")
    points = [_sentence(row) for row in rows[1:]]
    return {
        "headline": _sentence(rows[0]),
        "tone": tone,
        "points": [*points, *_tax(report)],
        "warnings": warnings,
    }


def _sentence(row: Mapping[str, Any]) -> str:
    word = {1: "is better than", -1: "is worse than", 0: "is not shown to differ from"}[_sign(row)]
    interval = as_interval(row.get("ci95"))
    edges = f" [{percent(interval[0])}, {percent(interval[1])}]" if interval else ""
    seen = as_number(row.get("detectable"))
    could = f"; {100 * seen:.1f} points or more could have been seen" if seen is not None else ""
    return (
        f"{_text(row, 'candidate')} {word} {_text(row, 'baseline')}: win rate "
        f"{percent(as_number(row.get('win_rate')))}{edges} on {number(as_number(row.get('n')))} "
        f"pairs, judged by {_text(row, 'judge')}{could}"
    )


def _warnings(row: Mapping[str, Any]) -> list[str]:
    """Reasons to doubt a judge."""
    judge, found = _text(row, "judge"), []
    length, position = mapping(row.get("length")), mapping(row.get("position"))
    unparsed, readings = as_number(row.get("unparsed")) or 0, as_number(row.get("readings")) or 0
    if length.get("flagged") is True:
        rate = percent(as_number(length.get("controlled")))
        share = percent(as_number(mapping(length.get("longer")).get("share")))
        found.append(f"{judge} takes the longer reply in {share}; at equal length {rate}")
    first = as_interval(position.get("ci95"))
    if first is not None and not first[0] <= 0.5 <= first[1]:
        share = percent(as_number(position.get("share")))
        found.append(f"{judge} takes the reply shown first in {share} of readings")
    if unparsed:
        found.append(f"{judge}: {number(unparsed)} of {number(readings)} answers have no verdict")
    notes = mapping(row.get("notes")).items()
    return found + [f"{judge}: {number(as_number(count))} {what}" for what, count in notes]


def _tax(report: Mapping[str, Any]) -> list[str]:
    """The largest significant loss of capability, or that none was seen."""
    record = mapping(report.get("capability"))
    groups = listed(record.get("groups"))
    if not groups:
        return []
    lines = []
    for reading, models in mapping(groups[0].get("readings")).items():
        for model, row in mapping(models).items():
            if model != record.get("baseline") and reading in ("letter", "match"):
                p = as_number(mapping(row).get("mcnemar_p"))
                change = as_number(mapping(row).get("difference")) or 0.0
                lines.append(
                    f"Capability, {READINGS[reading]}: {model} {100 * change:+.1f} points against "
                    f"{record.get('baseline')} (p = {number(p)})"
                )
    return lines


def comparison_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per comparison, and below it one per question and per group of prompts."""
    rows = []
    for found in comparisons(report):
        name = f"{_text(found, 'candidate')} against {_text(found, 'baseline')}"
        rows.append(_row(found, name, _text(found, "judge"), main=True))
        questions = listed(found.get("questions"))
        parts = [(row, _text(row, "question")) for row in questions if len(questions) > 1]
        parts += [(row, _text(row, "group")) for row in listed(found.get("by"))]
        rows += [_row(row, label, "", main=False) for row, label in parts]
    return rows


def _row(row: Mapping[str, Any], name: str, judge: str, *, main: bool) -> dict[str, Any]:
    length, position = mapping(row.get("length")), mapping(row.get("position"))
    numbers = ("n", "num_prompts", "win_rate", "se", "sign_p", "detectable", "unparsed")
    needed = mapping(row.get("needed"))
    return {
        "name": clip(name, 120),
        "judge": clip(judge, 80),
        "main": main,
        **{key: as_number(row.get(key)) for key in numbers},
        "shares": [
            (
                as_number(mapping(row.get(side)).get("share")),
                as_interval(mapping(row.get(side)).get("ci95")),
            )
            for side in ("win", "tie", "lose")
        ],
        "ci95": as_interval(row.get("ci95")),
        "bootstrap95": as_interval(row.get("bootstrap95")),
        "needed": [as_number(needed.get(key)) for key in ("5", "10")],
        "first": as_number(position.get("share")),
        "longer": as_number(mapping(length.get("longer")).get("share")),
        "controlled": as_number(length.get("controlled")),
        "controlled_ci95": as_interval(length.get("controlled_ci95")),
    }


def agreement_rows(report: Mapping[str, Any]) -> dict[str, Any]:
    """Raters two by two, each against the others, and α of all."""
    record = mapping(report.get("agreement"))
    keys = ("n", "raw", "n_without_ties", "raw_without_ties", "kappa")
    pairs = [
        (" and ".join(str(name) for name in row.get("raters", [])), row)
        for row in listed(record.get("pairs"))
    ]
    others = [
        (f"{row.get('rater')} against the others", row)
        for row in listed(record.get("against_others"))
    ]
    rows = pairs if len(pairs) < 2 else pairs + others
    return {
        "alpha": as_number(record.get("alpha")),
        "rows": [
            {"raters": clip(name, 120)} | {key: as_number(row.get(key)) for key in keys}
            for name, row in rows
        ],
    }


def judged_figures(label: str, report: Mapping[str, Any]) -> list[Figure]:
    """Bars of every comparison and its groups; accuracy bars of each reading."""
    figures = []
    end = f", {label}" if label else ""
    for place, row in enumerate(comparisons(report)):
        parts = [("all", row)] + [(_text(g, "group"), g) for g in listed(row.get("by"))]
        bars = [bar for name, part in parts if (bar := _split(name, part)) is not None]
        title = f"{_text(row, 'candidate')} against {_text(row, 'baseline')}, {_text(row, 'judge')}"
        if bars:
            figures.append(win_tie_lose_bars(f"judged-{place}-{label}", title + end, bars))
    record = mapping(report.get("capability"))
    groups = listed(record.get("groups"))
    for reading, title in READINGS.items():
        held = [g for g in groups if reading in mapping(g.get("readings"))]
        cells = {
            str(model): [
                mapping(mapping(mapping(g.get("readings"))[reading]).get(model)) for g in held
            ]
            for model in record.get("models") or []
        }
        drawable = all(_is_cell(cell) for column in cells.values() for cell in column)
        if held and cells and drawable and reading != "text_sum":
            names = [str(group.get("group")) for group in held]
            name = f"capability-{reading}-{label}"
            figures.append(accuracy_bars(name, f"Accuracy, {title}{end}", names, cells))
    return figures


def capability_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per group, reading and model."""
    rows = []
    for group in listed(mapping(report.get("capability")).get("groups")):
        for reading, models in mapping(group.get("readings")).items():
            for model, row in mapping(models).items():
                cell = mapping(row)
                keys = ("n", "accuracy", "difference", "mcnemar_p")
                rows.append(
                    {"group": clip(str(group.get("group")), 80), "reading": READINGS.get(reading)}
                    | {"model": clip(str(model), 80)}
                    | {key: as_number(cell.get(key)) for key in keys}
                    | {key: as_interval(cell.get(key)) for key in ("ci95", "difference_ci95")}
                )
    return rows


def reply_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Whose replies were compared, how they were drawn, and oddities counted in them."""
    return [
        {
            "name": clip(str(row.get("name", "")), 80),
            "characters": as_number(row.get("characters_mean")),
            "sampling": _listed(mapping(row.get("sampling"))),
            "notes": _listed(mapping(row.get("notes"))),
        }
        for row in listed(report.get("replies"))
    ]


def _listed(values: Mapping[str, Any]) -> str:
    return clip(", ".join(f"{k}: {v}" for k, v in values.items() if v not in (None, [])), 200)


def judged_samples(
    report: Mapping[str, Any], limit: int, text_limit: int
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Pairs to read, by how they were chosen."""
    titles = {
        "random": "At random",
        "agreement": "Where judges agree most",
        "disagreement": "Where judges agree least",
    }
    found = mapping(report.get("judged_samples"))
    groups = [
        (title, [_sample(row, text_limit) for row in listed(found.get(key))[:limit]])
        for key, title in titles.items()
    ]
    return [group for group in groups if group[1]]


def _sample(row: Mapping[str, Any], text_limit: int) -> dict[str, Any]:
    sides = {key: mapping(row.get(key)) for key in ("a", "b")}
    names = {key: str(side.get("name", key)) for key, side in sides.items()} | {"tie": "tie"}
    said = [
        f"{judge}: {names.get(str(verdict), '')}"
        for judge, verdict in mapping(row.get("verdicts")).items()
    ]
    return {
        "id": clip(str(row.get("id", "")), 80),
        "prompt": turns(row.get("prompt"), text_limit),
        "verdicts": clip("; ".join(said), 300),
        "replies": [
            {"name": names[key], "text": clip(str(side.get("response", "")), text_limit)}
            for key, side in sides.items()
        ],
    }


def _split(name: str, row: Mapping[str, Any]) -> Split | None:
    win, tie, lose = (
        as_number(mapping(row.get(side)).get("share")) for side in ("win", "tie", "lose")
    )
    n = as_number(row.get("n"))
    if win is None or tie is None or lose is None or n is None:
        return None
    return Split(name, (win, tie, lose), int(n))


def _is_cell(row: Mapping[str, Any]) -> bool:
    return as_number(row.get("accuracy")) is not None and as_interval(row.get("ci95")) is not None


def _sign(row: Mapping[str, Any]) -> int:
    interval = as_interval(row.get("ci95"))
    return 0 if interval is None else 1 if interval[0] > 0.5 else -1 if interval[1] < 0.5 else 0


def _text(row: Mapping[str, Any], key: str) -> str:
    value = str(row.get(key, ""))
    return clip({"sft": "SFT", "ppo": "PPO"}.get(value, value), 60)
