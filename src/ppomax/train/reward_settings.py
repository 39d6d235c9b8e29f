"""Settings of where PPO's rewards come from and how they are reparameterized."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ppomax.config import Settings


class RewardModelSettings(Settings):
    """One of several reward models; a recipe may write the folder alone."""

    model: str
    """Reward model: a folder or hub id; a folder with `ensemble.json` stands for its members."""
    weight: float = 1.0
    """Factor of its raw score in the sum (ours); without effect in an ensemble."""
    retokenize: bool = False
    """For a model with another tokenizer or chat template: replies reach it as text, in its own
    template, and are scored where its own sequence classification reads."""

    @model_validator(mode="before")
    @classmethod
    def _folder_alone(cls, value: Any) -> Any:  # noqa: ANN401 - what a recipe holds
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _weighs_something(self) -> Self:
        if self.weight == 0:
            raise ValueError("weight 0 has no effect; leave the model out")
        return self


class RewardCallableSettings(Settings):
    """One of several Python functions; a recipe may write its name alone."""

    callable: str
    """`module:function`, called as `ppo.reward.callable` is."""
    weight: float = 1.0
    """Factor of its score in the sum (ours)."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:  # noqa: ANN401 - what a recipe holds
        return {"callable": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _weighs_something(self) -> Self:
        if self.weight == 0:
            raise ValueError("weight 0 has no effect; leave the function out")
        return self


class RewardSettings(Settings):
    """Where rewards come from and how they are reparameterized (Zheng et al. 2023, eq. 18).

    A reply's outcome score is the weighted sum of all reward models (or of their ensemble) and
    callables; a process function adds a reward for each step of the reply.
    """

    model: str | None = None
    """Reward model: a folder or hub id; a folder with `ensemble.json` stands for its members. In
    `ppomax run` the reward stage fills it in."""
    callable: str | None = None
    """`module:function` called with (prompts, responses, ids=..., metadata=...); may be async."""
    models: list[RewardModelSettings] = []
    """Several reward models, each with a weight, in place of `model`."""
    callables: list[RewardCallableSettings] = []
    """Several functions, each with a weight, in place of `callable`."""
    ensemble: Literal["mean", "min", "mean_minus_variance"] | None = None
    """Read all reward models as opinions on one thing, each standardized by its reward card, and
    take this of them (Coste et al. 2023). Null: scores are added up by weight, and the members of
    a folder with `ensemble.json` count as their mean."""
    variance_coef: float | None = Field(None, gt=0)
    """λ of mean − λ · variance."""
    process: str | None = None
    """`module:function` called with (prompts, steps, ids=..., metadata=...), `steps` the texts of
    each reply's steps; one number per step, paid on the step's last token. May be async."""
    step_separator: Annotated[str, Field(min_length=1)] = "\n\n"
    """Text that ends a step; pieces of white space alone are none (ours)."""
    timeout: float = Field(60.0, gt=0)
    """Seconds a function may take for one call. A call that is late is abandoned."""
    retries: int = Field(2, ge=0)
    """Further tries after a call failed or ran out of time."""
    normalise: Literal["standardize", "scale"] | None = "standardize"
    """By the running mean and std of all scores so far, or the std alone (paper: standardize).
    With `process` these are of a reply's score and step rewards together, and step rewards are
    scaled only: a shift of each would pay for, or punish, their number (ours)."""
    clip: float | None = Field(10.0, gt=0)
    """Bound on the reparameterized score (released code: 10, relaxed; paper tried 0.3 and 0.8),
    and on each step reward."""
    missing_eos_penalty: float | None = Field(None, gt=0)
    """Taken from the reparameterized score of a reply cut at the length limit (ours)."""

    @property
    def all_models(self) -> list[RewardModelSettings]:
        """The reward models, in whichever form they were given."""
        return [RewardModelSettings(model=self.model)] if self.model is not None else self.models

    @property
    def all_callables(self) -> list[RewardCallableSettings]:
        """The functions of whole replies, in whichever form they were given."""
        if self.callable is not None:
            return [RewardCallableSettings(callable=self.callable)]
        return self.callables

    @property
    def has_outcome(self) -> bool:
        """Whether a reply is scored as a whole."""
        return bool(self.all_models or self.all_callables)

    def setting_of(self, place: int) -> str:
        """The name of the setting that holds the reward model of this place."""
        return "ppo.reward.model" if self.model is not None else f"ppo.reward.models.{place}.model"

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.model is not None and self.callable is not None:
            raise ValueError(
                "give model or callable, not both; to add up several sources list them with their "
                "weights in models and callables"
            )
        for one, several in (("model", self.models), ("callable", self.callables)):
            if several and getattr(self, one) is not None:
                raise ValueError(f"give {one} or {one}s, not both")
            names = [getattr(source, one) for source in several]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{one}s: {twice[0]} stands twice; give it one weight")
        return self

    @model_validator(mode="after")
    def _ensemble(self) -> Self:
        penalised = self.ensemble == "mean_minus_variance"
        if penalised and self.variance_coef is None:
            raise ValueError("ensemble mean_minus_variance needs variance_coef")
        if self.variance_coef is not None and not penalised:
            raise ValueError("variance_coef has no effect without ensemble: mean_minus_variance")
        if self.ensemble is not None:
            if not self.all_models and (self.all_callables or self.process):
                raise ValueError("ensemble has no effect without reward models")
            if any(source.weight != 1 for source in self.models):
                raise ValueError("models: weight has no effect with ensemble; leave it out")
        return self

    @model_validator(mode="after")
    def _functions(self) -> Self:
        own = {"timeout": self.timeout != 60.0, "retries": self.retries != 2}
        idle = [name for name, changed in own.items() if changed]
        if idle and not self.all_callables and self.process is None:
            raise ValueError(f"{idle[0]} has no effect without callable or process")
        if self.step_separator != "\n\n" and self.process is None:
            raise ValueError("step_separator has no effect without process")
        return self
