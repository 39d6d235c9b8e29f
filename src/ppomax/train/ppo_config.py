"""Settings of the PPO stage. Defaults are the `ppo-max` preset; each says where it is from.

A trick is a value and null turns it off; a setting without effect in its combination is an error.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from ppomax.config import Settings
from ppomax.data.sources import Sources
from ppomax.models.lora import LoraSettings
from ppomax.rollout.engine import EngineSettings
from ppomax.rollout.sampling import SamplingParams
from ppomax.train.optim import OptimSettings
from ppomax.train.settings import StageSettings


class RewardSettings(Settings):
    """Where scores come from and how they are reparameterized (Zheng et al. 2023, eq. 18)."""

    model: str | None = None
    """Reward model: a folder or hub id. In `ppomax run` the reward stage fills it in."""
    callable: str | None = None
    """`module:function` called with (prompts, responses, ids=..., metadata=...); may be async."""
    timeout: float = Field(60.0, gt=0)
    """Seconds a callable may take for one call."""
    retries: int = Field(2, ge=0)
    """Further tries after a call failed or ran out of time."""
    normalise: Literal["standardize", "scale"] | None = "standardize"
    """By the running mean and std of all scores so far, or the std alone (paper: standardize)."""
    clip: float | None = Field(10.0, gt=0)
    """Bound on the reparameterized score (released code: 10, relaxed; paper tried 0.3 and 0.8)."""
    missing_eos_penalty: float | None = Field(None, gt=0)
    """Taken from the reparameterized score of a reply cut at the length limit (ours)."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.model is not None and self.callable is not None:
            raise ValueError("give model or callable, not both")
        own = {"timeout": self.timeout != 60.0, "retries": self.retries != 2}
        idle = [name for name, changed in own.items() if changed]
        if idle and self.callable is None:
            raise ValueError(f"{idle[0]} has no effect without callable")
        return self


class KLSettings(Settings):
    """The token-level penalty -coef · (log π − log π_ref) in the reward (eq. 19); always k1."""

    coef: float = Field(0.05, ge=0)
    """η (paper §B.2: 0.05)."""
    target_per_token: float | None = Field(None, gt=0)
    """Adapt coef towards this KL in nats per response token; null keeps it fixed."""
    target_per_sequence: float | None = Field(None, gt=0)
    """The same with KL summed over a response."""
    horizon: int = Field(10_000, ge=1)
    """Replies over which an adaptive coef may change by up to 20% (Ziegler et al. 2019)."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.target_per_token is not None and self.target_per_sequence is not None:
            raise ValueError("give target_per_token or target_per_sequence, not both")
        adaptive = self.target_per_token is not None or self.target_per_sequence is not None
        if adaptive and self.coef == 0:
            raise ValueError("an adaptive coefficient cannot start at 0: coef would stay 0")
        if not adaptive and "horizon" in self.model_fields_set and self.horizon != 10_000:
            raise ValueError(
                "horizon has no effect without target_per_token or target_per_sequence"
            )
        return self


class AdvantageSettings(Settings):
    """Generalised advantage estimation (eq. 9) and what may follow it."""

    gamma: float = Field(1.0, gt=0, le=1)
    """Discount (released code: 1)."""
    lam: float = Field(0.9, ge=0, le=1)
    """λ of GAE (paper App. C.3: 0.9)."""
    lam_critic: float | None = Field(None, ge=0, le=1)
    """λ for the critic's targets; null takes `lam`."""
    whiten: bool = False
    """Mean 0, std 1 over the optimizer batch. Not in PPO-max: it conflicts with value clipping."""
    clip: float | None = Field(None, gt=0)
    """Bound on the advantages (paper tried 0.5 and 0.12)."""


