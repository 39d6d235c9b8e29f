"""Engines that answer prompts: one small protocol, three ways to fill it.

`native` runs Llama-type models with a cache and kernels of its own, `transformers` any
architecture, `vllm` whatever vLLM runs, where it is installed.
"""

from ppomax.rollout.engine import Engine, EngineSettings, Rollout, build_engine
from ppomax.rollout.sampling import SamplingParams

__all__ = ["Engine", "EngineSettings", "Rollout", "SamplingParams", "build_engine"]
