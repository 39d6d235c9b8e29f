"""A recipe: the stages of one run, in order, each fed by the one before."""

import importlib.resources
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

from ppomax import rundir
from ppomax.config import Settings, apply_overrides, dump, merge, parse, read_yaml
from ppomax.distributed import barrier, world
from ppomax.errors import CheckpointError, ConfigError, Interrupted
from ppomax.eval import capability
from ppomax.eval.capability import CapabilityConfig, evaluate_capability
from ppomax.eval.compare import compare_policies, lines_of
from ppomax.eval.harness import harness_lines, run_harness
from ppomax.eval.judges import JudgeConfig
from ppomax.eval.policy import EvalConfig, evaluate_policy
from ppomax.eval.replies import names_of
from ppomax.report.evaluation import preference_lines
from ppomax.report.page import write_judged_report, write_preference_report, write_report
from ppomax.rollout import SamplingParams
from ppomax.train.loop import is_done
from ppomax.train.ppo import train_ppo
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.resuming import changed_keys, harmful
from ppomax.train.reward import RewardConfig, train_reward
from ppomax.train.sft import SFTConfig, train_sft
from ppomax.train.stopping import handling

STAGES = ("sft", "reward", "ppo", "eval")
ASKED = "asked.json"
"""In a run directory: the stages that were started there, and so are resumed."""
SHARED = ("seed", "device", "dtype", "threads", "system", "trust_remote_code")
"""Top-level keys that every stage takes unless it sets its own."""
TRAINED = (
    "deterministic",
    "freeze_embeddings",
    "freeze_layers",
    "gradient_checkpointing",
    "max_length",
    "micro_tokens",
    "max_bad_rows",
    "checkpoint",
    "log",
    "data",
    "heldout",
)
"""Top-level keys that the training stages take too."""


class Recipe(Settings):
    """Everything a run needs; complete once read, so that running it again is the same run."""

    out: Path
    """Run directory; each stage has its own inside."""
    sft: SFTConfig | None = None
    reward: RewardConfig | None = None
    ppo: PPOConfig | None = None
    eval: EvalConfig | None = None

    def stages(self) -> list[str]:
        """Names of the stages it holds, in order."""
        return [name for name in STAGES if getattr(self, name) is not None]


def same_run(recipe: Recipe) -> Recipe:
    """The run that stands in `recipe.out`, if it is one of this recipe.

    Raises:
        ConfigError: it is another one.
    """
    found = load_run(recipe.out)
    changed = harmful(changed_keys(found, recipe), prefixes=STAGES)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"{recipe.out} holds a run with other settings ({', '.join(changed[:3])}{more}); give "
            f"another directory, or go on with that one by `ppomax resume {recipe.out}`"
        )
    return found


def load_recipe(path: str, overrides: list[str]) -> Recipe:
    """Read a recipe file (or a shipped one, by name), apply overrides, wire the stages.

    Raises:
        ConfigError: see `config.parse`; also no stage, or no model.
    """
    data = read_yaml(find_recipe(path))
    ppo = data.get("ppo")
    asked = apply_overrides({}, overrides).get("ppo")
    if isinstance(ppo, dict) and isinstance(asked, dict) and not has_critic(asked):
        data["ppo"] = without_critic(ppo)  # so that one override asks what a critic is worth
    return resolve(apply_overrides(data, overrides), str(path))


def has_critic(ppo: Mapping[str, Any]) -> bool:
    """Whether a raw `ppo` section estimates advantages with a critic."""
    advantage = ppo.get("advantage")
    return not isinstance(advantage, dict) or advantage.get("estimator", "gae") == "gae"


def without_critic(ppo: Mapping[str, Any]) -> dict[str, Any]:
    """A raw `ppo` section less what only a critic reads."""
    alone = {"critic", "critic_pretraining", "critic_optim"}
    inner = {"advantage": {"lam", "lam_critic"}, "loss": {"value_clip"}}
    result = {key: value for key, value in ppo.items() if key not in alone}
    for name, keys in inner.items():
        section = result.get(name)
        if isinstance(section, dict):
            result[name] = {key: value for key, value in section.items() if key not in keys}
    return result