class LossSettings(Settings):
    """Surrogate, critic and entropy terms."""

    policy_clip: float | tuple[float, float] | None = 0.2
    """ε of the clipped surrogate (eq. 15; released code: 0.2), or (below, above); null: no clip."""
    dual_clip: float | None = Field(None, gt=1)
    """Lower bound dual_clip · A for negative advantages (Ye et al. 2020)."""
    value_clip: float | None = Field(0.2, gt=0)
    """ε_v of the clipped value loss (paper: 0.2); off during critic pre-training."""
    entropy_coef: float | None = Field(None, gt=0)
    """Weight of the entropy bonus (paper tried 0.01; not recommended)."""
    entropy_threshold: float | None = Field(None, gt=0)
    """Nats per token: the bonus becomes -|mean entropy - threshold|."""
    ratio_to: Literal["policy", "reference"] = "policy"
    """Denominator of the ratio: the policy that sampled, or (Fig. 7, importance sampling) the
    reference."""
    target_kl: float | None = Field(None, gt=0)
    """Leave an iteration's update when KL to the sampling policy passes this (nats per token)."""

    @model_validator(mode="after")
    def _entropy(self) -> Self:
        if self.entropy_threshold is not None and self.entropy_coef is None:
            raise ValueError("entropy_threshold has no effect without entropy_coef")
        return self


class CriticPretraining(Settings):
    """Fit the critic to the SFT policy's returns before PPO begins (paper §5.3.2)."""

    max_rollouts: int = Field(10, ge=1)
    """Most rollouts spent (ours)."""
    explained_variance: float = Field(0.5, le=1)
    """Enough when a fresh rollout's returns are explained this well (ours)."""
    epochs: int = Field(1, ge=1)
    """Passes over each of these rollouts."""


class PtxSettings(Settings):
    """PPO-ptx (eq. 17): log-likelihood of plain text in the same optimizer step."""

    data: Sources
    """Plain text."""
    coef: float = Field(1.0, gt=0)
    """λ_ptx on the token-mean NLL (ours; InstructGPT's 27.8 belongs to another normalisation)."""
    tokens: int | None = Field(None, ge=1)
    """Text tokens per optimizer step; null takes as many as there are response tokens."""
    length: int = Field(256, ge=8)
    """Texts are cut into pieces of this many tokens."""


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
    minibatch_size: int = Field(32, ge=1)
    """Replies per optimizer step, over all ranks (paper: 32)."""
    epochs: int = Field(1, ge=1)
    """Passes over a rollout before it is dropped (released code: 1)."""
    max_prompt: int = Field(512, ge=1)
    """Longest prompt in tokens; older turns are dropped until it fits."""
    sampling: SamplingParams = SamplingParams(temperature=1.0, max_new_tokens=128)
    """How replies are drawn (paper: temperature 0.8, top-p 0.9, repetition penalty 1.1; the
    default is plain temperature, for which the ratio is exact)."""
    engine: EngineSettings = EngineSettings()
    reward: RewardSettings = RewardSettings()
    kl: KLSettings | None = KLSettings()
    """Null: no reference model in the reward."""
    advantage: AdvantageSettings = AdvantageSettings()
    loss: LossSettings = LossSettings()
    critic: str = "reward"
    """What the critic starts from: `reward`, `policy` (random head), a reward-model folder."""
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

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.rollout_size % self.minibatch_size:
            raise ValueError(
                f"rollout_size {self.rollout_size} must be a multiple of minibatch_size "
                f"{self.minibatch_size}"
            )
        if self.critic == "reward" and self.reward.callable is not None:
            raise ValueError(
                "critic: reward needs a reward model; with a callable set critic to policy"
            )
        if self.max_prompt + self.sampling.max_new_tokens > self.max_length:
            raise ValueError(
                f"max_prompt {self.max_prompt} + sampling.max_new_tokens "
                f"{self.sampling.max_new_tokens} exceeds max_length {self.max_length}"
            )
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature 0 explores nothing; PPO needs a sampled reply")
        if self.kl is None and self.loss.ratio_to == "reference":
            raise ValueError(
                "loss.ratio_to: reference needs the reference model; set kl.coef (0 is allowed)"
            )
        return self

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps of one iteration."""
        return self.epochs * self.rollout_size // self.minibatch_size
