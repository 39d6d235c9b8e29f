"""SFT, reward model, PPO-max, evaluation and report, after Zheng et al. 2023 (2307.04964)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppomax.train.ppo import train_ppo
    from ppomax.train.reward import train_reward
    from ppomax.train.sft import train_sft

__all__ = ["train_ppo", "train_reward", "train_sft"]

_HOMES = {
    "train_sft": "ppomax.train.sft",
    "train_reward": "ppomax.train.reward",
    "train_ppo": "ppomax.train.ppo",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - modules are loaded when first asked for
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ppomax' has no attribute {name!r}")
