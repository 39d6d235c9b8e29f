"""A world as a folder, made by the library's own stages: model, data, SFT, comparisons, reward."""

import importlib.resources
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ppomax import rundir
from ppomax.config import Settings, merge, parse, read_yaml
from ppomax.data.batching import derived_seed
from ppomax.data.template import ChatTemplate
from ppomax.distributed import world as process_world
from ppomax.errors import ConfigError
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.models.tiny import tiny_model, tiny_tokenizer
from ppomax.rollout.engine import EngineSettings, build_engine
from ppomax.rollout.sampling import SamplingParams
from ppomax.train.reward import RewardConfig, train_reward
from ppomax.train.sft import SFTConfig, train_sft
from ppomax.types import Message
from ppomax.worlds.language import demonstration, gold, prefers_first, prompts

MAX_NEW_TOKENS, MAX_PROMPT = 64, 40
HELD_OUT = 256
"""Prompts that no stage trains on."""
GOLD = "ppomax.worlds:gold_scores"
"""The gold score as a callable, for `ppo.monitor.track.callable`."""


class WorldSettings(Settings):
    """How big the world is and how well its reward model is taught."""

    seed: int = 0
    """Of everything drawn here."""
    demonstrations: int = Field(4000, ge=1)
    """Dialogues of supervised fine-tuning."""
    sft_epochs: int = Field(6, ge=1)
    comparisons: int = Field(4000, ge=1)
    """Pairs of replies of the fine-tuned policy that are compared."""
    reward_epochs: int = Field(4, ge=1)
    noise: float = Field(0.5, gt=0)
    """Gold points by which the annotators' Bradley-Terry judgement is blurred."""
    hidden_size: int = Field(64, ge=8)
    layers: int = Field(2, ge=1)


@dataclass(frozen=True, slots=True)
class World:
    """Where the world's parts lie."""

    folder: Path

    @property
    def model(self) -> Path:
        """The untrained tiny model with its tokenizer."""
        return self.folder / "model"

    @property
    def policy(self) -> Path:
        """The fine-tuned policy."""
        return self.folder / "sft" / "export"

    @property
    def reward(self) -> Path:
        """The reward model learned from comparisons."""
        return self.folder / "reward" / "export"

    def data(self, name: str) -> Path:
        """A file of data: `sft`, `text`, `pairs`, `prompts` or `heldout`."""
        return self.folder / f"{name}.jsonl"


def build_world(folder: Path, settings: WorldSettings | None = None) -> World:
    """Make the world, or take up the making of one where it stood.

    Raises:
        ConfigError: the folder holds a world of other settings.
    """
    settings = settings or WorldSettings()
    place = World(folder)
    _claim(place, settings)
    if not place.data("heldout").exists():
        _write_data(place, settings)
    if not (place.policy.parent / "done.json").exists():
        config = parse(SFTConfig, _sft(place, settings))
        train_sft(config, resume=config.out.exists())
    if not place.data("pairs").exists():
        _write_lines(place.data("pairs"), _comparisons(place, settings))
    if not (place.reward.parent / "done.json").exists():
        own = parse(RewardConfig, _reward(place, settings))
        train_reward(own, resume=own.out.exists())
    return place


