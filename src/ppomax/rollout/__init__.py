"""Engines that answer prompts: one small protocol, two ways to fill it.

`native` runs Llama-type models with a cache and kernels of its own, `transformers` any
architecture.
"""

from ppomax.rollout.engine import Engine, EngineSettings, Rollout, build_engine
from ppomax.rollout.sampling import SamplingParams

__all__ = ["Engine", "EngineSettings", "Rollout", "SamplingParams", "build_engine"]
