"""Shipped recipes and presets by name, and what of them a run without a critic leaves out."""

import importlib.resources
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ppomax.config import merge, read_yaml
from ppomax.errors import ConfigError


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


def shipped(name: str | None = None) -> list[str]:
    """Recipes and presets that come with the package, a line each; or the text of one.

    Raises:
        ConfigError: there is none of that name.
    """
    root = Path(str(importlib.resources.files("ppomax") / "recipes"))
    kinds = {
        "recipes, for ppomax run NAME:": sorted(root.glob("*.yaml")),
        "presets of PPO, for ppo.preset=NAME:": sorted((root / "presets").glob("*.yaml")),
    }
    if name is not None:
        texts = {place.stem: place for places in kinds.values() for place in places}
        if name not in texts:
            near = ", ".join(get_close_matches(name, texts, n=3, cutoff=0.0))
            raise ConfigError(f"{name}: no such recipe or preset; nearest are {near}")
        return [texts[name].read_text(encoding="utf-8").rstrip()]
    lines = []
    for title, places in kinds.items():
        lines.append(title)
        for place in places:
            first = place.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            lines.append(f"  {place.stem:<28}  {first}")
    return lines


def find_recipe(name: str) -> Path:
    """A path, or a shipped recipe's name with or without `recipes/` and `.yaml`."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(str(importlib.resources.files("ppomax") / "recipes"))
    found = shipped / f"{path.stem}.yaml"
    if path.parent.name in ("", "recipes") and found.exists():
        return found
    known = sorted(item.stem for item in shipped.glob("*.yaml"))
    near = get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"{name}: no such recipe file; {hint}shipped recipes: {', '.join(known)}")


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
