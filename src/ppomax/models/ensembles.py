"""A folder that stands for several models: `ensemble.json` lists their folders."""

import json
from pathlib import Path

from ppomax.errors import ModelError
from ppomax.models.export import REWARD_CARD_FILE, read_reward_card

ENSEMBLE_FILE = "ensemble.json"
"""`{"members": ["member-0", ...]}`; paths are relative to its folder."""


def standards(names: list[str]) -> list[tuple[float, float]]:
    """Mean and std that make members' scores comparable, from their cards; (0, 1) for one alone.

    Raises:
        ModelError: a member of several has no card.
    """
    if len(names) == 1:
        return [(0.0, 1.0)]
    found = []
    for name in names:
        if not (Path(name) / REWARD_CARD_FILE).is_file():
            raise ModelError(f"{name}: no {REWARD_CARD_FILE}, which makes members comparable")
        card = read_reward_card(Path(name))
        found.append((card.score_mean, max(card.score_std, 1e-6)))
    return found


def members(name: str) -> list[str]:
    """The models that a name stands for: the members its folder lists, else itself.

    Raises:
        ModelError: the list cannot be read, is empty, or names a folder that is not there.
    """
    folder = Path(name).expanduser()
    path = folder / ENSEMBLE_FILE
    if not name or not path.is_file():
        return [name]
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["members"]
    except (OSError, ValueError, TypeError, KeyError):
        listed = None
    named = isinstance(listed, list) and all(isinstance(member, str) for member in listed)
    if not named or not listed or len(set(listed)) < len(listed):
        raise ModelError(f'{path}: wanted {{"members": [different folders]}}')
    gone = [member for member in listed if not (folder / member / "config.json").is_file()]
    if gone:
        raise ModelError(f"{path}: member {gone[0]!r} is no model folder")
    return [str(folder / member) for member in listed]