def ppo_settings(place: World, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of PPO in the world: a preset, the world's own over it, changes over both.

    `ppo-max` also gets the world's text for its LM loss, which is part of it (paper §5.4). The
    learning rates are the world's: the presets' are for 7B.
    """
    presets = importlib.resources.files("ppomax") / "recipes" / "presets"
    own = {
        "model": str(place.policy),
        "data": str(place.data("prompts")),
        "max_length": MAX_NEW_TOKENS + MAX_PROMPT,
        "max_prompt": MAX_PROMPT,
        "rollout_size": 64,
        "minibatch_size": 32,
        "sampling": {"temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS},
        "reward": {"model": str(place.reward)},
        "optim": {"lr": 5e-4},
        "critic_optim": {"lr": 1e-3},
        "checkpoint": {"every": 10},
    }
    if preset == "ppo-max":
        own["ptx"] = {"data": str(place.data("text")), "length": MAX_NEW_TOKENS}
    return merge(merge(read_yaml(Path(str(presets / f"{preset}.yaml"))), own), dict(changes))


def _claim(place: World, settings: WorldSettings) -> None:
    """Note the settings in the folder, or see that they are those it was begun with."""
    file, wanted = place.folder / "world.json", settings.model_dump()
    if not (file.exists() or place.data("heldout").exists()):
        place.folder.mkdir(parents=True, exist_ok=True)
        rundir.write_text(file, json.dumps(wanted) + "\n")
        return
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    other = [
        f"{name} {known.get(name, 'unknown')}, not {value}"
        for name, value in wanted.items()
        if known.get(name) != value
    ]
    if other:
        raise ConfigError(
            f"{place.folder}: holds a world of other settings ({'; '.join(other)}); give another "
            "folder"
        )


def _write_data(place: World, settings: WorldSettings) -> None:
    """Prompts, demonstrations and text, then the model and the tokenizer made of them."""
    draw = random.Random(derived_seed(settings.seed, "world"))
    every = prompts()
    draw.shuffle(every)
    heldout, train = every[:HELD_OUT], every[HELD_OUT:]
    rows = [draw.choice(train) for _ in range(settings.demonstrations)]
    dialogues = [{"prompt": row["prompt"], "completion": demonstration(row, draw)} for row in rows]
    texts = [f"{row['prompt']} {row['completion']}" for row in dialogues]
    tokenizer = tiny_tokenizer([*texts, "user assistant\n"] * 2, vocab_size=512)
    model = tiny_model(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        layers=settings.layers,
        intermediate=2 * settings.hidden_size,
        max_positions=2 * (MAX_NEW_TOKENS + MAX_PROMPT),
        seed=settings.seed,
    )
    model.save_pretrained(place.model)
    tokenizer.save_pretrained(place.model)
    template = ChatTemplate(load_tokenizer(str(place.model)))
    rendered = [
        template.tokenizer.decode(
            template.encode(
                [
                    Message(role="user", content=row["prompt"]),
                    Message(role="assistant", content=row["completion"]),
                ]
            ).ids
        )
        for row in dialogues
    ]
    _write_lines(place.data("sft"), dialogues)
    _write_lines(place.data("text"), [{"text": text} for text in rendered])
    _write_lines(place.data("prompts"), [{"prompt": row["prompt"]} for row in train])
    _write_lines(place.data("heldout"), [{"prompt": row["prompt"]} for row in heldout])


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    rundir.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _sft(place: World, settings: WorldSettings) -> dict[str, Any]:
    return {
        "model": str(place.model),
        "out": str(place.folder / "sft"),
        "data": str(place.data("sft")),
        "seed": settings.seed,
        "heldout": 0.05,
        "max_length": MAX_NEW_TOKENS + MAX_PROMPT,
        "epochs": settings.sft_epochs,
        "batch_tokens": 1024,
        "eval_every": 100,
        "optim": {"lr": 3e-3, "schedule": "cosine", "warmup": 0.05, "floor": 0.1},
    }


def _reward(place: World, settings: WorldSettings) -> dict[str, Any]:
    return {
        "model": str(place.policy),
        "out": str(place.folder / "reward"),
        "data": str(place.data("pairs")),
        "seed": settings.seed,
        "heldout": 0.1,
        "max_length": MAX_NEW_TOKENS + MAX_PROMPT,
        "epochs": settings.reward_epochs,
        "batch_tokens": 3000,
        "lm_coef": 0.2,
        "eval_every": 50,
        "optim": {"lr": 2e-3, "schedule": "cosine", "warmup": 0.1, "floor": 0.1},
    }


def _comparisons(place: World, settings: WorldSettings) -> list[dict[str, Any]]:
    """Two replies of the fine-tuned policy to each prompt, the better one as annotators see it."""
    draw = random.Random(derived_seed(settings.seed, "annotators"))
    known = [
        json.loads(line)["prompt"]
        for line in place.data("prompts").read_text(encoding="utf-8").splitlines()
    ]
    # half as many again: two replies that are the same say nothing and are left out
    asked = [draw.choice(known) for _ in range(3 * settings.comparisons // 2)]
    replies = answers(place.policy, [asked[i // 2] for i in range(2 * len(asked))], settings.seed)
    rows = []
    for number, prompt in enumerate(asked):
        first, second = replies[2 * number : 2 * number + 2]
        if first == second:
            continue
        worth = gold(prompt, first).score, gold(prompt, second).score
        better = prefers_first(*worth, settings.noise, draw)
        chosen, rejected = (first, second) if better else (second, first)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows[: settings.comparisons]


@torch.no_grad()
def answers(policy: Path, asked: list[str], seed: int) -> list[str]:
    """One reply to each prompt, at temperature 1."""
    with process_world("cpu") as here:
        template = ChatTemplate(load_tokenizer(str(policy)))
        model = load_policy(str(policy))
        engine = build_engine(EngineSettings(), model, template, here, torch.float32)
        rollout = engine.generate(
            [template.prompt([Message(role="user", content=prompt)]) for prompt in asked],
            SamplingParams(temperature=1.0, max_new_tokens=MAX_NEW_TOKENS),
            [derived_seed(seed, "answers", place) for place in range(len(asked))],
        )
    return [template.decode(reply) for reply in rollout.responses]
