"""What a trained reward model says of itself: its card, and the export with it."""

import math
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ppomax.data.splits import spread
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, state_on_main
from ppomax.models.export import (
    Card,
    RewardCard,
    export_reward,
    template_hash,
    tokenizer_hash,
)
from ppomax.models.heads import ScalarModel
from ppomax.models.lora import merged_copy
from ppomax.models.names import licence_of
from ppomax.train.pairs import Pair
from ppomax.train.probes import probe_messages, score_dialogues
from ppomax.train.reward_data import RewardConfig, RewardData
from ppomax.train.scoring import PairScores, score_pairs
from ppomax.train.supervised import Fitted

SAMPLE = 64
"""Training pairs, from all over the data, whose scores give the card's mean and std, the latter to
about 6% (ours)."""
SUBSETS = ("lang", "kind", "source")
"""Columns by which the card gives accuracy."""


def export(
    config: RewardConfig,
    model: ScalarModel,
    template: ChatTemplate,
    data: RewardData,
    fitted: Fitted,
    here: World,
    folder: Path,
    scores: PairScores | None = None,
) -> None:
    """Score what the card needs and write the folder (collective; rank 0 writes).

    Args:
        scores: of the held-out pairs by these weights, where they are known.
    """
    tokenizer = template.tokenizer
    pad = int(tokenizer.pad_token_id)
    # adapters are merged into what is written, and the merged weights round differently
    scorer = merged_copy(model).to(config.compute_dtype) if config.lora else model
    trained = torch.cat(score_pairs(scorer, spread(data.train, SAMPLE), pad, config, here))
    judged = data.heldout
    if judged and (scores is None or config.lora):
        share = bool(config.share_prompts)
        scores = score_pairs(scorer, judged, pad, config, here, share_prompts=share)
    table = accuracy_table(judged, scores) if scores else {}
    probes = score_dialogues(scorer, list(probe_messages()), template, here, config.compute_dtype)
    state = state_on_main(model, here)  # collective
    if not here.is_main:
        return
    licence = config.licence or licence_of(config.model)
    length = length_correlations(judged, scores) if scores else {}
    numbers: dict[str, float | int | str] = {
        f"held-out accuracy ({name})": _shown(*row) for name, row in table.items()
    }
    export_reward(
        model,
        tokenizer,
        folder,
        card=_model_card(config, fitted, {**numbers, **length}, licence),
        reward_card=RewardCard(
            tokenizer_hash=tokenizer_hash(tokenizer),
            template_hash=template_hash(tokenizer),
            probes=[
                {"messages": list(messages), "score": score}
                for messages, score in zip(probe_messages(), probes, strict=True)
            ],
            score_mean=float(trained.mean()),
            score_std=float(trained.std()) if len(trained) > 1 else 1.0,
            accuracy={name: share for name, (share, _) in table.items()},
            accuracy_pairs={name: count for name, (_, count) in table.items()},
            length_correlation=length,
            counts={
                "train": len(data.train),
                "heldout": len(data.heldout),
                "quarantined": len(data.bad),
            },
            quarantined=dict(Counter(row.kind for row in data.bad)),
            notes=list(data.notes),
            data=data.files,
            heldout=config.heldout,
            system=config.system,
            template=str(tokenizer.chat_template or ""),
            exported=fitted.said,
            licence=licence,
            source_model=config.model,
        ),
        state=state,
    )


def _model_card(
    config: RewardConfig,
    fitted: Fitted,
    numbers: dict[str, float | int | str],
    licence: str | None,
) -> Card:
    """What the folder's README says."""
    return Card(
        title="Reward model",
        summary="A reward model trained with ppomax: one score, read at the answer's last "
        f"token. {fitted.said}",
        source_model=config.model,
        datasets=[source.path for source in config.data],
        numbers=numbers,
        **({"licence": licence} if licence else {}),
    )


def accuracy_table(pairs: list[Pair], scores: PairScores) -> dict[str, tuple[float, int]]:
    """Held-out accuracy and number of pairs: `all`, then `column: value`; a tie counts half."""
    right = ((scores[0] - scores[1]).sign() + 1) / 2
    table = {"all": (float(right.mean()), len(pairs))}
    for column in SUBSETS:
        values = [str(pair.row.meta.get(column, "")) for pair in pairs]
        for value in sorted(set(values) - {""}):
            inside = torch.tensor([found == value for found in values])
            table[f"{column}: {value}"] = (float(right[inside].mean()), int(inside.sum()))
    return table


def length_correlations(pairs: list[Pair], scores: PairScores) -> dict[str, float]:
    """Score against length: over all answers, and of differences within a pair.

    The second is the partial correlation once it is known which answer is preferred.
    """
    good = torch.tensor([float(pair.chosen.num_targets) for pair in pairs])
    bad = torch.tensor([float(pair.rejected.num_targets) for pair in pairs])
    found = {
        "correlation of score and length": _pearson(torch.cat(scores), torch.cat([good, bad])),
        "within a pair, given the preference": _pearson(scores[0] - scores[1], good - bad),
    }
    return {name: value for name, value in found.items() if value is not None}


def _pearson(a: Tensor, b: Tensor) -> float | None:
    if len(a) < 2 or float(a.std()) == 0 or float(b.std()) == 0:
        return None
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def _shown(share: float, count: int) -> str:
    """With the half-width of a normal 95% interval."""
    return f"{share:.3f} ± {1.96 * math.sqrt(share * (1 - share) / count):.3f} (n {count})"