def find_recipe(name: str) -> Path:
    """A path, or a shipped recipe's name with or without `recipes/` and `.yaml`."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(str(importlib.resources.files("ppomax") / "recipes"))
    found = shipped / f"{path.stem}.yaml"
    if path.parent.name in ("", "recipes") and found.exists():
        return found
    known = ", ".join(sorted(item.stem for item in shipped.glob("*.yaml")))
    raise ConfigError(f"{name}: no such recipe file; shipped recipes: {known}")


def resolve(data: dict[str, Any], source: str) -> Recipe:
    """A recipe's raw mapping as settings: preset below, shared keys handed down, stages wired."""
    data = dict(data)
    data.setdefault("out", "runs/" + Path(source).stem)
    shared = {key: data.pop(key) for key in SHARED if key in data}
    trained = {key: data.pop(key) for key in TRAINED if key in data}
    model = data.pop("model", None)
    present = [name for name in STAGES if data.get(name) is not None]
    if not present:
        raise ConfigError(f"{source}: no stage; give at least one of {', '.join(STAGES)}")
    for name in present:
        if not isinstance(data[name], dict):
            raise ConfigError(
                f"{source}: setting {name}: a stage is a section of settings, found {data[name]!r}"
            )
        section = merge(shared, data[name])
        if name != "eval":
            own = {key: trained[key] for key in trained if key != "data" or "data" not in section}
            section = merge(own, section)
        elif "data" in trained and section.get("data", trained["data"]) == trained["data"]:
            section = merge(
                {key: trained[key] for key in ("data", "heldout") if key in trained}, section
            )
        if name == "ppo":
            section = with_preset(section, source)
        section["out"] = str(Path(str(data["out"])) / name)
        data[name] = section
    _wire(data, model, present, source)
    return parse(Recipe, data, source)


def with_preset(section: dict[str, Any], source: str) -> dict[str, Any]:
    """`ppo` settings laid over the preset they name (`ppo-max` unless said)."""
    section = dict(section)
    return _laid_over(_preset(str(section.pop("preset", "ppo-max")), source, ()), section)


def _preset(name: str, source: str, above: tuple[str, ...]) -> dict[str, Any]:
    """A preset's settings laid over those of its `base`, if it names one.

    Args:
        above: presets that are being read, each the base of the one before.
    """
    if name in above:
        chain = " -> ".join((*above, name))
        raise ConfigError(f"{source}: setting ppo.preset: bases lead in a circle: {chain}")
    folder = Path(str(importlib.resources.files("ppomax") / "recipes")) / "presets"
    place = folder / f"{name}.yaml"
    if not place.exists():
        known = sorted(item.stem for item in folder.glob("*.yaml"))
        near = ", ".join(get_close_matches(name, known, n=3, cutoff=0.0))
        raise ConfigError(
            f"{source}: setting ppo.preset: no preset {name!r} among {len(known)}; nearest are "
            f"{near}"
        )
    own = read_yaml(place)
    base = own.pop("base", None)
    return own if base is None else _laid_over(_preset(str(base), source, (*above, name)), own)


def _laid_over(preset: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    return merge(preset if has_critic(section) else without_critic(preset), section)


def _wire(data: dict[str, Any], model: object, present: list[str], source: str) -> None:
    """Fill each stage's models from the stages before it, or from the recipe's `model`."""
    out = Path(str(data["out"]))
    start = {"sft": model}
    sft = str(out / "sft" / "export") if "sft" in present else model
    start |= {"reward": sft, "ppo": sft}
    if "ppo" in present and data["ppo"].pop("start", "sft") == "base":  # detail 9
        start["ppo"] = model
        data["ppo"].setdefault("reference", sft)
    for name in ("sft", "reward", "ppo"):
        if name in present and "model" not in data[name]:
            if start[name] is None:
                raise ConfigError(
                    f"{source}: setting model is missing; give a folder, hub id, smollm2-135m "
                    "or tiny"
                )
            data[name]["model"] = start[name]
    reward = str(out / "reward" / "export") if "reward" in present else None
    settings = data["ppo"].setdefault("reward", {}) if "ppo" in present else {}
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{source}: setting ppo.reward: a section of settings is wanted, found {settings!r}"
        )
    sources = ("model", "models", "callable", "callables", "process")
    if "ppo" in present and reward and not any(settings.get(name) for name in sources):
        settings["model"] = reward
    if "eval" in present:
        section = data["eval"]
        ppo = data.get("ppo") or {}
        if not section.get("baseline"):
            section["baseline"] = ppo.get("reference") or ppo.get("model") or sft
        if not section.get("policy"):
            section["policy"] = str(out / "ppo" / "export")
        trained_on = settings.get("model") or _first_of(settings.get("models"))
        proxy = trained_on or reward
        scorers = section.get("scorers") or []
        listed = isinstance(scorers, list) and all(isinstance(item, dict) for item in scorers)
        if proxy and listed and not any(item.get("role") == "proxy" for item in scorers):
            role = "proxy" if trained_on or "ppo" not in present else "held-out"
            own = {"model": proxy, "name": "reward model", "role": role}
            section["scorers"] = [own, *scorers]


