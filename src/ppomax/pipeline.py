"""A run: the stages of a recipe in order, less those that are finished, and the report."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ppomax import rundir
from ppomax.config import dump, parse, read_yaml
from ppomax.distributed import barrier, world
from ppomax.errors import CheckpointError, ConfigError, DataError, Interrupted, ModelError
from ppomax.eval.policy import evaluate_policy
from ppomax.eval.policy_config import EvalConfig
from ppomax.preflight import check_made
from ppomax.recipe import STAGES, Recipe
from ppomax.report.page import write_report
from ppomax.train.disk import refusals_told
from ppomax.train.loop import is_done
from ppomax.train.ppo import train_ppo
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.resuming import changed_keys, harmful
from ppomax.train.reward import RewardConfig, train_reward
from ppomax.train.sft import SFTConfig, train_sft
from ppomax.train.stopping import handling

"""In a run directory: the stages that were started there, and so are resumed."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run left."""

    out: Path
    report: Path


def run_recipe(
    recipe: Recipe,
    *,
    only: str | None = None,
    resume: bool = False,
    asked: bool = False,
    say: Callable[[str], None],
) -> Finished:
    """Run the stages in order, skipping those that are finished; ends with the report.

    Args:
        only: one stage's name; default all.
        resume: continue in an existing run directory.
        asked: only the stages that were asked for there before, and that the recipe still has.

    Raises:
        ConfigError: the directory holds a run and `resume` is off.
    """
    out = recipe.out
    stages = [only] if only else recipe.stages()
    if asked:
        left = recipe.stages()  # one that was not begun may have been taken out
        stages = [name for name in _asked(out, left) if name in left]
        if not stages:
            raise ConfigError(f"{out}: of the stages that were asked for there none is left")
    for name in stages:
        if getattr(recipe, name) is None:
            raise ConfigError(f"recipe has no stage {name}; it has {', '.join(recipe.stages())}")
    check_made(recipe, stages)
    # One process group for all stages: leaving and joining again may meet the one just left.
    device = getattr(recipe, stages[0]).device
    with _stoppable(out), refusals_told(out), world(device) as here, ExitStack() as held:
        if here.is_main:
            _open(recipe, only, held, resume=resume)
            _ask(out, stages)
        barrier(here)
        for name in stages:
            config = getattr(recipe, name)
            if is_done(config.out):
                say(f"{name}: finished before, kept")
                continue
            say(f"{name}: starting")
            try:
                _run_stage(config, resume=resume and (config.out / rundir.CONFIG).exists())
            except (ConfigError, DataError, ModelError):
                if here.is_main:  # the right settings are to find the place free
                    rundir.forget(config.out)
                    rundir.forget(out, rundir.ASKED)
                raise
            gc.collect()  # models in a trunk hold on to each other
        report = out / "report.html"
        if here.is_main:
            try:
                write_report([out], report)
            except ConfigError:  # something else's report lies there
                report = out / "run-report.html"
                write_report([out], report)
    return Finished(out, report)


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """Where no stage watches for signals (between them, in evaluation) one ends the run at once."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted(f"stopped at a signal; go on with `ppomax resume {out}`")

    with handling(stop):
        yield


def _run_stage(config: SFTConfig | RewardConfig | PPOConfig | EvalConfig, *, resume: bool) -> None:
    match config:
        case SFTConfig():
            train_sft(config, resume=resume)
        case RewardConfig():
            train_reward(config, resume=resume)
        case PPOConfig():
            train_ppo(config, resume=resume)
        case EvalConfig():
            evaluate_policy(config)


def _open(recipe: Recipe, only: str | None, held: ExitStack, *, resume: bool) -> None:
    """Make the run directory, or check the one there; its lock goes into `held`."""
    path = recipe.out / rundir.CONFIG
    if path.exists():
        _check_same(recipe, only, resume=resume)
    else:
        rundir.create(recipe.out, dump(recipe))
    lock = rundir.lock(recipe.out)
    if lock is not None:
        held.callback(lock.close)
    rundir.write_text(path, dump(recipe))


def _check_same(recipe: Recipe, only: str | None, *, resume: bool) -> None:
    """The run in the directory is one of this recipe, and was asked for.

    What a stage that was not begun is to do may have changed.

    Raises:
        ConfigError: it was not: nobody resumes.
        CheckpointError: it has other settings.
    """
    path = recipe.out / rundir.CONFIG
    if only is None and not resume:
        raise ConfigError(
            f"setting out: {recipe.out} already holds a run; continue it with "
            f"`ppomax resume {recipe.out}` or give another out=DIR"
        )
    changed = harmful(changed_keys(parse(Recipe, read_yaml(path)), recipe), prefixes=STAGES)
    begun = {name for name in STAGES if (recipe.out / name / rundir.CONFIG).exists()}
    changed = [key for key in changed if key.partition(".")[0] in begun | {"out"}]
    if resume and changed:
        raise CheckpointError(
            f"{path}: differs from the settings to resume with in {', '.join(changed)}; "
            "resume with the same, or give another out=DIR"
        )
    for name in [only] if only else recipe.stages():
        config = getattr(recipe, name)
        place = None if config is None else config.out / rundir.CONFIG
        if place is None or not place.exists():
            continue
        changed = harmful(changed_keys(parse(type(config), read_yaml(place)), config))
        if changed:
            raise CheckpointError(
                f"{config.out}: holds a run with other settings than these "
                f"({', '.join(changed)}); give another out=DIR"
            )


def _ask(out: Path, stages: list[str]) -> None:
    """Note that these stages were started in the run directory."""
    known = _asked(out, []) if (out / rundir.ASKED).exists() else []
    asked = [name for name in STAGES if name in {*known, *stages}]
    if asked != known:
        rundir.write_text(out / rundir.ASKED, json.dumps({"stages": asked}) + "\n")


def _asked(out: Path, default: list[str]) -> list[str]:
    """The stages started in a run directory, in order."""
    try:
        found = json.loads((out / rundir.ASKED).read_text(encoding="utf-8"))["stages"]
        return [name for name in STAGES if name in found]
    except (OSError, ValueError, KeyError, TypeError):
        return default
