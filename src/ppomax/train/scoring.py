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
from ppomax.train.pairs import Pair
from ppomax.train.settings import ComputeSettings


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
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Scores of the preferred and of the other answers, on the CPU.

    Raises:
        ModelError: a score is not finite; the text names the pair.
    """
    rows = [pair.chosen.ids for pair in pairs] + [pair.rejected.ids for pair in pairs]
    scores = score_rows(model, rows, pad, config, here, watched=watched).cpu()
    lost = (~scores.isfinite()).nonzero().flatten().tolist()
    if lost:
        row = pairs[lost[0] % len(pairs)].row
        raise ModelError(
            f"reward model: {len(lost)} of {len(scores)} scores are not finite, the first for pair "
            f"{row.id!r} ({row.where}); try dtype float32 or another checkpoint"
        )
    return scores[: len(pairs)], scores[len(pairs) :]


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
