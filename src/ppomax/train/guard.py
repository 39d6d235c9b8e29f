"""Numbers that are not finite, stopped before they reach anything that is kept.

Losses and gradients are checked at each step (`trainable`). Here are the replies of a rollout,
before their scores reach the running moments and their log-probs the advantages.
"""

from dataclasses import replace

import torch

from ppomax.train.experience_batch import Experience, Scored

TABLES = ("logprobs", "plain", "entropy", "values", "ref_logprobs", "ref_plain")


def without_non_finite(scored: Scored) -> tuple[Scored, dict[int, str]]:
    """The rollout less every reply with a number that is not finite, and by index what it was.

    A reply without a score has its empty mask already and is not named.
    """
    mask = scored.mask
    defects: dict[int, str] = {}
    bad = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    found = {"score": torch.isinf(scored.scores)}
    for name in TABLES:
        table = getattr(scored, name)
        if table is not None:
            found[name] = (mask & ~torch.isfinite(table)).any(1)
    if scored.last_values is not None:
        found["last_values"] = ~torch.isfinite(scored.last_values)
    for name, rows in found.items():
        rows = rows & mask.any(1)
        bad = bad | rows
        for index in rows.nonzero().flatten().tolist():
            defects.setdefault(index, f"non-finite {name}")
    steps = scored.steps
    if steps is not None:
        steps = torch.where(bad[:, None], 0.0, steps)
    return replace(scored, mask=mask & ~bad[:, None], steps=steps), defects


def contents(experience: Experience, rows: list[int]) -> list[dict[str, object]]:
    """A minibatch as JSON: ids, score and advantages of each reply."""
    rollout = experience.rollout
    return [
        {
            "prompt": rollout.prompts[row],
            "response": rollout.responses[row],
            "score": repr(float(experience.scored.scores[row])),  # nan is no JSON
            "advantages": [repr(value) for value in experience.advantages[row].tolist()],
        }
        for row in rows
    ]
