"""An evaluation by itself: asked for, written down as JSON and as a page, told in a few lines."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppomax import rundir
from ppomax.config import parse
from ppomax.distributed import world
from ppomax.errors import ConfigError
from ppomax.eval import capability
from ppomax.eval.capability import CapabilityConfig, evaluate_capability
from ppomax.eval.compare import compare_policies, lines_of
from ppomax.eval.extras import need
from ppomax.eval.harness import harness_lines, run_harness
from ppomax.eval.judges import JudgeConfig
from ppomax.eval.replies import names_of
from ppomax.models.load import load_tokenizer
from ppomax.report.evaluation import preference_lines
from ppomax.report.page import write_judged_report, write_preference_report
from ppomax.rollout import SamplingParams


def check_folder(out: Path) -> None:
    """Whether a report can be written there, before anything is computed; makes nothing.

    Raises:
        ConfigError: it is a run's folder, whose own report would be lost, or cannot be made.
    """
    if (out / rundir.CONFIG).exists():
        raise ConfigError(f"option out: {out} holds a run, with a report of its own; give another")
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(f"option out: {out} cannot be made or written ({there})")


def write_reward_evaluation(result: dict[str, Any], out: Path) -> list[str]:
    """Write `report.json` and `report.html` of `evaluate_reward`; lines for the terminal."""
    out.mkdir(parents=True, exist_ok=True)
    rundir.write_text(out / "report.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    write_preference_report(result, out / "report.html")
    return [*preference_lines(result), f"report: {out / 'report.html'}"]


def write_policy_evaluation(
    models: list[str],
    prompts: list[str],
    judges: list[JudgeConfig],
    out: Path,
    *,
    sampling: SamplingParams,
    seed: int,
    dtype: str,
    limit: int | None,
    rubrics: Path | None,
    dry_run: bool,
    say: Callable[[str], None],
) -> list[str]:
    """Judge, write `report.json` and `report.html` into `out`; lines for the terminal."""
    if not dry_run:
        check_folder(out)
    with world():
        result = compare_policies(
            models,
            prompts,
            judges,
            out,
            sampling=sampling,
            seed=seed,
            dtype=dtype,
            limit=limit,
            rubrics=rubrics,
            dry_run=dry_run,
            say=say,
        )
    if result is None or not result["comparisons"]:
        return []
    rundir.write_text(out / "report.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    write_judged_report(result, "Policies against each other", out / "report.html")
    return [*lines_of(result), f"report: {out / 'report.html'}"]


def write_capability_evaluation(
    models: list[str],
    settings: dict[str, Any],
    tasks: list[str],
    out: Path,
    *,
    dtype: str,
    say: Callable[[str], None],
) -> list[str]:
    """Ask, write `report.json` and `report.html` into `out`; lines for the terminal."""
    if not settings["data"] and not tasks:
        raise ConfigError("eval capability: give --data FILE or --lm-eval TASKS")
    check_folder(out)
    for model in models:
        load_tokenizer(model)  # a name that is wrong is found now, not behind the first model
    if tasks:
        need("lm_eval", "--lm-eval")
    named = dict(zip(names_of(models), models, strict=True))
    result: dict[str, Any] = {"kind": "capability"}
    lines: list[str] = []
    with world() as here:
        if settings["data"]:
            config = parse(CapabilityConfig, settings, "options")
            result["capability"] = evaluate_capability(
                named, config, dtype=dtype, say=say, keep=out / "answers"
            )
            lines += capability.lines_of(result["capability"])
        if tasks:
            result["harness"] = run_harness(
                named,
                tasks,
                shots=settings["shots"] or None,
                limit=settings["limit"],
                dtype=dtype,
                device=str(here.device),
            )
            lines += harness_lines(result["harness"])
    out.mkdir(parents=True, exist_ok=True)
    rundir.write_text(out / "report.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    write_judged_report(result, "Capability", out / "report.html")
    return [*lines, f"report: {out / 'report.html'}"]
