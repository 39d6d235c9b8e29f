"""What an iteration reports: metrics of replies, scores and estimates, over the whole rollout."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppomax.distributed import World
from ppomax.experience import kl_penalty, perplexity, sequence_kl
from ppomax.losses import explained_variance
from ppomax.masked import masked_mean, masked_moments, unbiased_std
from ppomax.rollout.engine import Rollout
from ppomax.train.actors import Actors
from ppomax.train.experience_batch import Experience, Scored, response_mask
from ppomax.train.memory import peak_memory_gb
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.prompts import Prompt
from ppomax.train.shape import skewness


def observe(experience: Experience, config: PPOConfig) -> dict[str, float]:
    """Every metric that is a function of the experience alone."""
    scored, rollout = experience.scored, experience.rollout
    alive = scored.mask.any(1)
    values = score_metrics(scored.scores[alive])
    values |= response_metrics(rollout.responses, rollout.finished)
    mask = scored.mask
    moments = masked_moments(experience.advantages, experience.mask)
    values |= {
        "reward/total_mean": float(experience.rewards.sum(1)[alive].mean()),
        "policy/perplexity": float(perplexity(scored.plain, mask)),
        "policy/entropy": float(masked_mean(scored.entropy, mask)),
        "advantage/mean": moments.mean,
        "advantage/std": unbiased_std(moments),
    }
    guessed = config.advantage.missing_eos == "bootstrap"  # what a cut reply would have earned
    values |= critic_metrics(experience, guessed=guessed) | reference_metrics(scored)
    if scored.spread is not None:
        values["reward/ensemble_std"] = float(scored.spread[alive].mean())
    if config.kl is not None:
        values["kl/coef"] = experience.kl_coef
    if experience.exact_kl is not None:
        values["kl/ref_exact"] = experience.exact_kl
    if config.sampling.is_plain:
        values |= engine_gap(rollout, scored)
    return values


LEAST_FINISHED = 8
"""Replies whose returns tell how well a critic explains them."""


def critic_metrics(experience: Experience, *, guessed: bool) -> dict[str, float]:
    """Values and returns, nothing without a critic.

    Args:
        guessed: returns of cut replies end in the critic's value, which cannot judge the critic;
            of fewer than `LEAST_FINISHED` others nothing is said: 0.
    """
    values, mask = experience.scored.values, experience.mask
    if values is None or experience.returns is None or experience.monte_carlo is None:
        return {}
    finished = torch.tensor(experience.rollout.finished, device=mask.device)[:, None]
    known = mask & finished if guessed else mask
    judged = not guessed or int(known.any(1).sum()) >= LEAST_FINISHED
    explained = explained_variance(values, experience.monte_carlo, known) if judged else 0.0
    return {
        "value/mean": float(masked_mean(values, mask)),
        "value/explained_variance": float(explained),
        "return/mean": float(masked_mean(experience.returns, mask)),
    }


def reference_metrics(scored: Scored) -> dict[str, float]:
    """KL to the reference, nothing without one."""
    if scored.ref_logprobs is None or scored.ref_plain is None:
        return {}
    pair = (scored.logprobs, scored.ref_logprobs, scored.mask)
    alive = scored.mask.any(1)
    return {
        "kl/ref_k1": float(masked_mean(kl_penalty(*pair, estimator="k1"), scored.mask)),
        "kl/ref_k3": float(masked_mean(kl_penalty(*pair, estimator="k3"), scored.mask)),
        "kl/ref_sequence": float(sequence_kl(*pair)[alive].mean()),
        "ref/perplexity": float(perplexity(scored.ref_plain, scored.mask)),
    }


def score_metrics(scores: Tensor) -> dict[str, float]:
    """Mean, unbiased std, quantiles and skewness (population moments) of the raw scores."""
    x = scores.double()
    std = float(x.std()) if len(x) > 1 else 0.0
    quantiles = torch.quantile(
        x, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=x.dtype, device=x.device)
    )
    names = ("p05", "p25", "p50", "p75", "p95")
    return {
        "reward/score_mean": float(x.mean()),
        "reward/score_std": std,
        "reward/score_skew": skewness(x),
        **{f"reward/score_{name}": float(q) for name, q in zip(names, quantiles, strict=True)},
    }


def response_metrics(
    responses: Sequence[Sequence[int]], finished: Sequence[bool]
) -> dict[str, float]:
    """Length, truncation and repetition of replies."""
    lengths = torch.tensor([len(response) for response in responses], dtype=torch.float64)
    return {
        "response/length_mean": float(lengths.mean()),
        "response/length_p95": float(torch.quantile(lengths, 0.95)),
        "response/truncated_share": 1 - sum(finished) / len(finished),
        "response/distinct_2": _mean([distinct(response, 2) for response in responses]),
        "response/repetition_4": _mean([1 - distinct(response, 4) for response in responses]),
    }


def distinct(ids: Sequence[int], n: int) -> float:
    """Different n-grams over all n-grams of one reply (Li et al. 2016); 1 where it has none."""
    grams = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def engine_gap(rollout: Rollout, scored: Scored) -> dict[str, float]:
    """|engine's log-prob − trainer's|, per response token."""
    own = scored.logprobs[response_mask(rollout, scored.logprobs.device)].cpu()
    every = (torch.tensor([x for row in rollout.logprobs for x in row]) - own).abs()
    return {
        "engine/logprob_gap_mean": float(every.mean()),
        "engine/logprob_gap_max": float(every.max()),
    }


def timing(
    seconds: Mapping[str, float], experience: Experience, trained: int, here: World
) -> dict[str, float]:
    """Seconds by phase, tokens per second, memory.

    Args:
        trained: tokens that the update read, prompts included.
    """
    new = sum(map(len, experience.rollout.responses))
    return {
        **{f"time/{phase}": value for phase, value in seconds.items()},
        "throughput/rollout_tokens_per_s": new / max(seconds["rollout"], 1e-9),
        "throughput/train_tokens_per_s": trained / max(seconds["update"], 1e-9),
        "memory/peak_gb": peak_memory_gb(here),
    }


def sample_rows(
    experience: Experience,
    prompts: list[Prompt],
    actors: Actors,
    count: int,
    *,
    step: int,
    attempt: int,
) -> list[dict[str, Any]]:
    """A few replies with their scores: any, and of three or more the best and the worst scored."""
    rows = []
    for index, pick in picked(experience.scored.scores.tolist()[: len(prompts)], count):
        score = float(experience.scored.scores[index])
        rows.append(
            {
                "stage": "ppo",
                "step": step,
                "attempt": attempt,
                "pick": pick,
                "id": prompts[index].row.id,
                "prompt": list(prompts[index].row.messages),
                "response": actors.template.decode(experience.rollout.responses[index]),
                "score": score if math.isfinite(score) else None,
                "length": len(experience.rollout.responses[index]),
                "truncated": not experience.rollout.finished[index],
            }
        )
    return rows


def picked(scores: Sequence[float], count: int) -> list[tuple[int, str]]:
    """Places of the replies to show and why: the first ones (prompts are shuffled), best, worst."""
    known = [index for index, score in enumerate(scores) if math.isfinite(score)]
    if count >= len(scores) or count < 3 or not known:
        return [(index, "random") for index in range(min(count, len(scores)))]
    best, worst = (choose(known, key=lambda index: scores[index]) for choose in (max, min))
    rest = [index for index in range(len(scores)) if index not in (best, worst)]
    return [*((index, "random") for index in rest[: count - 2]), (best, "best"), (worst, "worst")]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
