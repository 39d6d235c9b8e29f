"""Which figures a report shows: panels of each stage, score histograms, calibration.

Each comes with a text alternative. How they are drawn is in `drawing`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppomax.report.drawing import Figure, Line, curves, histograms, reliability
from ppomax.report.read import RunData, as_number, event_name, listed, mapping
from ppomax.report.text import number, percent, signed


class Axis(NamedTuple):
    """One set of axes of a panel: metric keys that share a scale."""

    name: str
    keys: tuple[str, ...]
    band: tuple[str, str] | None = None
    """Keys of the band around the first key, drawn for a single run."""


class Panel(NamedTuple):
    """A figure of a stage's report."""

    title: str
    axes: tuple[Axis, ...]


PANELS: dict[str, tuple[Panel, ...]] = {
    "sft": (
        Panel("Loss", (Axis("nats per token", ("sft/loss", "eval/loss")),)),
        Panel("Perplexity", (Axis("perplexity", ("sft/perplexity",)),)),
    ),
    "reward": (
        Panel(
            "Loss",
            (
                Axis("pair loss", ("reward/pair_loss", "eval/loss")),
                Axis("with LM term", ("reward/loss",)),
            ),
        ),
        Panel("Accuracy", (Axis("share of pairs", ("reward/accuracy", "eval/accuracy")),)),
    ),
    "ppo": (
        Panel(
            "Score",
            (
                Axis(
                    "score",
                    ("reward/score_mean",),
                    ("reward/score_p05", "reward/score_p95"),
                ),
            ),
        ),
        Panel("KL to the reference", (Axis("nats per token", ("kl/ref_k3",)),)),
        Panel("Perplexity of its own replies", (Axis("perplexity", ("policy/perplexity",)),)),
        Panel("Response length", (Axis("tokens", ("response/length_mean",)),)),
        Panel(
            "Losses",
            (Axis("policy loss", ("policy/loss",)), Axis("value loss", ("value/loss",))),
        ),
        Panel("Explained variance of the critic", (Axis("share", ("value/explained_variance",)),)),
        Panel(
            "Held-out prompts: proxy and second scorer",
            (
                Axis("proxy", ("heldout/score_mean",)),
                Axis("second scorer", ("heldout/second_mean",)),
                Axis("share against SFT", ("heldout/win", "heldout/tie", "heldout/lose")),
            ),
        ),
        Panel(
            "Repetition",
            (
                Axis("share", ("response/distinct_2", "response/repetition_4")),
                Axis("cut at the limit", ("response/truncated_share",)),
            ),
        ),
        Panel(
            "Critic pre-training",
            (
                Axis("value loss", ("critic: value/loss",)),
                Axis("explained variance", ("critic: value/explained_variance",)),
            ),
        ),
    ),
}
"""The curves of each stage; the first six of PPO are figures 4 and 9 of Zheng et al. 2023."""


DISTRIBUTIONS = 4
"""Steps whose score distributions are drawn over each other."""


def stage_figures(stage: str, runs: Sequence[tuple[str, RunData]]) -> list[Figure]:
    """The curves of one stage, of all runs in the same axes; panels without data are left out."""
    data = [(label, run.series) for label, run in runs]
    figures = []
    for panel in PANELS.get(stage, ()):
        axes = [(axis.name, _lines(axis, data)) for axis in panel.axes]
        axes = [(name, lines) for name, lines in axes if lines]
        if axes:
            name = f"{stage}-{panel.title}"
            marks = _alarm_steps(_stage_of(panel, stage), runs[0][1]) if len(runs) == 1 else []
            figures.append(curves(name, panel.title, axes, marks))
    spread = [score_distributions(label if len(runs) > 1 else "", run) for label, run in runs]
    return figures + [figure for figure in spread if figure is not None]


def _lines(axis: Axis, data: Sequence[tuple[str, dict[str, Any]]]) -> list[Line]:
    """One line per run and key: colour and marker by run, dash by key, where there are several."""
    lines: list[Line] = []
    several_runs, several_keys = len(data) > 1, len(axis.keys) > 1
    for run, (label, keys) in enumerate(data):
        for dash, key in enumerate(axis.keys):
            if key not in keys:
                continue
            both = f"{label}: {key}" if several_keys else label
            steps, values = keys[key]
            line = Line(both if several_runs else key, steps, values, run, dash)
            if not several_runs or not several_keys:
                line = line._replace(color=len(lines), dash=len(lines))
            if axis.band and not several_runs and all(edge in keys for edge in axis.band):
                low, high = (_at(line.steps, keys[edge]) for edge in axis.band)
                line = line._replace(low=low, high=high)
            lines.append(line)
    return lines


