"""Reads run directories: what a stage wrote, of each step the last attempt. Writes nothing."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppomax.config import read_yaml
from ppomax.errors import ConfigError
from ppomax.rundir import ASKED, CONFIG, ENV, EVENTS, HELDOUT, METRICS, SAMPLES

STAGES = ("sft", "reward", "ppo", "eval")
REPORT = "report.json"
ROW_FIELDS = ("stage", "step", "time", "attempt")
"""What a metrics row holds beside metric keys."""
ALARMS = ("alarm", "rollback", "skip", "stop", "quarantine")
"""Words in the names of events that want to be looked at."""

Row = dict[str, Any]
Series = dict[str, tuple[list[float], list[float]]]


@dataclass(frozen=True, slots=True)
class RunData:
    """One stage's run directory."""

    path: Path
    stage: str
    """`sft`, `reward`, `ppo` or `eval` where that can be told, else the directory's name."""
    config: dict[str, Any]
    env: dict[str, Any]
    metrics: list[Row]
    """One row per step in order of step, the last attempt's."""
    series: Series
    """Steps and values of each metric key, in alphabetical order; keys of rows of another stage in
    the same file are written `stage: key`."""
    samples: list[Row]
    """Rows of the last attempt of their step, in the order written."""
    events: list[Row]
    """All rows: what happened in an undone attempt happened."""
    report: dict[str, Any] | None
    """An evaluation's own record, where there is one."""
    notes: tuple[str, ...]
    """What could not be read, for the reader of the report."""
    abandoned: Series = field(default_factory=dict)
    """The series of rows that rollbacks left behind."""
    heldout: list[Row] = field(default_factory=list)
    """Scores of the tracked prompts, one row per round, without abandoned ones."""
    elapsed: float | None = None
    """Seconds it ran."""


def read_runs(path: Path) -> list[RunData]:
    """The stages of a run in their order, or the one stage directory at `path`.

    A stage without a config of its own gets its part of the whole run's.

    Raises:
        ConfigError: no run there, or a config that is not YAML.
    """
    stages = [path / name for name in STAGES if _holds_run(path / name)]
    if not stages:
        return [read_run(path)]
    recipe = read_yaml(path / CONFIG) if (path / CONFIG).is_file() else {}
    runs = [read_run(stage) for stage in stages]
    return [run if run.config else replace(run, config=_part(recipe, run.stage)) for run in runs]


def read_run(path: Path) -> RunData:
    """One stage directory. A torn last line is left out; other unreadable lines are counted.

    Raises:
        ConfigError: no run there, or a config that is not YAML.
    """
    if not _holds_run(path):
        found = "holds no run" if path.is_dir() else "no such directory"
        raise ConfigError(
            f"run {path}: {found}; give a run directory ({METRICS}, {CONFIG} or {REPORT} in it, "
            f"or the stages {', '.join(STAGES)})"
        )
    notes: list[str] = []
    metrics = _with_step(_read_lines(path / METRICS, notes), notes)
    report = _read_object(path / REPORT, notes)
    if report is not None and report.get("kind") == "report":
        report = None
    stage, begins = _stage(path, metrics, report), _begins(metrics)
    left = [row for row in metrics if _is_abandoned(row, begins)]
    spent = elapsed([as_number(row.get("time")) for row in metrics])  # in the order written
    metrics = _last_attempts(metrics)
    heldout = [row for row in _read_lines(path / HELDOUT, notes) if _is_step(row.get("step"))]
    return RunData(
        path=path,
        stage=stage,
        config=read_yaml(path / CONFIG) if (path / CONFIG).is_file() else {},
        env=_read_object(path / ENV, notes) or {},
        metrics=metrics,
        series=_series(stage, metrics),
        samples=[
            row
            for row in _last_attempt_samples(_read_lines(path / SAMPLES, notes))
            if not (_is_step(row.get("step")) and _is_abandoned(row, begins))
        ],
        events=_read_lines(path / EVENTS, notes),
        report=report,
        notes=tuple(notes),
        abandoned=_series(stage, left),
        heldout=[row for row in heldout if not _is_abandoned(row, begins)],
        elapsed=spent,
    )


def as_number(value: object) -> float | None:
    """The value if it is a number (nan and infinities too), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def elapsed(times: Sequence[float | None]) -> float | None:
    """Seconds a stage ran, from the times of its rows.

    Times are seconds since the start, which begin anew when a run is continued by a new process,
    or clock times (past 1e9), whose first row's own time is unknown.
    """
    known = [time for time in times if time is not None and math.isfinite(time)]
    if not known:
        return None
    if known[0] > 1e9:
        return max(known) - known[0]
    before = [0.0, *known[:-1]]
    return sum(now - then if now >= then else now for then, now in zip(before, known, strict=True))


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def listed(value: object) -> list[Mapping[str, Any]]:
    """The mappings of a list; none if it is no list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def as_interval(value: object) -> tuple[float, float] | None:
    """Low and high if the value is a list of two numbers, else None."""
    parsed = [as_number(item) for item in value] if isinstance(value, list) else []
    if len(parsed) != 2 or parsed[0] is None or parsed[1] is None:
        return None
    return parsed[0], parsed[1]


