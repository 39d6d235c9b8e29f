"""Replies to prompts and to people."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ppomax.data.batching import derived_seed
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, world
from ppomax.errors import ConfigError
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.models.names import system_of
from ppomax.rollout import Engine, EngineSettings, SamplingParams, build_engine
from ppomax.rollout.engine import check_prompts
from ppomax.types import Message, PromptRow
from ppomax.visible import visible


def compute_dtype(name: str) -> torch.dtype:
    """float32 or bfloat16 by name.

    Raises:
        ConfigError: another name.
    """
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"option dtype: {name!r} is not one of float32, bfloat16")
    return torch.float32 if name == "float32" else torch.bfloat16


def _engine(
    lm: PreTrainedModel, here: World, template: ChatTemplate, dtype: torch.dtype, slots: int
) -> Engine:
    """An engine, which takes the weights to the device."""
    return build_engine(EngineSettings(slots=slots), lm, template, here, dtype)


def generate_rows(
    model: str,
    rows: Sequence[PromptRow],
    params: SamplingParams,
    *,
    seed: int,
    dtype: str,
    system: str | None = None,
    held: Mapping[int, tuple[str, bool]] | None = None,
    began: Callable[[], None] | None = None,
    told: Callable[[int, str, bool, int], None] | None = None,
) -> list[dict[str, Any]]:
    """One reply per prompt, as rows {id, prompt, response, finished, model, sampling, seed}.

    Args:
        system: prompt for dialogues that have none; default the one the model was trained with.
        held: replies that are there already, by their prompt's index: text, and whether it ended
            by itself.
        began: called when the first reply is begun.
        told: called with each new reply as it ends: its prompt's index, text, whether it ended by
            itself, tokens.

    Raises:
        ModelError: a prompt leaves no position for a reply.
    """
    found = dict(held or {})
    left = [index for index in range(len(rows)) if index not in found]
    if left:
        with world() as here:
            own = system_of(model) if system is None else system
            template = ChatTemplate(load_tokenizer(model), own)
            lm = load_policy(model, dtype=compute_dtype(dtype))
            ids = [template.prompt(rows[index].messages) for index in left]
            positions = getattr(lm.config, "max_position_embeddings", None)
            if positions is not None:
                check_prompts(ids, positions, [rows[index].where for index in left])
            engine = _engine(lm, here, template, compute_dtype(dtype), 32)
            del lm

            def ended(place: int, reply: list[int], finished: bool) -> None:
                found[left[place]] = template.decode(reply), finished
                if told is not None:
                    told(left[place], *found[left[place]], len(reply))

            seeds = [derived_seed(seed, "generate", rows[index].id, index) for index in left]
            if began is not None:
                began()
            engine.generate(ids, params, seeds, ended)
    return [
        {
            "id": row.id,
            "prompt": list(row.messages),
            "response": found[index][0],
            "finished": found[index][1],
            "model": model,
            "sampling": params.model_dump(mode="json"),
            "seed": seed,
        }
        for index, row in enumerate(rows)
    ]


class Chat:
    """A dialogue with a model: keeps the history."""

    def __init__(
        self, model: str, params: SamplingParams, *, seed: int, system: str | None
    ) -> None:
        self.params, self.seed = params, seed
        self.history: list[Message] = []
        own = system_of(model) if system is None else system
        self.template = ChatTemplate(load_tokenizer(model), own)
        with world() as here:
            lm = load_policy(model, dtype=torch.float32)
            self.engine = _engine(lm, here, self.template, torch.float32, 1)

    def reply(self, text: str) -> str:
        """The model's answer, control characters spelled out: it cannot drive a terminal."""
        self.history.append(Message(role="user", content=text))
        ids = self.template.prompt(self.history)
        seed = derived_seed(self.seed, "chat", len(self.history))
        rollout = self.engine.generate([ids], self.params, [seed])
        answer = self.template.decode(rollout.responses[0])
        self.history.append(Message(role="assistant", content=answer))
        return visible(answer)
