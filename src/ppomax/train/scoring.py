"""Scores and log-probs of many texts, without gradient, over micro-batches and ranks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ppomax.data.batching import collate, plan_micro_batches
from ppomax.distributed import World
from ppomax.errors import ModelError
from ppomax.models.heads import ScalarModel
from ppomax.models.language import LanguageModel
from ppomax.train.micro_batches import Watched, autocast, table_of
from ppomax.train.pair_forward import forward_pairs, plan_pairs
from ppomax.train.pairs import Pair
from ppomax.train.settings import ComputeSettings

PairScores = tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]
"""Of the preferred and of the other answers."""


@torch.no_grad()
def score_rows(
    model: ScalarModel,
    rows: Sequence[list[int]],
    pad: int,
    config: ComputeSettings,
    here: World,
    *,
    plan: list[list[int]] | None = None,
    watched: Watched = iter,
) -> Float[Tensor, " rows"]:
    """Score at the last token of each row of ids, on every rank.

    Args:
        plan: micro-batches of the rows, where they are not to be planned here; a row in none of
            them scores 0.
    """

    def read(indices: list[int]) -> Tensor:
        batch = collate([(rows[i], [False] * len(rows[i])) for i in indices], pad, here.device)
        with autocast(here, config.compute_dtype):
            return model.scores(batch.input_ids, batch.lengths)

    if plan is None:
        plan = plan_micro_batches([len(row) for row in rows], config.micro_tokens, here.size)
    return table_of((len(rows),), plan, read, here, watched=watched)


def score_pairs(
    model: ScalarModel,
    pairs: Sequence[Pair],
    pad: int,
    config: ComputeSettings,
    here: World,
    watched: Watched = iter,
    *,
    share_prompts: bool = False,
) -> PairScores:
    """Scores of the preferred and of the other answers, on the CPU.

    Args:
        share_prompts: read a pair's prompt once; for models that heed a mask
            (`ppomax.train.pair_forward.settle_sharing`).

    Raises:
        ModelError: a score is not finite; the text names the pair.
    """
    if share_prompts:
        scores = _score_shared(model, pairs, pad, config, here, watched).cpu()
    else:
        rows = [pair.chosen.ids for pair in pairs] + [pair.rejected.ids for pair in pairs]
        scores = score_rows(model, rows, pad, config, here, watched=watched).cpu().view(2, -1)
    lost = (~scores.isfinite()).any(0).nonzero().flatten().tolist()
    if lost:
        row = pairs[lost[0]].row
        raise ModelError(
            f"reward model: scores of {len(lost)} of {len(pairs)} pairs are not finite, the first "
            f"of pair {row.id!r} ({row.where}); try dtype float32 or another checkpoint"
        )
    return scores[0], scores[1]


@torch.no_grad()
def _score_shared(
    model: ScalarModel,
    pairs: Sequence[Pair],
    pad: int,
    config: ComputeSettings,
    here: World,
    watched: Watched,
) -> Float[Tensor, "2 pairs"]:
    """Both answers of each pair behind one copy of its prompt, on every rank."""

    def read(indices: list[int]) -> Tensor:
        part = [pairs[i] for i in indices]
        with autocast(here, config.compute_dtype):
            found = forward_pairs(model, part, pad, here, imitate=False, share_prompts=True)
        return torch.stack([found.chosen, found.rejected], dim=1).float()

    plan = plan_pairs(pairs, config.micro_tokens, here, share_prompts=True)
    return table_of((len(pairs), 2), plan, read, here, watched=watched).T


@torch.no_grad()
def summed_logprobs(
    model: LanguageModel,
    rows: Sequence[tuple[list[int], list[bool]]],
    pad: int,
    config: ComputeSettings,
    here: World,
) -> Float[Tensor, " rows"]:
    """Log-probs at temperature 1, summed over each row's target tokens, on every rank, in float64.

    Args:
        rows: ids, and which of them are targets.
    """

    def read(indices: list[int]) -> Tensor:
        batch = collate([rows[i] for i in indices], pad, here.device)
        with autocast(here, config.compute_dtype):
            flat = model(batch).logprobs.double()
        parts = flat.split([sum(rows[i][1]) for i in indices])
        return torch.stack([part.sum() for part in parts])

    plan = plan_micro_batches([len(ids) for ids, _ in rows], config.micro_tokens, here.size)
    return table_of((len(rows),), plan, read, here, dtype=torch.float64)