def sides(report: Mapping[str, Any]) -> list[str]:
    """Names of baseline and policy, as they begin the keys of a report."""
    return [str(report.get(key) or name) for key, name in (("baseline", "sft"), ("policy", "ppo"))]


def is_alarm(what: str) -> bool:
    """Whether an event of this name wants to be looked at."""
    return any(word in what for word in ALARMS)


def event_name(row: Row) -> str:
    """What an event says it is."""
    return str(next((row[key] for key in ("event", "kind", "type") if row.get(key)), "event"))


def _holds_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (METRICS, CONFIG, REPORT, EVENTS))


def planned(path: Path) -> list[str]:
    """The stages a whole run is to have: those that were started in it, else its recipe's."""
    asked = (_read_object(path / ASKED, []) or {}).get("stages")
    recipe = read_yaml(path / CONFIG) if (path / CONFIG).is_file() else {}
    wanted = asked if isinstance(asked, list) else [k for k, v in recipe.items() if v is not None]
    return [name for name in STAGES if name in wanted]


def _part(recipe: dict[str, Any], stage: str) -> dict[str, Any]:
    part = recipe.get(stage)
    return part if isinstance(part, dict) else recipe


def _stage(path: Path, metrics: list[Row], report: dict[str, Any] | None) -> str:
    name = path.resolve().name
    if name in STAGES:
        return name
    named = Counter(str(row["stage"]) for row in metrics if "stage" in row)
    if named:
        return next((stage for stage in STAGES if stage in named), named.most_common(1)[0][0])
    return "eval" if report is not None else name


def _read_lines(path: Path, notes: list[str]) -> list[Row]:
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    torn = len(lines) if lines[-1].strip() and _parse(lines[-1]) is None else 0
    rows = {number: _parse(line) for number, line in enumerate(lines, start=1) if line.strip()}
    bad = [number for number, row in rows.items() if row is None and number != torn]
    if torn:
        notes.append(f"{path.name}: the last line was cut off and is left out")
    if bad:
        notes.append(f"{path.name}: {len(bad)} unreadable lines left out, the first is {bad[0]}")
    return [row for row in rows.values() if row is not None]


def _read_object(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = _parse(path.read_bytes())
    if found is None:
        notes.append(f"{path.name}: not a JSON object, left out")
    return found


def _parse(text: bytes) -> Row | None:
    try:
        row = json.loads(text.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _with_step(rows: list[Row], notes: list[str]) -> list[Row]:
    kept = [row for row in rows if _is_step(row.get("step"))]
    if len(kept) < len(rows):
        notes.append(f"{METRICS}: {len(rows) - len(kept)} rows without a step left out")
    return kept


def _is_step(value: object) -> bool:
    step = as_number(value)
    return step is not None and math.isfinite(step)


def _attempt(row: Row) -> float:
    return as_number(row.get("attempt")) or 0.0


def _last_attempts(rows: list[Row]) -> list[Row]:
    """Of each step the rows of its last attempt, joined to one.

    Steps that a later attempt has not come to yet are left out too: that stretch was abandoned.
    """
    joined: dict[tuple[str, float], Row] = {}
    begins = _begins(rows)
    for row in rows:
        if _is_abandoned(row, begins):
            continue
        place = (str(row.get("stage", "")), float(row["step"]))
        before = joined.get(place)
        if before is None or _attempt(row) > _attempt(before):
            joined[place] = row
        elif _attempt(row) == _attempt(before):
            joined[place] = {**before, **row}
    return sorted(joined.values(), key=lambda row: float(row["step"]))


def _begins(rows: list[Row]) -> dict[tuple[str, float], float]:
    """The first step of each attempt of each stage."""
    found: dict[tuple[str, float], float] = {}
    for row in rows:
        key, step = (str(row.get("stage", "")), _attempt(row)), float(row["step"])
        found[key] = min(found.get(key, step), step)
    return found


def _is_abandoned(row: Row, begins: Mapping[tuple[str, float], float]) -> bool:
    """Whether a later attempt went back to this step or before it."""
    stage, own, step = str(row.get("stage", "")), _attempt(row), float(row["step"])
    return any(
        name == stage and attempt > own and first <= step
        for (name, attempt), first in begins.items()
    )


def _series(stage: str, rows: list[Row]) -> Series:
    found: Series = {}
    for row in rows:
        prefix = "" if row.get("stage", stage) == stage else f"{row['stage']}: "
        step = float(row["step"])
        for key, value in row.items():
            parsed = as_number(value)
            if key in ROW_FIELDS or parsed is None:
                continue
            steps, values = found.setdefault(prefix + key, ([], []))
            steps.append(step)
            values.append(parsed)
    return dict(sorted(found.items()))


def _last_attempt_samples(rows: list[Row]) -> list[Row]:
    last: dict[Any, float] = {}
    for row in rows:
        step = str(row.get("step"))
        last[step] = max(last.get(step, 0.0), _attempt(row))
    return [row for row in rows if _attempt(row) == last[str(row.get("step"))]]
