"""The four roles of PPO, loaded and placed: policy, reference, critic, reward sources."""

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
from ppomax.models.blocks import freeze_layers
from ppomax.models.ensembles import members
from ppomax.models.export import REWARD_CARD_FILE, read_reward_card
from ppomax.models.heads import ScalarModel
from ppomax.models.language import LanguageModel, freeze_embeddings, place
from ppomax.models.load import load_policy, load_tokenizer, load_value_model, positions_of
from ppomax.models.lora import adapters_off, add_lora
from ppomax.models.trunk import Trunks
from ppomax.rollout.engine import Engine, build_engine
from ppomax.train.loop import Trainable, check_positions
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.reward_sources import RewardSources, check_tokenizer, load_sources


@dataclass(frozen=True, slots=True)
class Actors:
    """Everything an iteration calls; reference and reward models frozen, in the compute dtype."""

    policy: Trainable[LanguageModel]
    critic: Trainable[ScalarModel] | None
    """None with an estimator that needs none."""
    reference: LanguageModel | None
    """None: the policy with its adapters off."""
    rewards: RewardSources
    engine: Engine
    template: ChatTemplate
    trunks: Trunks
    """Frozen lowest blocks that roles have in common."""

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
        ConfigError: as `load_sources`, or a critic or reference with another tokenizer.
    """
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    template = ChatTemplate(tokenizer, config.system)
    trust = config.trust_remote_code
    base = config.compute_dtype if config.lora else torch.float32
    lm = load_policy(config.model, dtype=base, trust_remote_code=trust)
    check_positions(config, positions_of(lm.config))
    check_entropy(
        "entropy_threshold", config.loss.entropy_threshold, lm.config.get_text_config().vocab_size
    )
    trunks = Trunks(config.freeze_layers or 0 if here.size == 1 else 0)
    if config.lora:
        add_lora(lm, config.lora, config.seed, freeze_layers=config.freeze_layers or 0)
    policy = LanguageModel(lm)
    _place_trained(policy, config, here, trunks)
    reference = None
    if config.kl is not None and (config.reference or not config.lora):
        source = config.reference or config.model
        if config.reference:
            check_tokenizer("ppo.reference", config.reference, config, tokenizer)
        reference = LanguageModel(
            load_policy(source, dtype=config.compute_dtype, trust_remote_code=trust)
        )
        reference.requires_grad_(False)
        place(reference, here)
        trunks.add(reference)
    rewards = load_sources(config, tokenizer, template, here, trunks)
    critic = _load_critic(config, tokenizer, base, rewards) if config.critic else None
    if critic is not None:
        _place_trained(critic, config, here, trunks)
    engine = build_engine(config.engine, lm, template, here, config.compute_dtype)
    engine.release()  # it takes the weights of the moment whenever it writes
    steps = config.total_steps
    return Actors(
        policy=Trainable("policy", policy, config.optim, steps, here),
        critic=Trainable("critic", critic, config.critic_optim, steps, here) if critic else None,
        reference=reference,
        rewards=rewards,
        engine=engine,
        template=template,
        trunks=trunks,
    )


def _place_trained(
    model: LanguageModel | ScalarModel, config: PPOConfig, here: World, trunks: Trunks
) -> None:
    if config.freeze_embeddings:
        freeze_embeddings(model)
    if config.freeze_layers:
        freeze_layers(model, config.freeze_layers)
    place(model, here, checkpointing=config.gradient_checkpointing)
    trunks.add(model)


def check_entropy(setting: str, threshold: float | None, vocabulary: int) -> None:
    """A threshold that entropy cannot reach would push it up without end.

    Raises:
        ConfigError: it is not below ln |V|.
    """
    most = math.log(vocabulary)
    if threshold is not None and threshold >= most:
        raise ConfigError(
            f"setting ppo.loss.{setting}: {threshold:.4g} nats is not below "
            f"ln |V| = {most:.3g}, the entropy of a uniform choice"
        )


def _load_critic(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    rewards: RewardSources,
) -> ScalarModel:
    source = {"policy": config.model}.get(str(config.critic), str(config.critic))
    scaled = shifted = False
    if config.critic == "reward":
        source = members(config.reward.all_models[0].model)[0]
        panel = len(rewards.panels[0].judges) > 1  # its members are standardized by their cards
        scaled = panel or config.reward.normalise is not None
        shifted = panel or config.reward.normalise == "standardize"
    elif config.critic != "policy":
        check_tokenizer("ppo.critic", source, config, tokenizer)
    critic = load_value_model(
        source, dtype=dtype, seed=config.seed, trust_remote_code=config.trust_remote_code
    )
    if scaled:
        _rescale(critic, Path(source).expanduser(), shifted=shifted)
    if config.lora:
        frozen = config.freeze_layers or 0
        add_lora(critic, config.lora, config.seed + 1, freeze_layers=frozen)
    return critic


@torch.no_grad()
def _rescale(critic: ScalarModel, source: Path, *, shifted: bool) -> None:
    """Start a critic made from a reward model in the units of normalised scores (ours).

    PPO's rewards are scores less their mean, over their std; the reward model's card says what
    these are of whole replies. Without this the critic's first predictions are off by several
    std, and its pre-training is spent on that.
    """
    if (source / REWARD_CARD_FILE).exists():
        card = read_reward_card(source)
        std = max(card.score_std, 1e-6)
        critic.score.weight /= std
        critic.offset = card.score_mean / std if shifted else 0.0
