"""What `ppo.reward` names, loaded: reward models, ensembles of them, functions."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.errors import ConfigError
from ppomax.models.ensembles import members
from ppomax.models.export import REWARD_CARD_FILE, read_reward_card, tokenizer_hash
from ppomax.models.heads import ScalarModel
from ppomax.models.language import place
from ppomax.models.load import load_reward_model, load_tokenizer
from ppomax.models.trunk import Trunks
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.probes import score_dialogues
from ppomax.train.reading import Reading, load_reading
from ppomax.train.reward_settings import RewardModelSettings, RewardSettings
from ppomax.train.rewards import Scorer, load_callable
from ppomax.types import Message


@dataclass(frozen=True, slots=True)
class Judge:
    """One reward model, frozen and placed."""

    model: ScalarModel
    reading: Reading | None
    """None: it reads the policy's own ids."""
    mean: float = 0.0
    """Taken from its scores: its card's score_mean, in an ensemble."""
    std: float = 1.0
    """Then they are divided by this: its card's score_std, in an ensemble."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One reward model, or an ensemble, as one term of the sum."""

    judges: list[Judge]
    weight: float


@dataclass(frozen=True, slots=True)
class RewardSources:
    """Everything that scores a reply."""

    panels: list[Panel]
    functions: list[tuple[Scorer, float]]
    """Each with its weight."""
    process: Scorer | None


def load_sources(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    here: World,
    trunks: Trunks,
) -> RewardSources:
    """Load, check and place what `ppo.reward` names.

    Raises:
        ModelError: a reward model cannot be loaded.
        ConfigError: no source, a function that cannot be found, a reward model with another
            tokenizer or other scores than its card says, an ensemble of one.
    """
    settings = config.reward
    if not settings.has_outcome and settings.process is None:
        raise ConfigError(
            "setting ppo.reward.model: missing; give a reward model, ppo.reward.callable or "
            "ppo.reward.process"
        )
    functions = [
        (
            load_callable(
                source.callable,
                "ppo.reward.callable"
                if settings.callable
                else f"ppo.reward.callables.{index}.callable",
            ),
            source.weight,
        )
        for index, source in enumerate(settings.all_callables)
    ]
    process = load_callable(settings.process, "ppo.reward.process") if settings.process else None
    panels = [
        Panel(
            [
                _load_judge(
                    name,
                    setting,
                    source,
                    config,
                    tokenizer,
                    template,
                    here,
                    trunks,
                    in_ensemble=len(group) > 1,
                )
                for name, setting, source in group
            ],
            group[0][2].weight,
        )
        for group in _groups(settings)
    ]
    return RewardSources(panels, functions, process)


Named = tuple[str, str, RewardModelSettings]
"""A reward model, the setting that names it, and what else is set there."""


def _groups(settings: RewardSettings) -> list[list[Named]]:
    """The reward models that score as one: all of them with `ensemble`, else a folder's members."""
    groups = [
        [(name, settings.setting_of(index), source) for name in members(source.model)]
        for index, source in enumerate(settings.all_models)
    ]
    if settings.ensemble is None:
        return groups
    every = [named for group in groups for named in group]
    if len(every) == 1:
        raise ConfigError(
            f"setting ppo.reward.ensemble: {every[0][0]} is one reward model; list two or more in "
            "ppo.reward.models, or a folder with ensemble.json"
        )
    return [every]


def _load_judge(
    name: str,
    setting: str,
    source: RewardModelSettings,
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    here: World,
    trunks: Trunks,
    *,
    in_ensemble: bool,
) -> Judge:
    model = load_reward_model(
        name,
        dtype=config.compute_dtype,
        init_from_lm=False,
        trust_remote_code=config.trust_remote_code,
    )
    card = Path(name).expanduser() / REWARD_CARD_FILE
    reading = None
    if source.retokenize:
        reading = _own_reading(name, setting, config, tokenizer)
    else:
        check_tokenizer(setting, name, config, tokenizer, retokenize=True)
    model.requires_grad_(False)
    model.to(here.device)
    if card.exists():
        _check_probes(name, setting, model, reading.template if reading else template, config, here)
    place(model, here)
    trunks.add(model)
    if not in_ensemble:
        return Judge(model, reading)
    if not card.exists():
        raise ConfigError(
            f"setting {setting}: {name} has no {REWARD_CARD_FILE}, whose score_mean and score_std "
            "make an ensemble's members comparable; give weights in place of ensemble"
        )
    said = read_reward_card(card.parent)
    return Judge(model, reading, said.score_mean, max(said.score_std, 1e-6))


def _own_reading(
    name: str, setting: str, config: PPOConfig, tokenizer: PreTrainedTokenizerBase
) -> Reading:
    """How a model with `retokenize` is given text."""
    reading = load_reading(
        name, config.system, f"setting {setting}", trust_remote_code=config.trust_remote_code
    )
    if reading.own_form and tokenizer_hash(reading.template.tokenizer) == tokenizer_hash(tokenizer):
        raise ConfigError(
            f"setting {setting}: retokenize has no use: {name} has the tokenizer and chat template "
            f"of {config.model}; leave it out"
        )
    return reading


def check_tokenizer(
    setting: str,
    name: str,
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    retokenize: bool = False,
) -> None:
    """A model that reads the policy's ids must have its tokenizer and chat template.

    Args:
        retokenize: whether the setting has a way out.

    Raises:
        ConfigError: it has others.
    """
    other = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    if tokenizer_hash(other) != tokenizer_hash(tokenizer):
        way_out = ", or set retokenize: true beside it in ppo.reward.models" if retokenize else ""
        raise ConfigError(
            f"setting {setting}: {name} has another tokenizer or chat template than "
            f"{config.model}; train it from the same base{way_out}"
        )


def _check_probes(
    name: str,
    setting: str,
    model: ScalarModel,
    template: ChatTemplate,
    config: PPOConfig,
    here: World,
) -> None:
    """Score the card's probe texts again: a changed template or file shows as other scores."""
    probes = read_reward_card(Path(name).expanduser()).probes
    dialogues = [
        tuple(Message(role=turn["role"], content=turn["content"]) for turn in probe["messages"])
        for probe in probes
    ]
    found = score_dialogues(model, dialogues, template, here, config.compute_dtype)
    tolerance = 1e-3 if config.compute_dtype == torch.float32 else 0.25
    for probe, score in zip(probes, found, strict=True):
        if abs(score - probe["score"]) > tolerance * max(1.0, abs(probe["score"])):
            raise ConfigError(
                f"setting {setting}: {name} scores a probe text {score:.4g}, its card says "
                f"{probe['score']:.4g}; the files or the system prompt differ from its training"
            )
