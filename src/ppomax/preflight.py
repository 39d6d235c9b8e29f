"""What later stages of a run name, looked for before the first begins.

A file that is not there should not be found out once hours of training are behind it.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ppomax.data.raw import is_hub_id, iter_raw
from ppomax.data.sources import SourceConfig
from ppomax.errors import ConfigError, DataError
from ppomax.eval.capability import load_all
from ppomax.eval.policy_config import EvalConfig
from ppomax.models.load import check_reward_model, load_tokenizer
from ppomax.recipe import Recipe
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.rewards import load_callable


def check(recipe: Recipe, name: str) -> None:
    """Look for what a stage names beside its model and its own data.

    Raises:
        ConfigError, DataError, ModelError: as the stage would once it is reached.
    """
    config = getattr(recipe, name)
    made = [recipe.out / stage for stage in recipe.stages()]  # what this run is to make

    def is_made(model: str) -> bool:
        return any(Path(model).is_relative_to(folder) for folder in made)

    if isinstance(config, PPOConfig):
        _check_ppo(config)
    if isinstance(config, PPOConfig | EvalConfig) and config.engine.kind == "vllm":
        _check_installed(f"{name}.engine.kind", "vllm", "vllm")
    for tracker in getattr(getattr(config, "log", None), "to", ()):
        _check_installed(f"{name}.log.to", tracker, tracker)
    found = _sources(config) if isinstance(config, PPOConfig | EvalConfig) else iter(())
    for setting, source in found:
        if is_hub_id(source.path):
            _check_installed(setting, "datasets", "hub")
        elif not source.path.startswith("bundled:"):
            _check_file(setting, source.path)
    for model in _models(config):
        if not is_made(model):
            load_tokenizer(model, trust_remote_code=config.trust_remote_code)
    for setting, model in _reward_models(config):
        if not is_made(model):
            check_reward_model(setting, model, trust_remote_code=config.trust_remote_code)
    if isinstance(config, EvalConfig):
        _check_eval(config, is_made)


def check_made(recipe: Recipe, stages: Sequence[str]) -> None:
    """What stages read is there, or made by one of them.

    Raises:
        ConfigError: another stage of the recipe is to make it first.
    """
    first: set[str] = set()
    for name in stages:
        config = getattr(recipe, name)
        read = [*_models(config), *(model for _, model in _reward_models(config))]
        if not isinstance(config, EvalConfig):
            read.append(config.model)
        for model in read:
            makers = [s for s in recipe.stages() if Path(model).is_relative_to(recipe.out / s)]
            if not Path(model).exists():
                first.update(maker for maker in makers if maker not in stages)
    if first:
        verbs = ", ".join(f"`ppomax {name}`" for name in recipe.stages() if name in first)
        raise ConfigError(
            f"{', '.join(stages)}: reads what other stages of this recipe make; run {verbs} with "
            "it first, or `ppomax run` for all"
        )


def _check_installed(setting: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f'setting {setting}: {package} is not installed; pip install "ppomax[{extra}]"'
        )


def _check_eval(config: EvalConfig, is_made: Callable[[str], bool]) -> None:
    """Judges and questions."""
    for judge in config.judges:
        setting = f"eval.judges: {judge.spec}"
        if judge.kind == "callable":
            load_callable(judge.target, "eval.judges")
        elif judge.kind == "reward" and not is_made(judge.target):
            check_reward_model(setting, judge.target, trust_remote_code=config.trust_remote_code)
        elif judge.kind == "local" and not is_made(judge.target):
            load_tokenizer(judge.target)
        elif judge.kind == "file" and not Path(judge.target).is_file():
            raise ConfigError(f"setting {setting}: no such file")
    if config.capability is not None:
        for path in (*config.capability.data, *config.capability.fewshot):
            if is_hub_id(path):
                _check_installed("eval.capability", "datasets", "hub")
        load_all(config.capability)


def _check_ppo(config: PPOConfig) -> None:
    """Where rewards come from."""
    if not config.reward.has_outcome and config.reward.process is None:
        raise ConfigError(
            "setting ppo.reward.model: missing; give a reward model, ppo.reward.callable or "
            "ppo.reward.process, or a stage `reward`"
        )
    for scorer in config.reward.all_callables:
        load_callable(scorer.callable, "ppo.reward.callable")
    if config.reward.process:
        load_callable(config.reward.process, "ppo.reward.process")
    track = config.monitor.track if config.monitor else None
    if track is not None and track.callable:
        load_callable(track.callable, "ppo.monitor.track.callable")


def _sources(config: PPOConfig | EvalConfig) -> Iterator[tuple[str, SourceConfig]]:
    """Setting and source of the data that nobody else reads before training."""
    if isinstance(config, EvalConfig):
        yield from (("eval.data", source) for source in config.data)
        return
    if config.ptx is not None:
        yield from (("ppo.ptx.data", source) for source in config.ptx.data)
    if config.monitor is not None and config.monitor.track is not None:
        track = config.monitor.track
        yield from (("ppo.monitor.track.data", source) for source in track.data or [])


def _models(config: object) -> Iterator[str]:
    """Folders and names of further models; what this run makes is not there yet."""
    if isinstance(config, PPOConfig):
        yield from filter(None, [config.reference])
        if config.critic not in (None, "reward", "policy"):
            yield str(config.critic)
    if isinstance(config, EvalConfig):
        yield from (config.baseline, config.policy)


def _reward_models(config: object) -> Iterator[tuple[str, str]]:
    """Setting and name of every reward model."""
    if isinstance(config, PPOConfig):
        settings = config.reward
        for place, source in enumerate(settings.all_models):
            yield settings.setting_of(place), source.model
        track = config.monitor.track if config.monitor else None
        if track is not None and track.model:
            yield "ppo.monitor.track.model", track.model
    if isinstance(config, EvalConfig):
        yield from (("eval.scorers", scorer.model) for scorer in config.scorers)


def _check_file(setting: str, path: str) -> None:
    try:
        next(iter_raw(path))
    except (ConfigError, DataError) as error:
        raise type(error)(f"setting {setting}: {error}") from None
