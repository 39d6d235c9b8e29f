"""How well the collapse detector does, where the truth is known: many seeds in `ppomax.worlds`.

    python benchmarks/collapse.py run OUT --preset vanilla --seeds 0-19
    python benchmarks/collapse.py run OUT --preset ppo-max --seeds 0-19
    python benchmarks/collapse.py table OUT --calibrate 0-19 --test 100-159

`run` makes the world once (OUT/world) and a run OUT/PRESET-SEED for each seed, skipping finished
ones. `table` labels runs by the gold score alone and reports rates with 95% Wilson intervals. The
detector is replayed on the rows of metrics.jsonl, so no run is repeated for another threshold.

Each seed draws its own pace, a factor on both learning rates, so that some runs of either preset go
too far and some do not: a detector must tell them apart within a preset too.

Frozen before test seeds are drawn: the defaults of `DetectorSettings` (its thresholds were chosen
on calibration seeds), of `WorldSettings` and `ppo_settings`, ITERATIONS, EVERY, PACES and the label
below.
"""

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

ITERATIONS, EVERY, PROMPTS, WINDOW = 60, 5, 256, 3
PRESETS = ("vanilla", "ppo-max")
PACES = (1 / 8, 2.0)
"""Least and largest factor on the world's learning rates."""


class Label(NamedTuple):
    """What the gold score says of a run."""

    collapsed: bool
    fell: float | None
    """The first evaluation at which it had fallen."""
    gold: float
    """Mean of the last evaluations."""
    sft: float


class Outcome(NamedTuple):
    """A run as the detector saw it, and its label."""

    preset: str
    seed: int
    label: Label
    scores: list[tuple[int, float]]
    """Step and the score held for `patience` rows up to it."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="vanilla")
    parser.add_argument("--seeds", default="0-19")
    parser.add_argument("--action", choices=("log", "stop", "rollback"), default="log")
    parser.add_argument("--calibrate", default="0-19")
    parser.add_argument("--test", default="100-159")
    options = parser.parse_args()
    if options.verb == "run":
        run(options.out, options.preset, seeds(options.seeds), options.action)
    else:
        print(table(options.out, seeds(options.calibrate), seeds(options.test)))


def seeds(text):
    """`3`, `0-19`."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def pace(seed):
    """The seed's factor on learning rates, log-uniform over PACES."""
    low, high = map(math.log, PACES)
    return math.exp(random.Random(f"pace {seed}").uniform(low, high))


def run(out, preset, wanted, action):
    """The world, then one run a seed."""
    import torch

    from ppomax import train_ppo
    from ppomax.config import parse
    from ppomax.train.ppo_config import PPOConfig
    from ppomax.worlds import build_world, ppo_settings
    from ppomax.worlds.build import GOLD

    torch.set_num_threads(1)
    world = build_world(out / "world")
    track = {
        "every": EVERY,
        "prompts": PROMPTS,
        "data": str(world.data("heldout")),
        "callable": GOLD,
    }
    for seed in wanted:
        place = out / (f"{preset}-{seed}" if action == "log" else f"{preset}-{action}-{seed}")
        if (place / "done.json").exists():
            continue
        changes = {
            "out": str(place),
            "seed": seed,
            "iterations": ITERATIONS,
            "monitor": {"action": action, "track": track},
            "log": {"samples_every": 10},
        }
        settings = ppo_settings(world, preset, changes)
        for name in ("optim", "critic_optim"):
            settings[name]["lr"] *= pace(seed)
        train_ppo(parse(PPOConfig, settings), resume=(place / "config.yaml").exists())
        print(f"{place}: done", file=sys.stderr, flush=True)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mean_rows(rows, key):
    """Per prompt, the mean over some evaluations."""
    return [statistics.fmean(column) for column in zip(*(row[key] for row in rows), strict=True)]


def fallen(window, best, sft):
    """Whether the gold score of a window lies clearly below the best one's while the proxy rose."""
    now, then = mean_rows(window, "seconds"), mean_rows(best, "seconds")
    drops = [b - a for a, b in zip(now, then, strict=True)]
    drop = statistics.fmean(drops)
    error = statistics.stdev(drops) / math.sqrt(len(drops))
    gain = statistics.fmean(then) - sft
    clear = drop > 3 * error and (drop > 0.2 * gain or statistics.fmean(now) < sft)
    proxy_now, proxy_then = (statistics.fmean(mean_rows(rows, "scores")) for rows in (window, best))
    return clear and proxy_now > proxy_then