def _at(steps: Sequence[float], curve: tuple[list[float], list[float]]) -> list[float]:
    known = dict(zip(*curve, strict=True))
    return [known.get(step, float("nan")) for step in steps]


def _stage_of(panel: Panel, stage: str) -> str:
    """Whose steps the panel counts; keys name a stage that shares the file."""
    other, named, _ = panel.axes[0].keys[0].partition(": ")
    return other if named else stage


def _alarm_steps(stage: str, run: RunData) -> list[float]:
    words = ("alarm", "rollback")
    own = [row for row in run.events if row.get("stage", run.stage) == stage]
    rows = [row for row in own if any(word in event_name(row) for word in words)]
    steps = {as_number(row.get("step")) for row in rows}
    return sorted(step for step in steps if step is not None and np.isfinite(step))[:50]


def score_histogram(label: str, report: Mapping[str, Any]) -> Figure | None:
    """Scores of the baseline's and the policy's replies to the same prompts."""
    scores = mapping(report.get("scores"))
    sets = [(str(name), _finite(values)) for name, values in scores.items()]
    sets = [(name, values) for name, values in sets if len(values)]
    if not sets:
        return None
    low = min(float(values.min()) for _, values in sets)
    high = max(float(values.max()) for _, values in sets)
    edges = np.linspace(low, high if high > low else low + 1, 31)
    counted = [(name, np.histogram(values, edges)[0].tolist(), edges) for name, values in sets]
    each = as_number(report.get("samples_per_prompt")) or 1
    what = "replies" if each == 1 else f"prompts, means of {number(each)} replies"
    parts = [f"{name} mean {number(float(v.mean()))} over {len(v):,} {what}" for name, v in sets]
    title = "Scores of replies" + (f", {label}" if label else "")
    return histograms(f"scores-{label}", title, "score", counted, f"{title}: {'; '.join(parts)}.")


def score_distributions(label: str, run: RunData) -> Figure | None:
    """Scores of the tracked prompts at a few steps: figure 13 of Zheng et al. 2023."""
    rows = [(row, _finite(row.get("scores"))) for row in run.heldout]
    rows = [(row, values) for row, values in rows if len(values)]
    if len(rows) < 2:
        return None
    places = sorted(
        {round(i * (len(rows) - 1) / (DISTRIBUTIONS - 1)) for i in range(DISTRIBUTIONS)}
    )
    shown = [rows[place] for place in places]
    low = min(float(values.min()) for _, values in shown)
    high = max(float(values.max()) for _, values in shown)
    edges = np.linspace(low, high if high > low else low + 1, 31)
    sets = [
        (f"step {number(row['step'])}", np.histogram(values, edges)[0].tolist(), edges)
        for row, values in shown
    ]
    parts = [
        f"step {number(row['step'])}: mean {number(float(values.mean()))}, 95th percentile "
        f"{number(float(np.quantile(values, 0.95)))}"
        for row, values in shown
    ]
    title = "Scores of the same held-out prompts by step" + (f", {label}" if label else "")
    alt = f"{title}, {len(shown[0][1])} prompts. {'; '.join(parts)}."
    return histograms(f"heldout-{label}", title, "score", sets, alt)


def difference_figure(label: str, result: Mapping[str, Any]) -> Figure | None:
    """Chosen minus rejected score over preference pairs: figure 2 of Zheng et al. 2023."""
    histogram = mapping(result.get("histogram"))
    counts, edges = _finite(histogram.get("counts")), _finite(histogram.get("edges"))
    if not len(counts) or len(edges) != len(counts) + 1:
        return None
    share = as_number(mapping(result.get("accuracy")).get("accuracy"))
    title = "Score difference, preferred minus other answer" + (f", {label}" if label else "")
    alt = (
        f"{title}: {number(float(counts.sum()))} pairs, mean "
        f"{signed(as_number(histogram.get('mean')))}, median "
        f"{signed(as_number(histogram.get('median')))}; {percent(share)} lie right of zero."
    )
    sets = [("pairs", counts, edges)]
    return histograms(f"differences-{label}", title, "score difference", sets, alt)


