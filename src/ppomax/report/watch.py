"""`ppomax watch`: a run in the terminal, live, finished or crashed, with its panels as sparklines.

Reads files only. What a model wrote is text without markup here, its escapes made visible, so that
nothing in it can drive the terminal.
"""

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ppomax.report.figures import PANELS
from ppomax.report.read import RunData, as_number, event_name, is_alarm, planned, read_runs
from ppomax.report.text import clip, duration, number, visible
from ppomax.report.verdict import verdict
from ppomax.rundir import EVENTS, METRICS

BLOCKS = "▁▂▃▄▅▆▇█"
QUIET = 120.0
"""Seconds without a new row after which a run is said to be quiet: stopped, or in a long step."""
NUM_ALARMS, NUM_SAMPLES = 6, 3


def watch(path: Path, *, every: float, console: Console, once: bool = False) -> None:
    """Show the run until it is done or the user leaves; once where the output is no terminal.

    Raises:
        ConfigError: no run there.
    """
    if once or not console.is_terminal:
        console.print(view(path, console.width))
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(view(path, console.width), refresh=True)
            if state(path, read_runs(path)) == "finished":
                return
            time.sleep(every)


def view(path: Path, width: int, now: float | None = None) -> RenderableType:
    """The run as it stands: the curves of PPO, or else of the newest stage that has some."""
    runs = read_runs(path)
    run = max(runs, key=lambda run: (bool(run.metrics), run.stage == "ppo", written(run)))
    standing = state(path, runs, now)
    head = Text(f"{one_line(run.stage)}, {progress(run)}, {standing}", style="bold")
    head.append(f"  {duration(run.elapsed)}" if run.elapsed is not None else "", style="dim")
    others = [other.stage for other in runs if other is not run]
    parts: list[RenderableType] = [head, Text(one_line(str(path))[-width:], style="dim")]
    if others:
        parts.append(Text(f"also here: {', '.join(map(one_line, others))}", style="dim"))
    if any(found.report is not None for found in runs):
        said = f"eval: {one_line(verdict(runs)['headline'])}"
        parts.append(Text(said, no_wrap=True, overflow="ellipsis"))
    return Group(*parts, panels(run, width), *alarms(run, width), *samples(run, width))


def state(path: Path, runs: Sequence[RunData], now: float | None = None) -> str:
    """`finished`, `running`, or how long nothing has been written.

    Args:
        runs: what `read_runs` found at the path; a whole run has stages that have yet to begin.
    """
    ended = {
        run.path for run in runs if (run.path / "done.json").exists() or run.report is not None
    }
    wanted = {run.path for run in runs}
    if path not in wanted:
        wanted |= {path / name for name in planned(path)}
    if wanted <= ended:
        return "finished"
    since = (time.time() if now is None else now) - max(map(written, runs))
    return "running" if since < QUIET else f"nothing written for {duration(since)}"


def progress(run: RunData) -> str:
    """Steps done, of how many where the settings say."""
    steps = [as_number(row.get("step")) for row in run.metrics if row.get("stage") == run.stage]
    done = number(steps[-1] if steps else 0)
    total = as_number(run.config.get("iterations"))
    attempts = {number(as_number(row.get("attempt"))) for row in run.metrics}
    more = f", attempt {max(attempts)}" if len(attempts) > 1 else ""
    return f"step {done}{f' of {number(total)}' if total else ''}{more}"


def written(run: RunData) -> float:
    """When the run's files last changed."""
    files = [run.path / METRICS, run.path / EVENTS, run.path / "config.yaml", run.path]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def panels(run: RunData, width: int) -> Table:
    """One line per curve: key, sparkline, first and last value."""
    table = Table.grid(padding=(0, 2), pad_edge=False)
    room = max(10, min(60, width - 62))
    keys = [key for panel in PANELS.get(run.stage, ()) for axis in panel.axes for key in axis.keys]
    for key in [key for key in keys if key in run.series] or list(run.series)[:12]:
        _, values = run.series[key]
        line = Text(sparkline(values, room), style="cyan")
        table.add_row(Text(clip(one_line(key), 34)), line, Text(_span(values), style="bold"))
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """Means of equal stretches as blocks from the least to the greatest; a gap for no number."""
    if not values:
        return ""
    count = min(width, len(values))
    cuts = [round(place * len(values) / count) for place in range(count + 1)]
    means = []
    for start, end in itertools.pairwise(cuts):
        kept = [value for value in values[start:end] if math.isfinite(value)]
        means.append(sum(kept) / len(kept) if kept else math.nan)
    known = [mean for mean in means if not math.isnan(mean)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    size = high - low
    return "".join(
        " " if math.isnan(m) else BLOCKS[min(7, int(8 * (m - low) / size)) if size > 0 else 0]
        for m in means
    )


def alarms(run: RunData, width: int) -> list[RenderableType]:
    """The latest events that want to be looked at."""
    rows = [row for row in run.events if is_alarm(event_name(row))][-NUM_ALARMS:]
    return [
        Text(
            clip(f"step {row.get('step')}  {one_line(_told(row))}", max(40, width)), style="yellow"
        )
        for row in rows
    ]


def samples(run: RunData, width: int) -> list[RenderableType]:
    """The latest replies, a line each."""
    return [
        Text.assemble(
            (f"{number(as_number(row.get('score')))}  ", "bold"),
            clip(one_line(str(row.get("response", ""))), max(40, width - 12)),
        )
        for row in run.samples[-NUM_SAMPLES:]
    ]


def one_line(text: str) -> str:
    """A text on one line, its escapes, direction marks and invisible characters spelled out."""
    return visible(" ".join(text.split()))


def _told(row: dict[str, Any]) -> str:
    name = event_name(row)
    signals = row.get("signals")
    if isinstance(signals, list):
        words = [str(s.get("signal", "")) for s in signals if isinstance(s, dict)]
        limits = row.get("limits")
        return f"{name}: {', '.join(words or map(str, limits if isinstance(limits, list) else []))}"
    reason = next((row[key] for key in ("reason", "note", "alarm") if row.get(key)), "")
    return f"{name}: {reason}" if reason else name


def _span(values: Sequence[float]) -> str:
    return f"{number(values[0])} → {number(values[-1])}"
