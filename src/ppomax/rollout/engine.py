"""What an engine is: prompts in, replies with their log-probs out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from transformers import PreTrainedModel

from ppomax.config import Settings
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.errors import ModelError
from ppomax.rollout.sampling import SamplingParams


class EngineSettings(Settings):
    """Which engine answers and how many replies it writes at once."""

    kind: Literal["native", "transformers", "vllm"] = "native"
    """`native` falls back to `transformers` for architectures it does not know, and says so; `vllm`
    needs the extra of its name."""
    slots: int = Field(64, ge=1)
    """Replies written side by side; finished ones leave and waiting prompts take their place."""
    cuda_graphs: bool = True
    """On CUDA the native engine records its decoding steps and replays them: the same kernels, one
    launch a step."""
    kernels: bool = True
    """On the CPU the native engine reads and writes with kernels of its own, built once (in the
    cache folder) by the C++ compiler it finds; without one it uses PyTorch's operations, more
    slowly, and says so."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Replies in the order of their prompts; ids only, nothing is re-tokenised."""

    prompts: list[list[int]]
    responses: list[list[int]]
    """Token ids, the end-of-turn token included where the reply ended."""
    logprobs: list[list[float]]
    """Of each response token under the distribution it was drawn from."""
    finished: list[bool]
    """Ended by the end-of-turn token or a stop string; False means cut at the limit."""

    @property
    def sequences(self) -> list[list[int]]:
        """Each prompt with its reply, as the models read them."""
        return [p + r for p, r in zip(self.prompts, self.responses, strict=True)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt with its reply."""
        return [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]


Told = Callable[[int, list[int], bool], None]
"""Called when a reply ends: the prompt's index, the reply's ids, whether it ended by itself."""


class Engine(Protocol):
    """Anything that answers prompts."""

    note: str | None
    """What a user should know of the choice of engine."""

    def sync(self, model: PreTrainedModel) -> None:
        """Take over the model's present weights (collective under sharding)."""

    def release(self) -> None:
        """Let go of them until the next `sync`, where that leaves memory to others."""

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        told: Told | None = None,
    ) -> Rollout:
        """One reply per prompt; a reply depends on its prompt, its seed and the weights.

        Args:
            told: called with each reply, as soon as the engine knows that it has ended.

        Raises:
            ModelError: a prompt leaves no position for a reply.
        """


@contextmanager
def synced(engine: Engine, model: PreTrainedModel) -> Iterator[Engine]:
    """The engine with the model's present weights, held no longer than replies are written."""
    engine.sync(model)
    try:
        yield engine
    finally:
        engine.release()


def build_engine(
    settings: EngineSettings,
    model: PreTrainedModel,
    template: ChatTemplate,
    world: World,
    dtype: torch.dtype,
) -> Engine:
    """The engine asked for, with the model's weights.

    Args:
        model: a causal LM as `transformers` builds it, possibly with adapters, possibly sharded.
        dtype: of the matrix products, float32 or bfloat16.

    Raises:
        ConfigError: vLLM is asked for and not there, or cannot do what is asked.
    """
    from ppomax.rollout import native, transformers_engine, vllm_engine

    if settings.kind == "vllm":
        return vllm_engine.VllmEngine(settings, model, template, world, dtype)
    if settings.kind == "native" and native.supports(model):
        return native.NativeEngine(settings, model, template, world, dtype)
    engine = transformers_engine.TransformersEngine(settings, model, template, world, dtype)
    if settings.kind == "native":
        engine.note = (
            f"the native engine does not compute this {model.config.model_type} model; "
            "the transformers engine answers instead, more slowly"
        )
    return engine


def merge_rollouts(parts: list[Rollout], count: int) -> Rollout:
    """The ranks' shares (every size-th prompt) back in the order of the prompts."""
    size = len(parts)
    places = [divmod(index, size) for index in range(count)]
    return Rollout(
        prompts=[parts[rank].prompts[row] for row, rank in places],
        responses=[parts[rank].responses[row] for row, rank in places],
        logprobs=[parts[rank].logprobs[row] for row, rank in places],
        finished=[parts[rank].finished[row] for row, rank in places],
    )


def check_prompts(
    prompts: list[list[int]], max_positions: float, places: Sequence[str] | None = None
) -> None:
    """Every prompt leaves a position for a reply.

    Args:
        places: where each is from, `file:line`.

    Raises:
        ModelError: one does not.
    """
    lengths = list(map(len, prompts))
    longest = max(lengths, default=0)
    if longest >= max_positions:
        more = sum(length >= max_positions for length in lengths) - 1
        row = lengths.index(longest)
        name = f"prompt {row + 1} of {len(prompts)}" if places is None else f"{places[row]}: prompt"
        raise ModelError(
            f"{name} has {longest} tokens, the model {max_positions} positions for prompt and reply"
            + (f" ({more} more do not fit either)" if more else "")
            + "; give shorter prompts"
        )