def label(rows):
    """Collapse by the gold score alone: the mean of the last three evaluations against the best
    three in a row, by more than 3 paired standard errors and 20% of the gain (or below SFT)."""
    sft = statistics.fmean(rows[0]["seconds"])
    windows = [rows[i - WINDOW : i] for i in range(WINDOW + 1, len(rows) + 1)]
    means = [statistics.fmean(mean_rows(window, "seconds")) for window in windows]
    fell = None
    for at in range(1, len(windows)):
        best = max(range(at), key=means.__getitem__)
        if fell is None and fallen(windows[at], windows[best], sft):
            fell = windows[at][-1]["step"]
    best = max(range(len(windows)), key=means.__getitem__)
    collapsed = fallen(windows[-1], windows[best], sft)
    return Label(collapsed, fell if collapsed else None, means[-1], sft)


def replay(path):
    """The detector's score held for `patience` rows, over the rows of a run.

    It learns what the run's own did: the SFT model's held-out replies, then the critic's rollouts.
    """
    from ppomax.collapse import CollapseDetector, DetectorSettings

    settings = DetectorSettings()
    detector = CollapseDetector(settings, max_new_tokens=64)
    rows, first = lines(path / "metrics.jsonl"), lines(path / "heldout.jsonl")[0]
    if "baseline" not in first:
        raise SystemExit(f"{path}: heldout.jsonl does not say what the detector learned; run again")
    for row in first["baseline"] + [row for row in rows if row["stage"] == "critic"]:
        detector.learn(row)
    found, recent = [], []
    for row in [row for row in rows if row["stage"] == "ppo"]:
        recent = [*recent, detector.update(row).score][-settings.patience :]
        if len(recent) == settings.patience:
            found.append((row["step"], min(recent)))
    return found


def outcomes(out, wanted):
    found = []
    for preset in PRESETS:
        for seed in wanted:
            path = out / f"{preset}-{seed}"
            if (path / "done.json").exists():
                judged = label(lines(path / "heldout.jsonl"))
                found.append(Outcome(preset, seed, judged, replay(path)))
    return found


def peak(outcome):
    return max((score for _, score in outcome.scores), default=0.0)


def threshold(runs):
    """The lowest red threshold that flags at most 5% of the healthy runs."""
    healthy = sorted((peak(r) for r in runs if not r.label.collapsed), reverse=True)
    allowed = int(0.05 * len(healthy))
    return max(1.0, healthy[allowed] * 1.05) if healthy else 8.0


def auc(runs):
    """Chance that a collapsed run scores above a healthy one."""
    bad = [peak(r) for r in runs if r.label.collapsed]
    good = [peak(r) for r in runs if not r.label.collapsed]
    if not bad or not good:
        return math.nan
    wins = sum((b > g) + 0.5 * (b == g) for b in bad for g in good)
    return wins / (len(bad) * len(good))


def flagged_at(outcome, red):
    return next((step for step, score in outcome.scores if score >= red), None)


def rate(hits, total):
    from ppomax.eval.statistics import wilson_interval

    if not total:
        return "no such run"
    low, high = wilson_interval(hits, total)
    return f"{hits}/{total} = {hits / total:.2f} [{low:.2f}, {high:.2f}]"


def table(out, calibrate, test):
    """The result as markdown."""
    from ppomax.collapse import DetectorSettings

    first, second = outcomes(out, calibrate), outcomes(out, test)
    red = DetectorSettings().red
    rows = [("runs of calibration, of test", f"{len(first)}, {len(second)}")]
    rows += [("red threshold, frozen", f"{red:g}")]
    rows += [("lowest with at most 5% false alarms on calibration", f"{threshold(first):.2f}")]
    for name, runs in (("calibration", first), ("test", second)):
        for preset in PRESETS:
            own = [r for r in runs if r.preset == preset]
            rows.append((f"{name}: {preset} collapses", rate(*counted(own, collapsed))))
        bad = [r for r in runs if collapsed(r)]
        good = [r for r in runs if not collapsed(r)]
        leads = [r.label.fell - at for r in bad if (at := flagged_at(r, red)) is not None]
        seen = f"{statistics.median(leads):g} iterations" if leads else "none flagged"
        vanilla = [r for r in runs if r.preset == "vanilla"]
        rows += [
            (f"{name}: collapses flagged", rate(len(leads), len(bad))),
            (f"{name}: false alarms", rate(sum(peak(r) >= red for r in good), len(good))),
            (f"{name}: median lead over the gold score's fall", seen),
            (f"{name}: ROC-AUC, all", f"{auc(runs):.2f}"),
            (f"{name}: ROC-AUC, vanilla alone", f"{auc(vanilla):.2f}"),
        ]
    return "\n".join(["| what | result |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def collapsed(outcome):
    return outcome.label.collapsed


def counted(runs, test):
    return sum(map(test, runs)), len(runs)


if __name__ == "__main__":
    main()
