"""The parts of the PPO stage's settings: KL, advantages, losses, critic pre-training, plain text.

A trick is a value and null turns it off; a setting without effect in its combination is an error.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from ppomax.config import Settings
from ppomax.data.sources import Sources


class KLSettings(Settings):
    """How far the policy may go from the reference: a penalty in the reward, or a loss term."""

    coef: float = Field(0.05, ge=0)
    """η (paper §B.2: 0.05); 0 in the reward only measures."""
    where: Literal["reward", "loss"] = "reward"
    """`reward`: -coef · (log π − log π_ref) on every token (eq. 19). `loss`: a term beside the
    surrogate (ours)."""
    estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """In the reward k1 alone. As a loss: k2, whose gradient is ∇KL(π‖ref); k3, that is ∇KL(ref‖π);
    or `exact`, KL(π‖ref) over the whole vocabulary."""
    exact_replies: int | None = Field(None, ge=1)
    """Replies of an iteration whose KL is also computed over the whole vocabulary, to judge the
    estimators by; null: none."""
    target_per_token: float | None = Field(None, gt=0)
    """Adapt coef towards this KL in nats per response token; null keeps it fixed."""
    target_per_sequence: float | None = Field(None, gt=0)
    """The same with KL summed over a response."""
    horizon: int = Field(10_000, ge=1)
    """Replies over which an adaptive coef may change by up to 20% (Ziegler et al. 2019)."""

    @model_validator(mode="after")
    def _right_gradient(self) -> Self:
        if self.where == "reward" and self.estimator in ("k2", "k3"):
            raise ValueError(
                f"estimator {self.estimator} inside the reward has a wrong policy gradient (for "
                "k3 it is ∇KL(π‖ref) − ∇KL(ref‖π), 0 to first order at the reference); take k1, or "
                "where: loss"
            )
        if self.where == "reward" and self.estimator == "exact":
            raise ValueError("estimator exact is a loss term; set where: loss")
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator k1 as a loss term has an expected gradient of zero; take k2, k3 or exact"
            )
        if self.where == "loss" and self.coef == 0:
            raise ValueError("where: loss has no effect with coef 0")
        return self

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

    @property
    def exact_loss(self) -> bool:
        """Whether the update computes the KL over the whole vocabulary."""
        return self.where == "loss" and self.estimator == "exact"


GROUPED = ("rloo", "grpo", "reinforce_baseline")
"""Estimators that compare replies to the same prompt."""


class AdvantageSettings(Settings):
    """What each token is credited with, and what may follow."""

    estimator: Literal["gae", "reinforce", "rloo", "grpo", "reinforce_baseline"] = "gae"
    """`gae` (eq. 9) has a critic; the others have none. `reinforce`: reward to go, whitened over
    the rollout. Of the summed rewards of several replies to a prompt: `rloo` less the others' mean;
    `grpo` less the mean, over the std; `reinforce_baseline` less the mean, whitened."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount (released code: 1)."""
    lam: float = Field(0.9, ge=0, le=1)
    """λ of GAE (paper App. C.3: 0.9)."""
    lam_critic: float | None = Field(None, ge=0, le=1)
    """λ for the critic's targets; null takes `lam`."""
    scale_std: bool = True
    """`grpo`: divide by the group's std; false is Dr. GRPO (Liu et al. 2025)."""
    missing_eos: Literal["bootstrap", "drop"] | None = None
    """A reply cut at the length limit: its score gives way to the critic's value after its last
    token, or the reply teaches nothing (ours). Null: it is taken as it is."""
    whiten: bool = False
    """Mean 0, std 1 over the optimizer batch. Not in PPO-max: it conflicts with value clipping."""
    clip: float | None = Field(None, gt=0)
    """Bound on the advantages (paper tried 0.5 and 0.12)."""

    @property
    def with_critic(self) -> bool:
        """Whether a critic is part of the estimate."""
        return self.estimator == "gae"

    @model_validator(mode="after")
    def _estimator(self) -> Self:
        name = self.estimator
        if not self.with_critic:
            for setting, changed in {
                "lam": self.lam != 0.9,
                "lam_critic": self.lam_critic is not None,
                "missing_eos: bootstrap": self.missing_eos == "bootstrap",
            }.items():
                if changed:
                    raise ValueError(f"{setting} needs a critic; estimator {name} has none")
        if name in GROUPED and self.gamma != 1:
            raise ValueError(
                f"gamma has no effect with estimator {name}, which sums a reply's rewards"
            )
        if name != "grpo" and not self.scale_std:
            raise ValueError("scale_std has no effect without estimator grpo")
        if name in ("reinforce", "reinforce_baseline") and self.whiten:
            raise ValueError(
                f"whiten has no effect with estimator {name}, which whitens the rollout"
            )
        return self


