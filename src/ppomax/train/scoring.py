"""Scores of many texts, without gradient, over micro-batches and ranks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ppomax.data.batching import collate, plan_micro_batches
from ppomax.distributed import World, sum_tensor
from ppomax.errors import ModelError
from ppomax.models.heads import ScalarModel
from ppomax.train.loop import Watched, autocast, rank_micro_batches
from ppomax.train.pairs import Pair
from ppomax.train.settings import StageSettings


@torch.no_grad()
def score_rows(
    model: ScalarModel,
    rows: Sequence[list[int]],
    pad: int,
    config: StageSettings,
    here: World,
    watched: Watched = iter,
) -> Float[Tensor, " rows"]:
    """Score at the last token of each row of ids, on every rank, on the CPU.

    Args:
        config: `micro_tokens` and the compute dtype are read.
    """
    scores = torch.zeros(len(rows), device=here.device)
    plan = plan_micro_batches([len(row) for row in rows], config.micro_tokens, here.size)
    for indices, weight in watched(rank_micro_batches(plan, here)):
        batch = collate([(rows[i], [False] * len(rows[i])) for i in indices], pad, here.device)
        with autocast(here, config.compute_dtype):
            found = model.scores(batch.input_ids, batch.lengths)
        if weight:
            scores[indices] = found
    return sum_tensor(scores, here).cpu()


def score_pairs(
    model: ScalarModel,
    pairs: Sequence[Pair],
    pad: int,
    config: StageSettings,
    here: World,
    watched: Watched = iter,
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Scores of the preferred and of the other answers.

    Raises:
        ModelError: a score is not finite; the text names the pair.
    """
    rows = [pair.chosen.ids for pair in pairs] + [pair.rejected.ids for pair in pairs]
    scores = score_rows(model, rows, pad, config, here, watched)
    lost = (~scores.isfinite()).nonzero().flatten().tolist()
    if lost:
        row = pairs[lost[0] % len(pairs)].row
        raise ModelError(
            f"reward model: {len(lost)} of {len(scores)} scores are not finite, the first for pair "
            f"{row.id!r} ({row.where}); try dtype float32 or another checkpoint"
        )
    return scores[: len(pairs)], scores[len(pairs) :]
