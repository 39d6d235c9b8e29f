"""The four roles of PPO, loaded and placed: policy, reference, critic, reward model."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.errors import ConfigError
from ppomax.models.export import REWARD_CARD_FILE, read_reward_card, tokenizer_hash
from ppomax.models.heads import ScalarModel
from ppomax.models.language import LanguageModel, freeze_embeddings, place
from ppomax.models.load import load_policy, load_reward_model, load_tokenizer, load_value_model
from ppomax.models.lora import adapters_off, add_lora
from ppomax.rollout.engine import Engine, build_engine
from ppomax.train.loop import Trainable, check_positions
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.ppo_settings import LossSettings
from ppomax.train.probes import score_dialogues
from ppomax.train.rewards import Scorer, load_callable
from ppomax.types import Message


@dataclass(frozen=True, slots=True)
class Actors:
    """Everything an iteration calls; reference and reward model frozen, in the compute dtype."""

    policy: Trainable[LanguageModel]
    critic: Trainable[ScalarModel] | None
    """None with an estimator that needs none."""
    reference: LanguageModel | None
    """None: the policy with its adapters off."""
    reward: ScalarModel | None
    """None where scores come from `scorer`."""
    scorer: Scorer | None
    engine: Engine
    template: ChatTemplate

    @property
    def pad(self) -> int:
        """The id that fills batches and never ends a text."""
        return int(self.template.tokenizer.pad_token_id)

    @contextmanager
    def as_reference(self) -> Iterator[LanguageModel]:
        """The reference policy, however it is held."""
        if self.reference is not None:
            yield self.reference
            return
        with adapters_off(self.policy.model):
            yield self.policy.model


def load_actors(config: PPOConfig, here: World) -> Actors:
    """Load, adapt, place.

    Raises:
        ModelError: a model cannot be loaded.
        ConfigError: no reward source, or a reward model with another tokenizer.
    """
    if config.reward.model is None and config.reward.callable is None:
        raise ConfigError(
            "setting ppo.reward.model: missing; give a reward model or ppo.reward.callable"
        )
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    template = ChatTemplate(tokenizer, config.system)
    trust = config.trust_remote_code
    base = config.compute_dtype if config.lora else torch.float32
    lm = load_policy(config.model, dtype=base, trust_remote_code=trust)
    check_positions(config, lm)
    _check_entropy(config.loss, lm.config.get_text_config().vocab_size)
    reference = None
    if config.lora:
        add_lora(lm, config.lora, config.seed)
    if config.kl is not None and (config.reference or not config.lora):
        source = config.reference or config.model
        if config.reference:
            _check_tokenizer("ppo.reference", config.reference, config, tokenizer)
        reference = LanguageModel(
            load_policy(source, dtype=config.compute_dtype, trust_remote_code=trust)
        )
        reference.requires_grad_(False)
    reward = _load_reward(config, tokenizer, template, here)
    critic = _load_critic(config, tokenizer, base) if config.critic else None
    policy = LanguageModel(lm)
    for model in (policy, critic):
        if model is not None and config.freeze_embeddings:
            freeze_embeddings(model)
        if model is not None:
            place(model, here, checkpointing=config.gradient_checkpointing)
    for frozen in (reference, reward):
        if frozen is not None:
            place(frozen, here)
    steps = config.total_steps
    scorer = (
        load_callable(config.reward.callable, "ppo.reward.callable")
        if config.reward.callable
        else None
    )
    return Actors(
        policy=Trainable("policy", policy, config.optim, steps, here),
        critic=Trainable("critic", critic, config.critic_optim, steps, here) if critic else None,
        reference=reference,
        reward=reward,
        scorer=scorer,
        engine=build_engine(config.engine, lm, template, here, config.compute_dtype),
        template=template,
    )


def _check_entropy(loss: LossSettings, vocabulary: int) -> None:
    """A threshold that entropy cannot reach would push it up without end."""
    most = math.log(vocabulary)
    if loss.entropy_threshold is not None and loss.entropy_threshold >= most:
        raise ConfigError(
            f"setting ppo.loss.entropy_threshold: {loss.entropy_threshold} nats is not below "
            f"ln |V| = {most:.3g}, the entropy of a uniform choice"
        )


def _load_reward(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, here: World
) -> ScalarModel | None:
    if config.reward.model is None:
        return None
    model = load_reward_model(
        config.reward.model,
        dtype=config.compute_dtype,
        init_from_lm=False,
        trust_remote_code=config.trust_remote_code,
    )
    _check_tokenizer("ppo.reward.model", config.reward.model, config, tokenizer)
    model.requires_grad_(False)
    model.to(here.device)
    if (Path(config.reward.model) / REWARD_CARD_FILE).exists():
        _check_probes(config, model, template, here)
    return model


def _check_tokenizer(
    setting: str, name: str, config: PPOConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    other = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    if tokenizer_hash(other) != tokenizer_hash(tokenizer):
        raise ConfigError(
            f"setting {setting}: {name} has another tokenizer or chat template than "
            f"{config.model}; train it from the same base"
        )


def _check_probes(
    config: PPOConfig, model: ScalarModel, template: ChatTemplate, here: World
) -> None:
    """Score the card's probe texts again: a changed template or file shows as other scores."""
    probes = read_reward_card(Path(str(config.reward.model))).probes
    dialogues = [
        tuple(Message(role=turn["role"], content=turn["content"]) for turn in probe["messages"])
        for probe in probes
    ]
    found = score_dialogues(model, dialogues, template, here, config.compute_dtype)
    tolerance = 1e-3 if config.compute_dtype == torch.float32 else 0.25
    for probe, score in zip(probes, found, strict=True):
        if abs(score - probe["score"]) > tolerance * max(1.0, abs(probe["score"])):
            raise ConfigError(
                f"setting ppo.reward.model: {config.reward.model} scores a probe text {score:.4g}, "
                f"its card says {probe['score']:.4g}; the files or the system prompt differ from "
                "its training"
            )


def _load_critic(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> ScalarModel:
    if config.critic not in ("reward", "policy"):
        _check_tokenizer("ppo.critic", str(config.critic), config, tokenizer)
    own = {"reward": config.reward.model, "policy": config.model}
    source = own.get(str(config.critic), config.critic)
    critic = load_value_model(
        str(source), dtype=dtype, seed=config.seed, trust_remote_code=config.trust_remote_code
    )
    if config.critic == "reward" and config.reward.normalise is not None:
        _rescale(critic, Path(str(source)))
    if config.lora:
        add_lora(critic, config.lora, config.seed + 1)
    return critic


@torch.no_grad()
def _rescale(critic: ScalarModel, source: Path) -> None:
    """Start a critic made from a reward model in the units of normalised scores (ours).

    PPO's rewards are scores over their std; the reward model's card says what that is. Without this
    the critic's first predictions are several times too large and pre-training is spent on it.
    """
    if (source / REWARD_CARD_FILE).exists():
        critic.score.weight /= max(read_reward_card(source).score_std, 1e-6)
