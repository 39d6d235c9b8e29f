"""Settings of the PPO stage. Defaults are the `ppo-max` preset; each says where it is from.

A trick is a value and null turns it off; a setting without effect in its combination is an error.
"""

from typing import Any, Self

from pydantic import BaseModel, Field, model_validator

from ppomax.data.sources import Sources
from ppomax.models.lora import LoraSettings
from ppomax.presets import with_preset
from ppomax.rollout.engine import EngineSettings
from ppomax.rollout.sampling import SamplingParams
from ppomax.train.monitor_settings import MonitorSettings
from ppomax.train.optim import OptimSettings
from ppomax.train.ppo_settings import (
    GROUPED,
    AdvantageSettings,
    CriticPretraining,
    KLSettings,
    LossSettings,
    PtxSettings,
)
from ppomax.train.reward_settings import RewardSettings
from ppomax.train.settings import StageSettings


class PPOConfig(StageSettings):
    """Align a policy with a reward by PPO-max."""

    data: Sources
    """Prompts; preference and SFT files give theirs."""
    heldout: float = Field(0.0, ge=0, lt=1)
    """Share of prompts kept out: those that the other stages hold out with the same share."""
    iterations: int = Field(ge=1)
    """Rollout-and-update rounds."""
    rollout_size: int = Field(128, ge=1)
    """Prompts per iteration, over all ranks (paper: 128)."""
    samples_per_prompt: int = Field(1, ge=1)
    """Replies to each of them (4 where the estimator compares replies to one prompt: ours)."""
    minibatch_size: int = Field(32, ge=1)
    """Replies per optimizer step, over all ranks (paper: 32)."""
    epochs: int = Field(1, ge=1)
    """Passes over a rollout before it is dropped (released code: 1)."""
    buffer_iterations: int = Field(1, ge=1)
    """Latest rollouts learned from in each iteration, newest first (paper: a small buffer, 1)."""
    max_prompt: int = Field(512, ge=1)
    """Longest prompt in tokens; older turns are dropped until it fits."""
    sampling: SamplingParams = SamplingParams(temperature=1.0, max_new_tokens=128)
    """How replies are drawn (paper: temperature 0.8, top-p 0.9, repetition penalty 1.1; the
    default is plain temperature, for which the ratio is exact)."""
    engine: EngineSettings = EngineSettings()
    reward: RewardSettings = RewardSettings()
    reference: str | None = None
    """The reference where it is not `model` itself: a policy from the base model is held to the
    SFT model (detail 9). In a recipe `start: base` sets both."""
    kl: KLSettings | None = KLSettings()
    """Null: no reference model at all."""
    advantage: AdvantageSettings = AdvantageSettings()
    loss: LossSettings = LossSettings()
    critic: str | None = "reward"
    """What the critic starts from: `reward` (the first reward model), `policy` (random head), a
    reward-model folder. Null, as are the critic's other settings, where the estimator has none."""
    critic_pretraining: CriticPretraining | None = CriticPretraining()
    """Null: none."""
    ptx: PtxSettings | None = None
    """Null: no plain text in the update."""
    optim: OptimSettings = OptimSettings(lr=5e-7, schedule="constant")
    """Policy (paper: 5e-7 for 7B, warm-up 10% where the critic is not pre-trained)."""
    critic_optim: OptimSettings = OptimSettings(lr=1.65e-6, schedule="constant", eps=1e-8)
    """Critic (paper: 1.65e-6 for 7B; eps: released code)."""
    lora: LoraSettings | None = None
    """Adapters for policy and critic; the reference is the policy with adapters off."""
    monitor: MonitorSettings | None = MonitorSettings()
    """What is watched and what is done when it goes wrong; null: nothing."""

    @model_validator(mode="before")
    @classmethod
    def _follow_estimator(cls, data: Any) -> Any:  # noqa: ANN401 - whatever stands in the recipe
        """Over the `preset` that is named, and over defaults that hang on the estimator.

        What is set by hand stays and is checked.
        """
        if isinstance(data, dict) and "preset" in data:
            plain = {
                key: value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
                for key, value in data.items()
            }
            data = with_preset(plain, "settings")
        advantage = data.get("advantage") if isinstance(data, dict) else None
        if isinstance(advantage, AdvantageSettings):
            advantage = advantage.model_dump()
        estimator = advantage.get("estimator", "gae") if isinstance(advantage, dict) else "gae"
        if estimator == "gae":
            return data
        loss = data.get("loss", {})
        if isinstance(loss, LossSettings):
            loss = loss.model_dump(include=loss.model_fields_set)
        data = {"critic": None, "critic_pretraining": None, **data}
        if isinstance(loss, dict):
            data["loss"] = {"value_clip": None, **loss}
        if estimator in GROUPED:
            data.setdefault("samples_per_prompt", 4)
        return data

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.replies % self.minibatch_size:
            raise ValueError(
                f"rollout_size {self.rollout_size} · samples_per_prompt {self.samples_per_prompt} "
                f"must be a multiple of minibatch_size {self.minibatch_size}"
            )
        if self.max_prompt + self.sampling.max_new_tokens > self.max_length:
            raise ValueError(
                f"max_prompt {self.max_prompt} + sampling.max_new_tokens "
                f"{self.sampling.max_new_tokens} exceeds max_length {self.max_length}"
            )
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature 0 explores nothing; PPO needs a sampled reply")
        if self.advantage.missing_eos is not None and self.reward.missing_eos_penalty is not None:
            raise ValueError(
                "reward.missing_eos_penalty has no effect with advantage.missing_eos: "
                f"{self.advantage.missing_eos}, which leaves a cut reply's score out"
            )
        return self

    @model_validator(mode="after")
    def _critic(self) -> Self:
        estimator = self.advantage.estimator
        if self.advantage.with_critic:
            if self.critic is None:
                raise ValueError(
                    "critic: null, but advantage.estimator gae needs one; estimators without are "
                    "reinforce, rloo, grpo and reinforce_baseline"
                )
            scored = self.reward.all_callables or self.reward.process
            if self.critic == "reward" and scored and not self.reward.all_models:
                raise ValueError(
                    "critic: reward needs a reward model; with a callable set critic to policy"
                )
            if self.critic == "reward" and any(m.retokenize for m in self.reward.all_models[:1]):
                raise ValueError(
                    "critic: reward needs a reward model with the policy's tokenizer, and the "
                    "first of reward.models has retokenize; put another first, or set critic to "
                    "policy"
                )
            return self
        for name, given in {
            "critic": self.critic is not None,
            "critic_pretraining": self.critic_pretraining is not None,
            "critic_optim": self.critic_optim != type(self).model_fields["critic_optim"].default,
            "loss.value_clip": self.loss.value_clip is not None,
        }.items():
            if given:
                raise ValueError(
                    f"{name} has no effect: advantage.estimator {estimator} has no critic"
                )
        if estimator in GROUPED and self.samples_per_prompt == 1:
            raise ValueError(
                f"advantage.estimator {estimator} compares replies to one prompt; set "
                "samples_per_prompt to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _reference(self) -> Self:
        if self.kl is None and self.loss.ratio_to == "reference":
            raise ValueError(
                "loss.ratio_to: reference needs the reference model; set kl.coef (0 is allowed)"
            )
        if self.kl is None and self.reference is not None:
            raise ValueError("reference has no effect with kl: null")
        return self

    @model_validator(mode="after")
    def _monitor(self) -> Self:
        monitor = self.monitor
        if monitor is None:
            return self
        if self.kl is None and monitor.max_kl is not None:
            raise ValueError("monitor.max_kl needs the reference model; set kl.coef (0 is allowed)")
        if self.kl is None and monitor.action == "rollback" and monitor.kl_factor is not None:
            raise ValueError(
                "monitor.kl_factor has no effect with kl: null; set it to null and give lr_factor"
            )
        if monitor.track is not None and monitor.track.data is None and not self.heldout:
            raise ValueError("monitor.track needs prompts: give track.data or heldout above 0")
        return self

    @property
    def replies(self) -> int:
        """Replies of one iteration."""
        return self.rollout_size * self.samples_per_prompt

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps on one rollout in one iteration."""
        return self.epochs * self.replies // self.minibatch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all iterations; the buffer fills up over the first ones."""
        rollouts = sum(
            min(iteration, self.buffer_iterations) for iteration in range(1, self.iterations + 1)
        )
        return rollouts * self.steps_per_iteration

    def advice(self) -> list[str]:
        """Combinations that the paper found to conflict (§B.1, Figure 14)."""
        found = []
        normalise, whiten = self.reward.normalise, self.advantage.whiten
        if normalise == "standardize" and whiten and self.loss.value_clip is not None:
            found.append(
                "reward.normalise and advantage.whiten with loss.value_clip conflict "
                "(Zheng et al. 2023, Figure 14); set loss.value_clip to null or drop one of them"
            )
        if normalise == "scale" and whiten:
            found.append(
                "reward.normalise: scale with advantage.whiten: two reparameterizations should not "
                "be mixed (Zheng et al. 2023, Figure 14); keep one"
            )
        return found
