"""The report page: one HTML file that needs nothing else, and the numbers beside it as JSON.

Everything in it was written by a model, a person or a run: text is escaped by the template engine
and made visible, no attribute holds data, there is no script, and a policy in the page forbids it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ppomax.errors import ConfigError
from ppomax.report import evaluation, judged, tables
from ppomax.report.drawing import Figure
from ppomax.report.figures import (
    answers_figure,
    best_of_n_figure,
    difference_figure,
    reliability_figure,
    score_histogram,
    stage_figures,
    subset_figures,
)
from ppomax.report.read import STAGES, RunData, as_number, listed, mapping, read_runs
from ppomax.report.text import between, clip, duration, percent, shown, signed
from ppomax.report.verdict import preference_verdict, verdict
from ppomax.rundir import write_text

MAX_BYTES = 5_000_000
TITLES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "ppo": "PPO"} | {
    "eval": "Evaluation"
}
TEXT_LIMITS = (3000, 800, 150, 30)
"""Characters of one shown text; the first under which the page keeps to its size is taken."""
NUM_SAMPLES = 12
"""Prompts shown side by side, over all runs."""

Run = tuple[str, list[RunData]]
"""A label and the stages of one run."""


def write_report(runs: list[Path], out: Path) -> Path:
    """Write the page of one or several runs to `out` and its numbers to `out` as `.json`.

    Same run directories, same bytes.

    Raises:
        ConfigError: no run in a directory, `out` does not end in .html or cannot be written, or
            the JSON beside it is an evaluation's own record.
    """
    if not runs:
        raise ConfigError("report: no run given; name one or more run directories")
    read = [(label, read_runs(path)) for label, path in zip(labels(runs), runs, strict=True)]
    numbers = _numbers_path(out)
    _write(numbers, json.dumps(as_json(report_numbers(read)), indent=1) + "\n")
    fixed = _fixed(read)
    _write(out, _fitting(lambda limit: _render("report.html.j2", fixed | _texts(read, limit))))
    return out


def write_preference_report(result: Mapping[str, Any], out: Path) -> Path:
    """Write the page of `ppomax.eval.reward.evaluate_reward`'s result to `out`.

    Raises:
        ConfigError: `out` cannot be written.
    """
    several = result.get("kind") == "comparison"
    found = listed(result.get("models")) if several else [result]
    names = [clip(str(one.get("model") or "the model"), 120) for one in found]
    fixed = {
        "title": "Reward models on preference pairs"
        if several
        else "Reward model on preference pairs",
        "comparisons": evaluation.comparison_rows(result),
        "notes": [
            *evaluation.left_out_lines(result),
            *(str(note) for note in result.get("notes") or () if several),
        ],
        "models": [
            _judged(name if several else "", one) for name, one in zip(names, found, strict=True)
        ],
    }

    def render(limit: int) -> str:
        worst = [evaluation.worst_pairs(one, limit) for one in found]
        return _render("preference.html.j2", fixed | {"worst": worst})

    _write(out, _fitting(render))
    return out


def _judged(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of one reward model."""
    best = mapping(result.get("best_of_n"))
    return {
        "name": name,
        "verdict": {"label": name, **preference_verdict(result)},
        "pairs": evaluation.pair_rows(result),
        "differences": evaluation.difference_rows(result),
        "figures": _pair_figures(name, result),
        "calibration": evaluation.calibration_rows(result),
        "lengths": evaluation.length_rows(result),
        "longer": evaluation.longer_rows(result),
        "scores": evaluation.score_rows(result),
        "ensemble": tables.flatten(mapping(result.get("ensemble"))),
        "gold": clip(str(best.get("judge", "")), 120),
        "prompts": as_number(best.get("num_prompts")),
        "best_of_n": evaluation.best_of_n_rows(result),
    }


def _pair_figures(name: str, result: Mapping[str, Any]) -> list[Figure]:
    drawn = [difference_figure(name, result), *subset_figures(name, result)]
    drawn += [answers_figure(name, result), reliability_figure(name, result)]
    drawn += [best_of_n_figure(name, result)]
    return [figure for figure in drawn if figure is not None]


