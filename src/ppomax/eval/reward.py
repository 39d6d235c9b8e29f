"""Judge a reward model on held-out preferences: score both answers, then `preference` counts."""

from typing import Any

import torch

from ppomax.config import parse
from ppomax.data.sources import SourceConfig, load_preferences, split_by_prompt
from ppomax.data.template import ChatTemplate
from ppomax.distributed import world
from ppomax.errors import DataError
from ppomax.eval.preference import evaluate_pairs
from ppomax.models.load import load_reward_model, load_tokenizer
from ppomax.train.reward import RewardConfig, encode_pair, score_pairs


def evaluate_reward(
    model: str,
    files: list[str],
    *,
    dtype: str = "float32",
    max_length: int = 1024,
    limit: int | None = None,
    heldout: float | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Every number of `ppomax eval reward`, JSON-ready.

    Args:
        heldout: take only the pairs that training holds out with this share.

    Raises:
        DataError: no pair fits `max_length`.
        ModelError: the model cannot be loaded as a reward model.
    """
    sources = [SourceConfig(path=path) for path in files]
    settings = parse(
        RewardConfig,
        {
            "model": model,
            "out": ".",
            "data": [{"path": path} for path in files],
            "dtype": dtype,
            "max_length": max_length,
            "device": device,
        },
        "options",
    )
    with world(device) as here:
        template = ChatTemplate(load_tokenizer(model, trust_remote_code=trust_remote_code))
        loaded = load_preferences(sources, max_bad_rows=1.0)
        rows = loaded.rows if heldout is None else split_by_prompt(loaded.rows, heldout).heldout
        encoded = [encode_pair(row, template, max_length) for row in rows[:limit]]
        pairs = [pair for pair in encoded if pair is not None]
        if not pairs:
            raise DataError(
                f"setting max_length: no pair of {', '.join(files)} fits {max_length} tokens"
            )
        scorer = load_reward_model(
            model,
            dtype=torch.float32 if dtype == "float32" else torch.bfloat16,
            init_from_lm=False,
            trust_remote_code=trust_remote_code,
        ).to(here.device)
        pad = int(template.tokenizer.pad_token_id)
        chosen, rejected = score_pairs(scorer, pairs, pad, settings, here)
        rows = [pair.row for pair in pairs]
        result = evaluate_pairs(
            chosen.tolist(),
            rejected.tolist(),
            [pair.chosen.num_targets for pair in pairs],
            [pair.rejected.num_targets for pair in pairs],
            meta=[row.meta for row in rows],
            ids=[row.id for row in rows],
            prompts=[list(row.prompt) for row in rows],
            chosen=[row.chosen for row in rows],
            rejected=[row.rejected for row in rows],
        )
    return result | {
        "model": model,
        "files": files,
        "quarantined": len(loaded.bad),
        "over_long": len(encoded) - len(pairs),
    }
