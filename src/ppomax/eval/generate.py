"""Replies to files and to people."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppomax.data.batching import derived_seed
from ppomax.data.sources import SourceConfig, load_prompts
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, world
from ppomax.errors import ConfigError
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.models.names import system_of
from ppomax.rollout import Engine, EngineSettings, SamplingParams, build_engine
from ppomax.rundir import write_text
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
    model: str, here: World, template: ChatTemplate, dtype: torch.dtype, slots: int
) -> Engine:
    lm = load_policy(model, dtype=dtype)  # the engine takes the weights to the device
    return build_engine(EngineSettings(slots=slots), lm, template, here, dtype)


def generate_file(
    model: str,
    prompts: str,
    out: Path,
    params: SamplingParams,
    *,
    seed: int,
    dtype: str,
    limit: int | None,
    system: str | None = None,
) -> int:
    """Answer every prompt of a file; returns how many.

    Args:
        system: prompt for dialogues that have none; default the one the model was trained with.

    Writes JSONL rows {id, prompt, response, finished, model, sampling, seed}.
    """
    rows = load_prompts([SourceConfig(path=prompts)]).rows[:limit]
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"option out: {out} cannot be written; name a file in a folder there is")
    lines = [
        json.dumps(reply, ensure_ascii=False)
        for reply in generate_rows(model, rows, params, seed=seed, dtype=dtype, system=system)
    ]
    try:
        if out.exists() and not out.is_file():  # /dev/stdout
            out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            write_text(out, "\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigError(f"option out: cannot write {out} ({error.strerror})") from None
    return len(lines)


def generate_rows(
    model: str,
    rows: Sequence[PromptRow],
    params: SamplingParams,
    *,
    seed: int,
    dtype: str,
    system: str | None = None,
) -> list[dict[str, Any]]:
    """One reply per prompt, as rows {id, prompt, response, finished, model, sampling, seed}.

    Args:
        system: as in `generate_file`.
    """
    with world() as here:
        own = system_of(model) if system is None else system
        template = ChatTemplate(load_tokenizer(model), own)
        engine = _engine(model, here, template, compute_dtype(dtype), 32)
        ids = [template.prompt(row.messages) for row in rows]
        seeds = [derived_seed(seed, "generate", row.id, index) for index, row in enumerate(rows)]
        rollout = engine.generate(ids, params, seeds)
    return [
        {
            "id": row.id,
            "prompt": list(row.messages),
            "response": template.decode(reply),
            "finished": done,
            "model": model,
            "sampling": params.model_dump(mode="json"),
            "seed": seed,
        }
        for row, reply, done in zip(rows, rollout.responses, rollout.finished, strict=True)
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
            self.engine = _engine(model, here, self.template, torch.float32, 1)

    def reply(self, text: str) -> str:
        """The model's answer, control characters spelled out: it cannot drive a terminal."""
        self.history.append(Message(role="user", content=text))
        ids = self.template.prompt(self.history)
        seed = derived_seed(self.seed, "chat", len(self.history))
        rollout = self.engine.generate([ids], self.params, [seed])
        answer = self.template.decode(rollout.responses[0])
        self.history.append(Message(role="assistant", content=answer))
        return visible(answer)
