"""Scores of a rollout from all reward models, ensembles and functions.

Every rank scores its share of the planned micro-batches with each model and calls each function for
its share of the replies; the results are on every rank.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppomax.data.batching import plan_micro_batches
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, sum_tensor
from ppomax.experience import (
    ensemble_mean,
    ensemble_mean_minus_variance,
    ensemble_min,
    ensemble_std,
    weighted_scores,
)
from ppomax.rollout.engine import Rollout
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.prompts import Prompt
from ppomax.train.reading import Reading
from ppomax.train.reward_settings import RewardSettings
from ppomax.train.reward_sources import Judge, RewardSources
from ppomax.train.rewards import Scorer, call, call_steps
from ppomax.train.scoring import score_rows
from ppomax.train.steps import last_tokens, split_steps


@dataclass(frozen=True, slots=True)
class Judged:
    """What all sources say of a rollout, on every rank."""

    scores: Float[Tensor, " batch"]
    """Outcome score and step rewards of each reply in all; nan where it is set aside."""
    steps: Float[Tensor, "batch response"] | None
    """Step rewards on the tokens where the steps end; None without a process function."""
    spread: Float[Tensor, " batch"] | None
    """Std over the members of an ensemble, the mean of several; None without one."""


@torch.no_grad()
def judge(
    rollout: Rollout,
    prompts: list[Prompt],
    plan: list[list[int]],
    sources: RewardSources,
    template: ChatTemplate,
    config: PPOConfig,
    here: World,
) -> Judged:
    """All sources on every reply.

    Args:
        prompts: of the replies; read by functions and by models with a tokenizer of their own.
        plan: micro-batches of all replies.
    """
    found: list[Tensor] = []
    spreads: list[Tensor] = []
    for panel in sources.panels:
        table = torch.stack(
            [
                _model_scores(one, rollout, prompts, plan, template, config, here)
                for one in panel.judges
            ]
        )
        found.append(_combined(table, config.reward))
        if len(panel.judges) > 1:
            spreads.append(ensemble_std(table))
    for scorer, _ in sources.functions:
        found.append(called_scores(scorer, rollout, prompts, template, config, here).float())
    weights = [panel.weight for panel in sources.panels] + [w for _, w in sources.functions]
    scores = torch.zeros(len(rollout.responses), device=here.device)
    if found:
        scores = weighted_scores(torch.stack(found), torch.tensor(weights, device=here.device))
    steps = None
    if sources.process is not None:
        steps = _step_rewards(sources.process, rollout, prompts, template, config, here)
        scores = scores + steps.sum(1)
        steps = torch.where(torch.isnan(scores)[:, None], 0.0, steps)
    spread = torch.stack(spreads).mean(0) if spreads else None
    return Judged(scores, steps, spread)


def _combined(
    table: Float[Tensor, "models batch"], settings: RewardSettings
) -> Float[Tensor, " batch"]:
    match settings.ensemble:
        case "min":
            return ensemble_min(table)
        case "mean_minus_variance":
            assert settings.variance_coef is not None
            return ensemble_mean_minus_variance(table, coef=settings.variance_coef)
    return ensemble_mean(table)


def _model_scores(
    one: Judge,
    rollout: Rollout,
    prompts: list[Prompt],
    plan: list[list[int]],
    template: ChatTemplate,
    config: PPOConfig,
    here: World,
) -> Float[Tensor, " batch"]:
    """One reward model's scores; nan where a reply is longer than it can read."""
    if one.reading is None:
        rows, tokenizer = rollout.sequences, template.tokenizer
    else:
        rows = _own_rows(one.reading, rollout, prompts, template, config)
        tokenizer = one.reading.template.tokenizer
        plan = _own_plan(rows, one.reading.positions, config, here)
    pad = int(tokenizer.pad_token_id)
    scores = score_rows(one.model, rows, pad, config, here, plan=plan)
    scores = (scores - one.mean) / one.std
    read = {index for indices in plan for index in indices}
    scores[[index for index in range(len(rows)) if index not in read]] = torch.nan
    return scores


def _own_rows(
    reading: Reading,
    rollout: Rollout,
    prompts: list[Prompt],
    template: ChatTemplate,
    config: PPOConfig,
) -> list[list[int]]:
    """The dialogues the policy answered, with its answers, in another model's ids."""
    rows = []
    for prompt, response in zip(prompts, rollout.responses, strict=True):
        fitted = template.fit(prompt.row.messages, config.max_prompt)
        assert fitted is not None  # or it would not be among the prompts
        rows.append(reading.ids(fitted[0], template.decode(response)))
    return rows


def _own_plan(
    rows: list[list[int]], positions: int | None, config: PPOConfig, here: World
) -> list[list[int]]:
    """Micro-batches of the rows that the model has positions for."""
    kept = [i for i, ids in enumerate(rows) if positions is None or len(ids) <= positions]
    plan = plan_micro_batches([len(rows[i]) for i in kept], config.micro_tokens, here.size)
    return [[kept[i] for i in batch] for batch in plan]


def called_scores(
    scorer: Scorer,
    rollout: Rollout,
    prompts: list[Prompt],
    template: ChatTemplate,
    config: PPOConfig,
    here: World,
) -> Float[Tensor, " batch"]:
    """A Python function's scores, in float64, each rank calling it for its share of the replies."""
    mine = here.share(range(len(rollout.responses)))
    scores = torch.zeros(len(rollout.responses), dtype=torch.float64, device=here.device)
    if mine:
        rows = [prompts[index].row for index in mine]
        found = call(
            scorer,
            [row.messages for row in rows],
            [template.decode(rollout.responses[index]) for index in mine],
            [row.id for row in rows],
            [row.meta for row in rows],
            timeout=config.reward.timeout,
            retries=config.reward.retries,
        )
        scores[mine] = torch.tensor(found, dtype=torch.float64, device=here.device)
    return sum_tensor(scores, here)


def _step_rewards(
    scorer: Scorer,
    rollout: Rollout,
    prompts: list[Prompt],
    template: ChatTemplate,
    config: PPOConfig,
    here: World,
) -> Float[Tensor, "batch response"]:
    """A process function's rewards on the last token of each step, each rank for its share."""
    mine = here.share(range(len(rollout.responses)))
    width = max(map(len, rollout.responses))
    rewards = torch.zeros(len(rollout.responses), width, device=here.device)
    if mine:
        rows = [prompts[index].row for index in mine]
        texts = [template.decode(rollout.responses[index]) for index in mine]
        steps = [split_steps(text, config.reward.step_separator) for text in texts]
        found = call_steps(
            scorer,
            [row.messages for row in rows],
            [[step.text for step in reply] for reply in steps],
            [row.id for row in rows],
            [row.meta for row in rows],
            timeout=config.reward.timeout,
            retries=config.reward.retries,
        )
        for index, text, reply, numbers in zip(mine, texts, steps, found, strict=True):
            places = last_tokens(rollout.responses[index], text, reply, template.decode)
            for token, number in zip(places, numbers, strict=True):
                rewards[index, token] += number
    return sum_tensor(rewards, here)
