"""Settings of a recipe's `eval` stage."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ppomax.config import Settings
from ppomax.data.sources import Sources
from ppomax.eval.capability import CapabilityConfig
from ppomax.eval.compare import check_labels
from ppomax.eval.judges import JudgeConfig
from ppomax.rollout import EngineSettings, SamplingParams
from ppomax.train.settings import ComputeSettings

PAPER_SAMPLING = SamplingParams(
    temperature=0.8, top_p=0.9, repetition_penalty=1.1, max_new_tokens=256
)
"""Zheng et al. 2023, §6.1 (there up to 2048 tokens)."""


class ScorerConfig(Settings):
    """A reward model that scores the replies."""

    model: str
    """Reward-model folder or hub id, with the policies' tokenizer."""
    name: str = "reward model"
    role: Literal["proxy", "held-out"] = "held-out"
    """`proxy`: PPO was trained on it, so a gain says little; `held-out`: PPO never saw it."""


class EvalConfig(ComputeSettings):
    """Held-out prompts answered by both models, scored, compared."""

    baseline: str = ""
    """The SFT model; `ppomax run` fills it in."""
    policy: str = ""
    """The PPO model; `ppomax run` fills it in."""
    out: Path = Path("eval")
    """Run directory of the evaluation."""
    data: Sources = Field(default_factory=lambda: ["bundled:prompts"], validate_default=True)
    """Held-out prompts."""
    heldout: float | None = Field(None, gt=0, lt=1)
    """Take only the prompts of `data` that the training stages hold out with this share."""
    limit: int | None = Field(None, ge=1)
    """At most this many prompts."""
    samples_per_prompt: int = Field(1, ge=1)
    """Replies of each model to every prompt. Scores are compared by their means: most of what two
    single replies differ by is chance. Judges see the first."""
    scorers: list[ScorerConfig] = []
    """`ppomax run` puts the run's own reward model first, as the proxy."""
    sampling: SamplingParams = PAPER_SAMPLING
    """Paper §6.1: temperature 0.8, top-p 0.9, repetition penalty 1.1 on generated tokens."""
    engine: EngineSettings = EngineSettings()
    max_prompt: int = Field(512, ge=1)
    """Longest prompt in tokens; older turns are dropped."""
    judges: list[JudgeConfig] = []
    """Judges of the two models' replies, pair by pair and in both orders (`ppomax eval policy`):
    `[reward:PATH, openai:BASE_URL#MODEL]`. Their verdict stands first in the report."""
    rubrics: Path | None = None
    """Folder with rubrics that replace the shipped ones; for judges that are asked in words."""
    capability: CapabilityConfig | None = None
    """Questions with a known answer for both models: what alignment cost (paper, figure 12)."""
    capability_models: dict[str, str] = {}
    """Further models by name, asked the same questions: PPO without or with the LM mix."""
    samples: int = Field(24, ge=0)
    """Prompts whose replies the report shows side by side."""

    @model_validator(mode="after")
    def _has_effect(self) -> "EvalConfig":
        if self.rubrics is not None and not any(j.kind in ("openai", "local") for j in self.judges):
            raise ValueError("rubrics: no judge reads them; name an openai or local one in judges")
        if self.capability_models and self.capability is None:
            raise ValueError("capability_models has no effect without capability")
        taken = {"sft", "ppo"} & set(self.capability_models)
        if taken:
            raise ValueError(
                f"capability_models: {min(taken)} is the name of a model of the run; "
                "give it another"
            )
        if self.judges:
            check_labels(self.judges)
        return self
