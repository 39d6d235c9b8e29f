"""What a recipe will cost: sizes, steps, tokens, memory, disk. Starts nothing.

Memory is that of each model (`footprint`), a copy in the compute dtype of what is frozen and for
the engine, and the cache, less what is not held at once.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ppomax import preflight
from ppomax.data.template import ChatTemplate
from ppomax.errors import PpomaxError
from ppomax.footprint import (
    GB,
    Size,
    activations_gb,
    adapter_parameters,
    kept_gb,
    model_size,
    trained_gb,
)
from ppomax.models.blocks import check_frozen
from ppomax.models.ensembles import members
from ppomax.models.load import load_tokenizer
from ppomax.models.trunk import REMEMBERED_BYTES
from ppomax.recipe import Recipe
from ppomax.train import reward, sft
from ppomax.train.loop import check_positions
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.prompts import load_stream
from ppomax.train.reward import RewardConfig
from ppomax.train.sft import SFTConfig

PROCESS_GB = 0.45
"""Python, PyTorch and libraries; measured on CPU."""


@dataclass(slots=True)
class StagePlan:
    """One stage's expected work."""

    stage: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    memory_gb: float = 0.0
    disk_gb: float = 0.0

    def text(self) -> str:
        """For the terminal."""
        memory, disk = f"about {self.memory_gb:.1f} GB", f"about {self.disk_gb:.1f} GB"
        rows = [*self.lines, ("memory", memory), ("disk", disk)]
        return "\n".join([self.stage, *[f"  {name:<20} {value}" for name, value in rows], ""])


def plan(recipe: Recipe, only: str | None = None) -> list[StagePlan]:
    """The plan of every stage.

    Args:
        only: one stage's name; default all.

    Raises:
        ConfigError, DataError, ModelError: as the run itself would.
    """
    sizes: dict[str, Size] = {}
    stages = []
    for name in [only] if only else recipe.stages():
        config = getattr(recipe, name)
        if config is None:
            continue
        preflight.check(recipe, name)
        if name == "eval":
            continue
        source = _first_model(recipe, config.model)
        sizes.setdefault(source, model_size(source, trust_remote_code=config.trust_remote_code))
        size = sizes[source]
        check_frozen(config.freeze_layers, size.layers)
        check_positions(config, size.positions)
        tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        template = ChatTemplate(tokenizer, config.system)
        stages.append(_plan_stage(config, size, template, recipe.reward))
    return stages


def _plan_stage(
    config: SFTConfig | RewardConfig | PPOConfig,
    size: Size,
    template: ChatTemplate,
    own: RewardConfig | None,
) -> StagePlan:
    match config:
        case SFTConfig():
            return _plan_sft(config, size, template)
        case RewardConfig():
            return _plan_reward(config, size, template)
        case PPOConfig():
            return _plan_ppo(config, size, template, own)


def _first_model(recipe: Recipe, model: str) -> str:
    """The model a stage's chain starts from, where the stage's own does not exist yet."""
    for name in ("sft", "reward", "ppo"):
        config = getattr(recipe, name)
        if config is not None and str(config.out / "export") == model:
            return _first_model(recipe, config.model)
    return model


def _training(config: SFTConfig | RewardConfig, shape: Size) -> float:
    """GB of one model in training."""
    below = config.freeze_layers or 0
    weights = trained_gb(shape.parameters, config.lora, shape, config.compute_dtype, below)
    return weights + activations_gb(
        min(config.micro_tokens, config.batch_tokens),
        shape,
        config.compute_dtype,
        checkpointing=config.gradient_checkpointing,
        trained=config.lora is None and not below,
        frozen=below,
        adapters=config.lora is not None,
        length=config.max_length,
    )


def _plan_sft(config: SFTConfig, shape: Size, template: ChatTemplate) -> StagePlan:
    data = sft.load_data(config, template)
    rows = len(data.train) + len(data.heldout)
    tokens = sum(data.train[index].num_targets for step in data.steps for index in step)
    memory = PROCESS_GB + _training(config, shape)
    best = 8 * shape.parameters / GB if config.early_stop else 0.0  # and the one that replaces it
    result = StagePlan(
        "sft", memory_gb=memory, disk_gb=_disk(config, 1, config.checkpoint.keep_last, shape) + best
    )
    result.lines = [
        ("model", f"{config.model}, {shape.parameters / 1e6:.1f} M parameters"),
        (
            "data",
            f"{rows} dialogues, {config.epochs} epochs, held out {config.heldout:.0%} of prompts",
        ),
        (
            "step",
            f"{config.batch_tokens} tokens; micro-batches of {config.micro_tokens} padded tokens",
        ),
        ("optimizer steps", f"{len(data.steps)}, {tokens} target tokens in all"),
    ]
    return result


