"""Small worlds in which the worth of a reply is known, to test claims and calibrate monitors on.

`build_world` makes a folder: a tiny policy fine-tuned on middling replies, a reward model *learned*
from noisy comparisons of that policy's own replies, prompts, held-out prompts and text. What PPO
finds in that reward model is its natural flaw; none is written into it.
"""

from ppomax.worlds.build import World, WorldSettings, build_world, ppo_settings
from ppomax.worlds.language import Gold, gold, gold_scores

__all__ = [
    "Gold",
    "World",
    "WorldSettings",
    "build_world",
    "gold",
    "gold_scores",
    "ppo_settings",
]