def _first_of(models: object) -> str | None:
    """The first of `ppo.reward.models` that the evaluation can read, before they are checked."""
    for item in models if isinstance(models, list) else []:
        entry = {"model": item} if isinstance(item, str) else item
        if isinstance(entry, dict) and not entry.get("retokenize") and entry.get("model"):
            return str(entry["model"])
    return None


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
        asked: only the stages that were started there before.

    Raises:
        ConfigError: the directory holds a run and `resume` is off.
    """
    out = recipe.out
    stages = [only] if only else recipe.stages()
    if asked:
        stages = _asked(out, recipe.stages())
    for name in stages:
        if getattr(recipe, name) is None:
            raise ConfigError(f"recipe has no stage {name}; it has {', '.join(recipe.stages())}")
    # One process group for all stages: leaving and joining again may meet the one just left.
    with _stoppable(out), world(getattr(recipe, stages[0]).device) as here:
        if here.is_main:
            _open(recipe, only, resume=resume)
            _ask(out, stages)
        barrier(here)
        for name in stages:
            config = getattr(recipe, name)
            if is_done(config.out):
                say(f"{name}: finished before, kept")
                continue
            say(f"{name}: starting")
            _run_stage(config, resume=resume and (config.out / rundir.CONFIG).exists())
        report = out / "report.html"
        if here.is_main:
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


def _open(recipe: Recipe, only: str | None, *, resume: bool) -> None:
    path = recipe.out / rundir.CONFIG
    text = dump(recipe)
    if not path.exists():
        rundir.create(recipe.out, text)
        return
    if only is None and not resume:
        raise ConfigError(
            f"setting out: {recipe.out} already holds a run; continue it with "
            f"`ppomax resume {recipe.out}` or give another out=DIR"
        )
    changed = harmful(changed_keys(parse(Recipe, read_yaml(path)), recipe), prefixes=STAGES)
    if resume and changed:
        raise CheckpointError(
            f"{path}: differs from the settings to resume with in {', '.join(changed)}"
        )
    for name in [only] if only else recipe.stages():
        config = getattr(recipe, name)
        if config is None:
            continue
        place = config.out / rundir.CONFIG
        if not place.exists():
            continue
        changed = harmful(changed_keys(parse(type(config), read_yaml(place)), config))
        if changed:
            raise CheckpointError(
                f"{config.out}: holds a run with other settings than these "
                f"({', '.join(changed)}); give another out=DIR"
            )
    rundir.write_text(path, text)


def _ask(out: Path, stages: list[str]) -> None:
    """Note that these stages were started in the run directory."""
    known = _asked(out, []) if (out / ASKED).exists() else []
    asked = [name for name in STAGES if name in {*known, *stages}]
    if asked != known:
        rundir.write_text(out / ASKED, json.dumps({"stages": asked}) + "\n")


def _asked(out: Path, default: list[str]) -> list[str]:
    """The stages started in a run directory, in order."""
    try:
        found = json.loads((out / ASKED).read_text(encoding="utf-8"))["stages"]
        return [name for name in STAGES if name in found]
    except (OSError, ValueError, KeyError, TypeError):
        return default


def load_run(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run directory, as it was resolved.

    Args:
        overrides: `stage.key=value`, laid over it.

    Raises:
        ConfigError: no run there.
    """
    place = path / rundir.CONFIG
    if not place.exists():
        raise ConfigError(f"{path}: no run here (config.yaml is missing)")
    data = read_yaml(place)
    if "iterations" in data or "data" in data:  # one stage's directory: its parent holds the recipe
        return load_run(path.parent, overrides)
    recipe = parse(Recipe, apply_overrides(data, list(overrides)), str(place))
    if recipe.out.resolve() != path.resolve():
        raise ConfigError(
            f"{path}: the run was made in {recipe.out}; resume it from the same working directory, "
            "where that path leads to it"
        )
    return recipe


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
    named = dict(zip(names_of(models), models, strict=True))
    result: dict[str, Any] = {"kind": "capability"}
    lines: list[str] = []
    with world() as here:
        if settings["data"]:
            config = parse(CapabilityConfig, settings, "options")
            result["capability"] = evaluate_capability(named, config, dtype=dtype, say=say)
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