def _plan_reward(config: RewardConfig, shape: Size, template: ChatTemplate) -> StagePlan:
    data = reward.load_data(config, template)
    rows = len(data.train) + len(data.heldout)
    tokens = sum(data.train[index].tokens for step in data.steps for index in step)
    memory = PROCESS_GB + _training(config, shape)
    best = 8 * shape.parameters / GB if config.early_stop else 0.0
    result = StagePlan(
        "reward",
        memory_gb=memory,
        disk_gb=_disk(config, 1, config.checkpoint.keep_last, shape) + best,
    )
    result.lines = [
        ("model", f"{config.model}, {shape.parameters / 1e6:.1f} M parameters"),
        ("data", f"{rows} pairs, {config.epochs} epochs, held out {config.heldout:.0%} of prompts"),
        ("step", f"{config.batch_tokens} tokens, {config.min_pairs} to {config.max_pairs} pairs"),
        ("optimizer steps", f"{len(data.steps)}, {tokens} tokens in all"),
    ]
    if config.ensemble:
        result.lines.append(("ensemble", f"{config.ensemble} models, each so, one after the other"))
        result.disk_gb *= config.ensemble
    return result


def _plan_ppo(
    config: PPOConfig, shape: Size, template: ChatTemplate, own: RewardConfig | None
) -> StagePlan:
    """Args: own: the run's own reward stage."""
    rows = len(load_stream(config, template).prompts)
    compute = torch.finfo(config.compute_dtype).bits / 8
    engine = compute * shape.parameters / GB
    frozen: dict[str, float] = {}
    judges = _reward_models(config, shape, (own.ensemble if own else None) or 1)
    if judges:
        name = "reward model" if len(judges) == 1 else f"{len(judges)} reward models"
        frozen[name] = compute * sum(judges) / GB
    if config.kl is not None and (config.reference or not config.lora):
        frozen["reference"] = compute * shape.parameters / GB
    below = config.freeze_layers or 0
    policy = trained_gb(shape.parameters, config.lora, shape, config.compute_dtype, below)
    critic = policy if config.critic else 0.0
    slots = min(config.engine.slots, config.replies)
    length = config.max_prompt + config.sampling.max_new_tokens
    cache = slots * length * shape.layers * shape.kv_width * compute / GB
    tokens = min(config.micro_tokens, config.minibatch_size * length)
    adapters = config.lora is not None
    activations = activations_gb(
        tokens,
        shape,
        config.compute_dtype,
        checkpointing=config.gradient_checkpointing,
        trained=config.lora is None and not below,
        frozen=below,
        adapters=adapters,
        length=length,
    )
    shared = _held_once(config, shape, own)
    held = policy + critic + sum(frozen.values()) - shared
    weights = (compute if config.lora else 4) * shape.parameters / GB
    gradients = (policy - weights) / (4 if config.lora else 3)
    if config.critic and not config.lora:
        held -= gradients  # one model's at a time
    if below:
        held += min(REMEMBERED_BYTES, 4 * config.replies * length * shape.hidden) / GB
    lent = engine if config.engine.kind == "native" else 0.0  # others keep their copy
    both = _kept_by_scoring(config, shape, tokens)
    both = activations + both - gradients if both else 0.0  # there are no gradients yet
    # while replies are written there are copy and cache and no gradients, in the update the reverse
    memory = PROCESS_GB + held + engine - lent + max(lent + cache - gradients, activations, both)
    critic_rollouts = config.critic_pretraining.max_rollouts if config.critic_pretraining else 0
    rollouts = config.iterations + critic_rollouts
    replies = rollouts * config.replies
    kept = config.checkpoint.keep_last + (config.monitor.keep_green if config.monitor else 0)
    result = StagePlan(
        "ppo",
        memory_gb=memory,
        disk_gb=_disk(config, 2 if config.critic else 1, kept, shape),
    )
    result.lines = [
        ("models", f"of {shape.parameters / 1e6:.1f} M parameters, from {config.model}"),
        (
            "prompts",
            f"{rows}; {config.rollout_size} per iteration (rollout_size, over all ranks), "
            f"{config.samples_per_prompt} replies to each",
        ),
        ("estimator", config.advantage.estimator),
        *([("critic pre-training", f"at most {critic_rollouts} rollouts")] * bool(critic_rollouts)),
        (
            "iterations",
            f"{config.iterations}, each {config.steps_per_iteration} optimizer steps of "
            f"{config.minibatch_size} replies (minibatch_size), {config.total_steps} in all",
        ),
        ("replies", f"{replies}, at most {replies * config.sampling.max_new_tokens} new tokens"),
        ("policy", f"{policy:.2f} GB"),
        *([("critic", f"{critic:.2f} GB")] * bool(config.critic)),
        *[(name, f"{value:.2f} GB") for name, value in frozen.items()],
        ("engine", f"{engine:.2f} GB" + " while replies are written" * bool(lent)),
        *([("held once", f"-{shared:.2f} GB: frozen blocks in common")] * bool(shared)),
        ("cache", f"{cache:.2f} GB ({slots} slots of {length} tokens)"),
        ("activations", f"{activations:.2f} GB (micro_tokens {config.micro_tokens})"),
        *[("advice", note) for note in config.advice()],
    ]
    return result