def subset_figures(label: str, result: Mapping[str, Any]) -> list[Figure]:
    """Figure 2 by subset: one drawing per column, its values over each other."""
    columns: dict[str, list[Mapping[str, Any]]] = {}
    for row in listed(result.get("histograms")):
        columns.setdefault(str(row.get("column", "")), []).append(row)
    figures = []
    for column, rows in columns.items():
        sets, parts = [], []
        for row in rows:
            counts, edges = _finite(row.get("counts")), _finite(row.get("edges"))
            if len(counts) and len(edges) == len(counts) + 1:
                value = str(row.get("value", ""))
                sets.append((value, counts / max(counts.sum(), 1), edges))
                parts.append(f"{value} mean {signed(as_number(row.get('mean')))}")
        if sets:
            title = f"Score difference by {column}" + (f", {label}" if label else "")
            alt = f"{title}, as shares of each: {'; '.join(parts)}."
            name = f"differences-{label}-{column}"
            figures.append(
                histograms(name, title, "score difference", sets, alt, ylabel="share of pairs")
            )
    return figures


def answers_figure(label: str, result: Mapping[str, Any]) -> Figure | None:
    """Scores of the answers people preferred and of the others."""
    found = mapping(result.get("score_histogram"))
    edges = _finite(found.get("edges"))
    sides = [("preferred", "chosen"), ("other", "rejected")]
    sets = [(name, _finite(found.get(key)), edges) for name, key in sides]
    if any(not len(counts) or len(edges) != len(counts) + 1 for _, counts, _ in sets):
        return None
    means = [
        as_number(mapping(mapping(result.get("scores")).get(key)).get("mean")) for _, key in sides
    ]
    title = "Scores of both answers" + (f", {label}" if label else "")
    alt = f"{title}: preferred mean {number(means[0])}, other mean {number(means[1])}."
    return histograms(f"answers-{label}", title, "score", sets, alt)


def best_of_n_figure(label: str, result: Mapping[str, Any]) -> Figure | None:
    """Gold and proxy score of the proxy's best of n replies, over the KL that choosing costs."""
    found = mapping(result.get("best_of_n"))
    kl, gold, proxy = (_finite(found.get(key)).tolist() for key in ("kl", "gold", "proxy"))
    if not len(kl) == len(gold) == len(proxy) > 0:
        return None
    title = "Best of n replies" + (f", {label}" if label else "")
    axes = [
        ("gold score", [Line("judged by the gold scorer", kl, gold)]),
        ("own score", [Line("judged by the model", kl, proxy, 1, 1)]),
    ]
    return curves(f"best-of-n-{label}", title, axes, xlabel="nats from the sampler: ln n - (n-1)/n")


def reliability_figure(label: str, result: Mapping[str, Any]) -> Figure | None:
    """How often the model is right over how sure it is."""
    calibration = mapping(result.get("calibration"))
    rows = [row for row in listed(calibration.get("reliability")) if _is_bin(row)]
    if not rows:
        return None
    title = "Confidence and accuracy" + (f", {label}" if label else "")
    first, last = rows[0], rows[-1]
    alt = (
        f"{title}: the least sure {number(first.get('n'))} pairs have confidence "
        f"{percent(first['confidence'])} and accuracy {percent(first['accuracy'])}, the surest "
        f"{percent(last['confidence'])} and {percent(last['accuracy'])}."
    )
    return reliability(f"reliability-{label}", title, rows, alt)


def _finite(values: object) -> NDArray[np.float64]:
    parsed = [as_number(value) for value in values] if isinstance(values, list) else []
    kept = [value for value in parsed if value is not None and np.isfinite(value)]
    return np.array(kept, dtype=np.float64)


def _is_bin(row: Mapping[str, Any]) -> bool:
    interval = row.get("ci95")
    numbers = [row.get("confidence"), row.get("accuracy")]
    numbers += interval if isinstance(interval, list) and len(interval) == 2 else [None]
    parsed = [as_number(value) for value in numbers]
    return all(value is not None and np.isfinite(value) for value in parsed)
