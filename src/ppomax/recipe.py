"""A recipe: the settings of every stage of one run, each fed by the one before."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppomax import rundir
from ppomax.config import Settings, apply_overrides, merge, parse, read_yaml
from ppomax.errors import ConfigError
from ppomax.eval.policy_config import EvalConfig
from ppomax.presets import find_recipe, has_critic, with_preset, without_critic
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.resuming import changed_keys, harmful
from ppomax.train.reward import RewardConfig
from ppomax.train.sft import SFTConfig

STAGES = ("sft", "reward", "ppo", "eval")
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
    data = apply_overrides(data, overrides)
    _check_heeded(data, overrides)
    return resolve(data, str(path))


def _check_heeded(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """A shared key that is asked for must reach a stage.

    Raises:
        ConfigError: every stage sets its own.
    """
    for item in overrides:
        key = item.partition("=")[0]
        first, *_ = path = key.split(".")
        if first not in SHARED + TRAINED:
            continue
        may = [name for name in STAGES if isinstance(data.get(name), dict)]
        if first not in (*SHARED, "data", "heldout"):
            may = [name for name in may if name != "eval"]
        if may and all(_sets(data[name], path) for name in may):
            raise ConfigError(
                f"override {item!r} has no effect: {', '.join(may)} set their own; give "
                + " ".join(f"{name}.{key}=…" for name in may)
            )


def _sets(section: object, path: Sequence[str]) -> bool:
    """Whether a section has a value at the end of a path, or on the way."""
    for name in path:
        if not isinstance(section, dict):
            return True
        if name not in section:
            return False
        section = section[name]
    return True


def resolve(data: dict[str, Any], source: str) -> Recipe:
    """A recipe's raw mapping as settings: preset below, shared keys handed down, stages wired."""
    data = dict(data)
    out = str(data.get("out", "runs/" + Path(source).stem))
    data["out"] = os.path.expanduser(out)  # noqa: PTH111 - an unknown ~user stays as it is
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
        section["out"] = str(Path(data["out"]) / name)
        data[name] = section
    _wire(data, model, present, source)
    return parse(Recipe, data, source)


def _wire(data: dict[str, Any], model: object, present: list[str], source: str) -> None:
    """Fill each stage's models from the stages before it, or from the recipe's `model`."""
    out = Path(str(data["out"]))
    start = {"sft": model}
    sft = str(out / "sft" / "export") if "sft" in present else model
    start |= {"reward": sft, "ppo": sft}
    begins = data["ppo"].pop("start", "sft") if "ppo" in present else "sft"
    if begins not in ("sft", "base"):
        raise ConfigError(f"{source}: setting ppo.start: sft or base is wanted, found {begins!r}")
    if begins == "base":  # detail 9
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


def load_run(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run directory, as it was resolved.

    Args:
        overrides: `stage.key=value`, laid over it.

    Raises:
        ConfigError: no run there.
    """
    place = path / rundir.CONFIG
    if not place.exists():
        raise ConfigError(
            f"{path}: no run here (config.yaml is missing); name the directory that `out` named"
        )
    data = read_yaml(place)
    if "iterations" in data or "data" in data:  # one stage's directory: its parent holds the recipe
        if not (path.parent / rundir.CONFIG).exists():
            raise ConfigError(
                f"{path}: one stage, begun from Python; go on with it there, with the same "
                "settings and resume=True"
            )
        return load_run(path.parent, overrides)
    recipe = parse(Recipe, apply_overrides(data, list(overrides)), str(place))
    if recipe.out.resolve() != path.resolve():
        here = path.resolve()
        depth = len(recipe.out.parts)
        if not recipe.out.is_absolute() and here.parts[-depth:] == recipe.out.parts:
            start = Path(*here.parts[:-depth])
            raise ConfigError(
                f"{path}: the run's paths are relative to where it was started; go on with "
                f"`cd {start} && ppomax resume {recipe.out}`, or begin runs with an absolute out"
            )
        raise ConfigError(
            f"{path}: the run was made in {recipe.out}; a run resumes where it was made: move it "
            f"back, or leave a link there (ln -s {path.resolve()} {recipe.out})"
        )
    return recipe