class LossSettings(Settings):
    """Surrogate, critic and entropy terms."""

    policy_clip: float | tuple[float, float] | None = 0.2
    """ε of the clipped surrogate (eq. 15; released code: 0.2), or (below, above); null: no clip."""
    penalty_coef: float | None = Field(None, gt=0)
    """β of PPO-penalty (eq. 14), KL(old‖new) in place of the clip; null: no penalty."""
    penalty_target: float | None = Field(None, gt=0)
    """Halve or double β to keep that KL near this (nats per token; Schulman et al. 2017, §4)."""
    dual_clip: float | None = Field(None, gt=1)
    """Lower bound dual_clip · A for negative advantages (Ye et al. 2020)."""
    value_clip: float | None = Field(0.2, gt=0)
    """ε_v of the clipped value loss (paper: 0.2); off during critic pre-training."""
    entropy_coef: float | None = Field(None, gt=0)
    """Weight of the entropy bonus (paper tried 0.01; not recommended)."""
    entropy_threshold: float | None = Field(None, gt=0)
    """Nats per token: the bonus becomes -|mean entropy - threshold|."""
    entropy_fraction: float | None = Field(None, gt=0)
    """The threshold as a share of the entropy measured on the run's first rollout (ours: the
    paper's 30 and 35 are no entropies per token)."""
    ratio_to: Literal["policy", "reference"] = "policy"
    """Denominator of the ratio: the policy that sampled, or (Fig. 7, importance sampling) the
    reference."""
    target_kl: float | None = Field(None, gt=0)
    """Leave an iteration's update when KL to the sampling policy passes this (nats per token)."""

    @model_validator(mode="after")
    def _entropy(self) -> Self:
        for name in ("entropy_threshold", "entropy_fraction"):
            if getattr(self, name) is not None and self.entropy_coef is None:
                raise ValueError(f"{name} has no effect without entropy_coef")
        if self.entropy_threshold is not None and self.entropy_fraction is not None:
            raise ValueError("give entropy_threshold or entropy_fraction, not both")
        return self

    @model_validator(mode="after")
    def _penalty(self) -> Self:
        if self.penalty_coef is None:
            if self.penalty_target is not None:
                raise ValueError("penalty_target has no effect without penalty_coef")
            return self
        for name in ("policy_clip", "dual_clip"):
            if getattr(self, name) is not None:
                raise ValueError(f"penalty_coef stands in place of a clip; set {name} to null")
        if self.ratio_to == "reference":
            raise ValueError(
                "penalty_coef weighs KL to the sampling policy, which ratio_to: reference leaves "
                "out of the ratio; for KL to the reference set kl.where: loss"
            )
        return self


class CriticPretraining(Settings):
    """Fit the critic to the SFT policy's returns before PPO begins (paper §5.3.2)."""

    max_rollouts: int = Field(10, ge=1)
    """Most rollouts spent (ours)."""
    explained_variance: float | None = Field(0.5, le=1)
    """Enough when a fresh rollout's returns are explained this well (ours); null: never."""
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
