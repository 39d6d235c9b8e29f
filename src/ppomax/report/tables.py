"""Tables of a report: start and end of metrics, events, samples, differences, timing.

Pure functions of what was read. Text is cut to a limit here and made visible by the page.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ppomax.monitors import DECLARED
from ppomax.report.read import (
    RunData,
    as_number,
    event_name,
    is_alarm,
    listed,
    sides,
)
from ppomax.report.text import clip, number

MAX_EVENTS = 60
"""Events of one name in one stage that are shown; the rest are counted."""
EVENT_FIELDS = ("event", "kind", "type", "step", "time", "stage")


def metric_rows(runs: Sequence[tuple[str, RunData]]) -> list[dict[str, Any]]:
    """Unit, start, end, least and greatest of every key, one cell per run (None: not there)."""
    units = {metric.key: metric.unit for metric in DECLARED}
    found = [run.series for _, run in runs]
    keys = sorted({key for keys in found for key in keys})
    return [
        {
            "key": key,
            "unit": units.get(key.split(": ")[-1], ""),
            "cells": [_cell(*keys[key]) if key in keys else None for keys in found],
        }
        for key in keys
    ]


def _cell(steps: list[float], values: list[float]) -> dict[str, float | int | None]:
    finite = [value for value in values if math.isfinite(value)]
    return {
        "start": values[0],
        "end": values[-1],
        "min": min(finite, default=None),
        "max": max(finite, default=None),
        "first_step": steps[0],
        "last_step": steps[-1],
        "rows": len(values),
    }


def differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings that are not the same everywhere: `key` and `values`, None where absent."""
    flat = [flatten(config) for config in configs]
    keys = sorted({key for config in flat for key in config})
    rows = [{"key": key, "values": [config.get(key) for config in flat]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `a.b.c` and text."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        elif isinstance(value, list):
            flat[path] = ", ".join(str(item) for item in value)
        else:
            flat[path] = "null" if value is None else str(value)
    return flat


def timing(run: RunData) -> dict[str, float | int | None]:
    """Rows, steps, seconds and where they went; throughput as a mean over rows."""
    keys = run.series
    finite = {
        key: [value for value in values if math.isfinite(value)]
        for key, (_, values) in keys.items()
    }
    sums = {f"{key}_s": sum(values) for key, values in finite.items() if key.startswith("time/")}
    means = {
        f"{key}_mean": sum(values) / len(values)
        for key, values in finite.items()
        if key.startswith("throughput/") and values
    }
    steps = [as_number(row.get("step")) for row in run.metrics]
    return {
        "rows": len(run.metrics),
        "last_step": steps[-1] if steps else None,
        "attempts": len({str(row.get("attempt")) for row in run.metrics}),
        "elapsed_s": run.elapsed,
        **sums,
        **means,
        **{f"{k}_max": max(v) for k, v in finite.items() if k.startswith("memory/") and v},
    }


def event_rows(run: RunData, text_limit: int) -> list[dict[str, Any]]:
    """Events in order: `time`, `step`, `what`, `details`, `alarm`; many of one name are cut."""
    totals = Counter(event_name(row) for row in run.events)
    seen: Counter[str] = Counter()
    rows = []
    for row in run.events:
        what = event_name(row)
        seen[what] += 1
        if seen[what] > MAX_EVENTS:
            continue
        details = flatten(
            {
                key: number(value) if isinstance(value, float) else value
                for key, value in row.items()
                if key not in EVENT_FIELDS
                and (key, value) != ("attempt", 0)
                and not (isinstance(value, list) and listed(value))  # shown as evidence
            }
        )
        text = ", ".join(f"{key}: {value}" for key, value in details.items())
        if seen[what] == MAX_EVENTS and totals[what] > MAX_EVENTS:
            text += f" (and {totals[what] - MAX_EVENTS:,} more of these in events.jsonl)"
        rows.append(
            {
                "stage": clip(str(row.get("stage", run.stage)), 20),
                "time": row.get("time"),
                "step": row.get("step"),
                "what": clip(what, 80),
                "details": clip(text, text_limit),
                "alarm": is_alarm(what),
            }
        )
    return rows


def pair_samples(report: Mapping[str, Any], limit: int, text_limit: int) -> list[dict[str, Any]]:
    """Replies of baseline and policy to the same prompts, the first `limit`."""
    return [
        {
            "id": clip(str(row.get("id", "")), 80),
            "prompt": turns(row.get("prompt"), text_limit),
            "replies": [
                {
                    "name": side,
                    "text": clip(str(row.get(side, "")), text_limit),
                    "score": as_number(row.get(f"{side}_score")),
                }
                for side in sides(report)
            ],
        }
        for row in listed(report.get("samples"))[:limit]
    ]


def training_samples(run: RunData, limit: int, text_limit: int) -> list[dict[str, Any]]:
    """Replies of the first, the middle and the last logged step, `limit` of each."""
    steps = list(dict.fromkeys(str(row.get("step")) for row in run.samples))
    wanted = dict.fromkeys([steps[place] for place in (0, len(steps) // 2, -1)] if steps else [])
    return [
        {
            "id": clip(str(row.get("id", "")), 80),
            "step": row.get("step"),
            "pick": clip(str(row.get("pick", "")), 20),
            "prompt": turns(row.get("prompt"), text_limit),
            "text": clip(str(row.get("response", "")), text_limit),
            "score": as_number(row.get("score")),
            "length": as_number(row.get("length")),
            "truncated": row.get("truncated") is True,
        }
        for step in wanted
        for row in [row for row in run.samples if str(row.get("step")) == step][:limit]
    ]


def evidence(run: RunData, text_limit: int) -> list[dict[str, Any]]:
    """Alarms with what they rest on: signals, since when, replies from before and from now."""
    return [
        {
            "stage": clip(str(row.get("stage", run.stage)), 20),
            "step": row.get("step"),
            "attempt": as_number(row.get("attempt")) or 0,
            "level": clip(str(row.get("level", "")), 20),
            "score": as_number(row.get("score")),
            "limits": [clip(str(text), 200) for text in row.get("limits") or []],
            "signals": [
                {
                    "signal": clip(str(signal.get("signal", "")), 60),
                    **{k: as_number(signal.get(k)) for k in ("deviation", "usually", "now")},
                    "since": as_number(signal.get("since")),
                }
                for signal in listed(row.get("signals"))
            ],
            "replies": [
                {
                    "name": f"{name}, step {reply.get('step')}",
                    "score": as_number(reply.get("score")),
                    "text": clip(str(reply.get("response", "")), text_limit),
                }
                for name in ("before", "now")
                for reply in listed(row.get(f"samples_{name}"))
            ],
        }
        for row in run.events
        if row.get("alarm") == "collapse" and is_alarm(event_name(row))
    ][:20]


def turns(prompt: object, text_limit: int) -> list[dict[str, str]]:
    """A prompt's messages as role and text; the last ones where it is long."""
    messages = listed(prompt) if isinstance(prompt, list) else [{"role": "", "content": prompt}]
    kept = [
        {
            "role": clip(str(m.get("role", "")), 40),
            "text": clip(str(m.get("content", "")), text_limit),
        }
        for m in messages[-4:]
    ]
    left_out = len(messages) - len(kept)
    note = [{"role": "", "text": f"({left_out} earlier messages)"}] if left_out else []
    return note + kept