def write_judged_report(result: Mapping[str, Any], title: str, out: Path) -> None:
    """Write the page of `ppomax eval policy` or `ppomax eval capability` to `out`.

    Raises:
        ConfigError: `out` cannot be written.
    """
    found = judged.judged_verdict(result)
    fixed = {
        "title": title,
        "verdicts": [{"label": "", **found}] if found else [],
        "evaluation": _evaluation("", result),
        "replies": judged.reply_rows(result),
    }

    def render(limit: int) -> str:
        samples = judged.judged_samples(result, NUM_SAMPLES // 2, limit)
        return _render("judged.html.j2", fixed | {"samples": samples})

    _write(out, _fitting(render))


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; numbered where nothing does."""
    full = [path.resolve().parts[1:] or ("run",) for path in paths]
    for depth in range(1, max(map(len, full)) + 1):
        names = ["/".join(parts[-depth:]) for parts in full]
        if len(set(names)) == len(names):
            return names
    return [f"{parts[-1]} ({index})" for index, parts in enumerate(full, start=1)]


def report_numbers(runs: Sequence[Run]) -> dict[str, Any]:
    """Every number of the report: series, starts and ends, evaluation, timing, differences."""
    return {
        "kind": "report",
        "runs": [
            {
                "label": label,
                "verdict": verdict(stages),
                "stages": [_stage_numbers(run) for run in stages],
            }
            for label, stages in runs
        ],
        "config_differences": _config_differences(runs),
    }


def _stage_numbers(run: RunData) -> dict[str, Any]:
    return {
        "stage": run.stage,
        "timing": tables.timing(run),
        "summary": {row["key"]: row["cells"][0] for row in tables.metric_rows([(run.stage, run)])},
        "metrics": {
            key: {"step": steps, "value": values} for key, (steps, values) in run.series.items()
        },
        "abandoned": {
            key: {"step": steps, "value": values} for key, (steps, values) in run.abandoned.items()
        },
        "heldout": run.heldout,
        "num_events": len(run.events),
        "alarms": [row for row in tables.event_rows(run, 2000) if row["alarm"]],
        "evidence": tables.evidence(run, 2000),
        "evaluation": run.report,
        "config": run.config,
        "env": run.env,
        "notes": list(run.notes),
    }


def as_json(value: Any) -> Any:  # noqa: ANN401 - any tree of YAML and JSON values
    """The value with what JSON cannot hold replaced: nan and infinities by null, dates by text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _fixed(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page shows however little room there is: verdicts, figures, numbers."""
    return {
        "title": runs[0][0] if len(runs) == 1 else f"{len(runs)} runs",
        "labels": [label for label, _ in runs],
        "verdicts": [{"label": label, **verdict(stages)} for label, stages in runs],
        "evaluations": _evaluations(runs),
        "stages": [_section(stage, runs) for stage in _stage_order(runs)],
        "timings": _per_stage(runs, tables.timing),
        "notes": [note for note in _per_stage(runs, lambda run: run.notes) if note[1]],
    }


def _texts(runs: Sequence[Run], limit: int) -> dict[str, Any]:
    """What the page shows cut to a limit: events, samples, settings, environment."""
    short = min(limit, 500)
    return {
        "events": [
            {"label": label, **row}
            for label, stages in runs
            for run in stages
            for row in tables.event_rows(run, short)
        ],
        "alarms": [
            {"label": label, **row}
            for label, stages in runs
            for run in stages
            for row in tables.evidence(run, short)
        ],
        "samples": _samples(runs, limit),
        "config_differences": [
            {**row, "values": [value and clip(value, short) for value in row["values"]]}
            for row in _config_differences(runs)
        ],
        "configs": _per_stage(runs, lambda run: _yaml(run.config, limit * 10)),
        "environments": _per_stage(runs, lambda run: _clipped(tables.flatten(run.env), short)),
    }


def _section(stage: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Figures and the metric table of one stage, of every run that has it."""
    found = [(label, run) for label, stages in runs for run in stages if run.stage == stage]
    return {
        "name": stage,
        "title": TITLES.get(stage, stage),
        "labels": [label for label, _ in found],
        "figures": stage_figures(stage, found),
        "metrics": tables.metric_rows(found),
    }


def _evaluations(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Evaluation records with their tables and figures."""
    records = [
        (label, run, run.report)
        for label, stages in runs
        for run in stages
        if run.report is not None
    ]
    return [
        _evaluation(_record_name(label, run, len(runs) > 1, len(records) > len(runs)), report)
        for label, run, report in records
    ]


def _record_name(label: str, run: RunData, several_runs: bool, several_stages: bool) -> str:
    parts = ([label] if several_runs else []) + ([run.stage] if several_stages else [])
    return ", ".join(parts)


def _evaluation(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    drawn = [
        draw(name, report) for draw in (score_histogram, difference_figure, reliability_figure)
    ]
    return {
        "name": name,
        "num_prompts": as_number(report.get("num_prompts")),
        "each": as_number(report.get("samples_per_prompt")) or 1,
        "scorers": evaluation.scorer_rows(report),
        "policies": evaluation.policy_rows(report),
        "groups": evaluation.group_rows(report),
        "pairs": evaluation.pair_rows(report),
        "comparisons": judged.comparison_rows(report),
        "agreement": judged.agreement_rows(report),
        "capability": judged.capability_rows(report),
        "judged_figures": judged.judged_figures(name, report),
        "figures": [figure for figure in drawn if figure is not None],
    }


def _samples(runs: Sequence[Run], limit: int) -> list[dict[str, Any]]:
    """Replies to look at, of each stage that has any."""
    each = max(2, NUM_SAMPLES // len(runs))
    groups = [
        {
            "label": label,
            "stage": run.stage,
            "pairs": tables.pair_samples(mapping(run.report), each, limit),
            "total": len(listed(mapping(run.report).get("samples"))),
            "judged": judged.judged_samples(mapping(run.report), each // 2, limit),
            "training": tables.training_samples(run, max(3, each // 3), limit),
        }
        for label, stages in runs
        for run in stages
    ]
    return [group for group in groups if group["pairs"] or group["training"] or group["judged"]]


def _stage_order(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(run.stage for _, stages in runs for run in stages)
    known = [stage for stage in STAGES if stage in names]
    return known + [stage for stage in names if stage not in STAGES]


def _config_differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings that differ between runs, stage by stage; a stage some run lacks is left out."""
    rows: list[dict[str, Any]] = []
    for stage in _stage_order(runs):
        configs = [run.config for _, stages in runs for run in stages if run.stage == stage]
        if len(configs) == len(runs) > 1:
            rows += [{"stage": stage, **row} for row in tables.differences(configs)]
    return rows


def _per_stage(runs: Sequence[Run], show: Callable[[RunData], Any]) -> list[tuple[str, Any]]:
    """What `show` gives of each stage of each run, under a name that tells them apart."""
    return [
        (f"{label} / {run.stage}" if len(runs) > 1 else run.stage, show(run))
        for label, stages in runs
        for run in stages
    ]


def _yaml(config: Mapping[str, Any], limit: int) -> str:
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return clip(text, limit) if config else ""


def _clipped(values: Mapping[str, str], limit: int) -> dict[str, str]:
    return {clip(key, limit): clip(value, limit) for key, value in values.items()}


def _render(template: str, context: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ppomax.report", "templates"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        signed=signed,
        duration=duration,
        between=between,
        cut=lambda text: clip(text, 120),
    )
    return environment.get_template(template).render(context)


def _fitting(render: Callable[[int], str]) -> str:
    """The page with texts as long as its size allows."""
    for limit in TEXT_LIMITS:
        page = render(limit)
        if len(page.encode()) <= MAX_BYTES:
            break
    return page


def _numbers_path(out: Path) -> Path:
    if out.suffix.lower() not in {".html", ".htm"}:
        raise ConfigError(f"report --out {out}: the page is HTML; give a name that ends in .html")
    path = out.with_suffix(".json")
    try:
        kind = json.loads(path.read_bytes()).get("kind") if path.is_file() else "report"
    except (ValueError, AttributeError, OSError):
        kind = None
    if kind != "report":
        raise ConfigError(
            f"report --out {out}: {path} is not a report's and would be lost; give another name"
        )
    return path


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"report --out {path}: cannot be written ({error.strerror})") from None
