"""Held-out tracking: the same prompts with the same seeds every few iterations, scored by two.

The proxy is what PPO is trained on; a second scorer, if one is given, PPO never sees, and it alone
says whether a reply beats the SFT model's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ppomax import rundir
from ppomax.data.batching import derived_seed, plan_micro_batches
from ppomax.data.sources import load_prompts, split_by_prompt
from ppomax.data.splits import spread
from ppomax.distributed import World, gather
from ppomax.errors import ConfigError
from ppomax.models.ensembles import members
from ppomax.models.heads import ScalarModel
from ppomax.models.language import LanguageModel
from ppomax.models.load import load_reward_model
from ppomax.rollout.engine import Rollout, merge_rollouts, synced
from ppomax.train.actors import Actors
from ppomax.train.loop import StageRun
from ppomax.train.monitor_settings import TrackSettings
from ppomax.train.observe import response_metrics, score_metrics
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.prompts import Prompt
from ppomax.train.reward_scores import called_scores, judge
from ppomax.train.reward_sources import check_tokenizer
from ppomax.train.rewards import Scorer, load_callable
from ppomax.train.scoring import score_rows, summed_logprobs
from ppomax.train.shape import wasserstein_1


@dataclass(frozen=True, slots=True)
class Round:
    """One answering of the held-out prompts."""

    rollout: Rollout
    texts: list[str]
    scores: list[float]
    """By the proxy; nan where it gave none."""
    seconds: list[float] | None
    """By the second scorer."""
    nll: list[float]
    """Summed over each reply's tokens, temperature 1."""

    def rows(self, size: int) -> list[dict[str, float]]:
        """What a metrics row says of the replies, in groups of `size`: KL is the SFT model's, 0."""
        found = []
        for start in range(0, max(1, len(self.texts) - size + 1), size):
            part = slice(start, start + size)
            responses = self.rollout.responses[part]
            scores = torch.tensor([x for x in self.scores[part] if not math.isnan(x)])
            tokens = sum(map(len, responses))
            found.append(
                response_metrics(responses, self.rollout.finished[part])
                | (score_metrics(scores) if len(scores) else {})
                | {"policy/perplexity": math.exp(sum(self.nll[part]) / tokens), "kl/ref_k3": 0.0}
            )
        return found


class Tracker:
    """The prompts, the scorers and what the SFT model scored."""

    def __init__(
        self, config: PPOConfig, settings: TrackSettings, actors: Actors, here: World
    ) -> None:
        self.config, self.settings, self.actors, self.here = config, settings, actors, here
        self.prompts = load_tracked(config, settings, actors)
        self.second_model = _second_model(config, settings, actors, here)
        self.second: Scorer | None = (
            load_callable(settings.callable, "ppo.monitor.track.callable")
            if settings.callable
            else None
        )
        self.sft: dict[str, Any] | None = None
        """Scores of the SFT model's replies."""

    def answer(self, model: LanguageModel, config: PPOConfig) -> Round:
        """Each rank writes its share; the same seeds every time.

        Args:
            config: the run's as it is now: its micro-batches may have become smaller.
        """
        here = self.here
        mine = here.share(list(range(len(self.prompts))))
        seeds = [derived_seed(config.seed, "heldout", i) for i in mine]
        with synced(self.actors.engine, model.lm) as engine:
            local = engine.generate([self.prompts[i].ids for i in mine], config.sampling, seeds)
        rollout = merge_rollouts(gather(local, here), len(self.prompts))
        texts = [self.actors.template.decode(response) for response in rollout.responses]
        plan = plan_micro_batches(rollout.lengths, config.micro_tokens, here.size)
        sources, template = self.actors.rewards, self.actors.template
        judged = judge(rollout, self.prompts, plan, sources, template, config, here)
        scores = judged.scores.tolist()
        seconds = None
        if self.second_model is not None or self.second is not None:
            seconds = self._seconds(rollout, config)
        return Round(rollout, texts, scores, seconds, self._nll(rollout, model, config))

    def measure(self, found: Round) -> dict[str, float]:
        """Metrics of a round; the first one says what the SFT model scored."""
        if self.sft is None:
            self.sft = {
                "scores": found.scores,
                "seconds": found.seconds,
                "responses": found.rollout.responses,
            }
        scores = _known(found.scores)
        lengths = [len(response) for response in found.rollout.responses]
        values = {
            "heldout/length_mean": sum(lengths) / len(lengths),
            "heldout/perplexity": math.exp(sum(found.nll) / sum(lengths)),
        }
        if len(scores):
            shape = score_metrics(scores)
            names = ("mean", "p05", "p50", "p95")
            values |= {f"heldout/score_{name}": shape[f"reward/score_{name}"] for name in names}
            sft = _known(self.sft["scores"])
            if len(sft):
                values["heldout/score_w1"] = wasserstein_1(scores, sft)
        if found.seconds is not None:
            responses = found.rollout.responses
            theirs = self.sft.get("responses", [None] * len(responses))  # an older checkpoint's
            same = [a == b for a, b in zip(responses, theirs, strict=True)]
            values |= against(found.seconds, self.sft["seconds"], same)
        return values

    def write(self, found: Round, run: StageRun, step: int) -> None:
        """One row of heldout.jsonl: every prompt's scores; of step 0 also what the detector learns.

        Step 0 comes first: an earlier row is of a process that died before its next checkpoint.
        """
        if not self.here.is_main:
            return
        path = run.path / rundir.HELDOUT
        row: dict[str, Any] = {"stage": "ppo", "step": step, "attempt": run.attempt}
        row |= {"scores": _ready(found.scores)}
        if found.seconds is not None:
            row["seconds"] = _ready(found.seconds)
        if step == 0:
            row["baseline"] = found.rows(self.config.replies)
            rundir.cut_back(path, {})
        rundir.append_jsonl(path, [row])

    def _seconds(self, rollout: Rollout, config: PPOConfig) -> list[float]:
        """What the second scorer says, the same on every rank."""
        here, template = self.here, self.actors.template
        if self.second is not None:
            found = called_scores(self.second, rollout, self.prompts, template, config, here)
        else:
            assert self.second_model is not None
            pad = self.actors.pad
            found = score_rows(self.second_model, rollout.sequences, pad, config, here)
        return [float(score) for score in found]

    def _nll(self, rollout: Rollout, model: LanguageModel, config: PPOConfig) -> list[float]:
        rows = [
            (prompt + response, [False] * len(prompt) + [True] * len(response))
            for prompt, response in zip(rollout.prompts, rollout.responses, strict=True)
        ]
        sums = summed_logprobs(model, rows, self.actors.pad, config, self.here)
        return [-float(total) for total in sums]