def _kept_by_scoring(config: PPOConfig, shape: Size, tokens: int) -> float:
    """GB of the critic's forward, where scoring may keep it beside the policy's."""
    whole = config.minibatch_size >= config.replies and not torch.cuda.is_available()
    if not config.critic or not whole:
        return 0.0
    return kept_gb(
        tokens,
        shape,
        config.compute_dtype,
        checkpointing=config.gradient_checkpointing,
        frozen=config.freeze_layers or 0,
        adapters=config.lora is not None,
    )


def _held_once(config: PPOConfig, shape: Size, own: RewardConfig | None) -> float:
    """GB that trunks save; of reward models only those of a stage of this run, frozen alike."""
    if not config.freeze_layers:
        return 0.0
    size = _frozen(config, shape)
    names = [name for source in config.reward.all_models for name in members(source.model)]
    alike: list[str] = []
    if own is not None and (own.freeze_layers or 0) >= config.freeze_layers:
        alike = [name for name in names if Path(name).is_relative_to(own.out)]
    critic = config.critic == "policy" or (config.critic == "reward" and names[:1] == alike[:1])
    reference = config.kl is not None and not config.reference and not config.lora
    masters, others = 1 + critic, reference + len(alike)
    compute = config.compute_dtype.itemsize
    if config.lora or config.compute_dtype == torch.float32:  # all of one dtype
        return compute * size * (masters + others - 1) / GB
    return size * (4 * (masters - 1) + compute * max(0, others - 1)) / GB


def _reward_models(config: PPOConfig, shape: Size, ensemble: int) -> list[int]:
    """Parameters of each reward model; one that the run has yet to train has the policy's.

    Args:
        ensemble: members that the run's own reward stage makes.
    """
    names = [name for source in config.reward.all_models for name in members(source.model)]
    trust = config.trust_remote_code
    found: list[int] = []
    for name in names:
        if Path(name).is_relative_to(config.out.parent) and not Path(name).exists():
            found += [shape.parameters] * ensemble
        else:
            found.append(model_size(name, trust_remote_code=trust).parameters)
    return found


def _disk(
    config: SFTConfig | RewardConfig | PPOConfig, models: int, keep: int, shape: Size
) -> float:
    """GB of checkpoints, the one being written among them, and of the export.

    They hold the trained weights and two moments of each.
    """
    trained = shape.parameters - (_frozen(config, shape) if config.freeze_layers else 0)
    if config.lora:
        share = (config.freeze_layers or 0) / shape.layers
        trained = (1 - share) * adapter_parameters(config.lora, shape)
    return ((keep + 1) * models * 12 * trained + 4 * shape.parameters) / GB


def _frozen(config: SFTConfig | RewardConfig | PPOConfig, shape: Size) -> float:
    """Parameters of the lowest blocks that are not trained, and of the embedding."""
    share = (config.freeze_layers or 0) / shape.layers
    return shape.embedding + (shape.parameters - shape.embedding) * share


def advice(stages: list[StagePlan], available_gb: float | None) -> list[str]:
    """What makes a plan fit that does not.

    Args:
        available_gb: of the device; None: it is not here.
    """
    most = max((stage.memory_gb for stage in stages), default=0.0)
    if available_gb is None:
        return [f"{most:.1f} GB at most; the device asked for is not here to compare with"]
    if most <= available_gb:
        return [f"fits: {most:.1f} GB at most, {available_gb:.1f} GB here"]
    ranks = int(-(-most // available_gb))
    return [
        f"does not fit: {most:.1f} GB wanted, {available_gb:.1f} GB here",
        "lora: {rank: 16} keeps masters and moments for the adapters only",
        "gradient_checkpointing: true and smaller micro_tokens shrink activations",
        f"or {ranks} ranks and more (torchrun --nproc-per-node ...): FSDP shards masters, moments "
        "and gradients",
    ]


def available_memory_gb(device: str = "auto") -> float | None:
    """Memory of the device the run would use; None where there is no such device."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return None
    if torch.cuda.is_available() and device != "cpu":
        return float(torch.cuda.get_device_properties(0).total_memory) / GB
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    except (ValueError, OSError):
        raise PpomaxError("this system does not say how much memory it has") from None