def against(
    seconds: Sequence[float], sft: Sequence[float], same: Sequence[bool]
) -> dict[str, float]:
    """Mean of the second scorer and how often a reply beats the SFT model's to the same prompt.

    Args:
        same: the reply is that of the SFT model; its score may differ by rounding, among others.
    """
    pairs = [
        (b if equal else a, b)
        for a, b, equal in zip(seconds, sft, same, strict=True)
        if not (math.isnan(a) or math.isnan(b))
    ]
    known = _known(seconds)
    values = {"heldout/second_mean": float(known.mean())} if len(known) else {}
    if pairs:
        count = len(pairs)
        values |= {
            "heldout/win": sum(a > b for a, b in pairs) / count,
            "heldout/tie": sum(a == b for a, b in pairs) / count,
            "heldout/lose": sum(a < b for a, b in pairs) / count,
        }
    return values


def load_tracked(config: PPOConfig, settings: TrackSettings, actors: Actors) -> list[Prompt]:
    """The held-out prompts, spread evenly over all of them, so that every source has its share.

    Raises:
        ConfigError: there are none.
    """
    sources = settings.data if settings.data is not None else config.data
    rows = load_prompts(sources, max_bad_rows=config.max_bad_rows).rows
    if settings.data is None:
        rows = split_by_prompt(rows, config.heldout).heldout
    fitted = [actors.template.fit(row.messages, config.max_prompt) for row in rows]
    found = [
        Prompt(index, row, fits[1])
        for index, (row, fits) in enumerate(zip(rows, fitted, strict=True))
        if fits is not None
    ]
    prompts = spread(found, settings.prompts)
    if len(prompts) < 2:
        raise ConfigError(
            f"setting ppo.monitor.track: {len(prompts)} held-out prompts found; give track.data or "
            "a larger ppo.heldout"
        )
    return prompts


def _second_model(
    config: PPOConfig, settings: TrackSettings, actors: Actors, here: World
) -> ScalarModel | None:
    """The second reward model, which reads the policy's ids.

    Raises:
        ConfigError: it has another tokenizer or chat template, or is an ensemble.
    """
    if settings.model is None:
        return None
    setting = "ppo.monitor.track.model"
    names = members(settings.model)
    if len(names) > 1:
        raise ConfigError(
            f"setting {setting}: {settings.model} holds {len(names)} models; name one"
        )
    check_tokenizer(setting, names[0], config, actors.template.tokenizer)
    model = load_reward_model(
        names[0],
        dtype=config.compute_dtype,
        init_from_lm=False,
        trust_remote_code=config.trust_remote_code,
    )
    model.requires_grad_(False)
    return model.to(here.device)


def _known(scores: Sequence[float]) -> torch.Tensor:
    known = [score for score in scores if not math.isnan(score)]
    return torch.tensor(known, dtype=torch.float64)


def _ready(scores: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(score) else round(score, 6) for score in scores]
