"""Judge reward models on held-out preferences: score all answers, then `preference` counts.

Several models are judged on the same pairs, those that fit all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppomax.config import parse
from ppomax.data.batching import collate, plan_micro_batches
from ppomax.data.sources import (
    SourceConfig,
    exchange_overlap,
    load_preferences,
    locate,
    overlap,
    split_by_prompt,
)
from ppomax.data.sources import file_sha256 as digest_of
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, sum_tensor, world
from ppomax.errors import DataError, PpomaxError
from ppomax.eval.best_of_n import Candidates, best_of_n_curve, load_candidates
from ppomax.eval.preference import SUBSET_COLUMNS, compare, evaluate_pairs
from ppomax.eval.statistics import Floats
from ppomax.models.export import REWARD_CARD_FILE, RewardCard, read_reward_card
from ppomax.models.folders import ensemble_members
from ppomax.models.language import LanguageModel
from ppomax.models.load import load_policy, load_reward_model, load_tokenizer, resolve
from ppomax.train.loop import autocast, rank_micro_batches
from ppomax.train.pairs import Pair, encode_pair
from ppomax.train.scoring import score_pairs, score_rows
from ppomax.train.settings import StageSettings
from ppomax.types import PreferenceRow

BASE = "base"
"""As language model: the one the first reward model's card says it started from."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A reward model to be judged: where it is, how it reads dialogues, what it says of itself."""

    name: str
    members: list[str]
    """Folders or ids whose mean score is its score; one but for an ensemble."""
    template: ChatTemplate
    card: RewardCard | None


def evaluate_reward(
    models: Sequence[str],
    files: list[str],
    *,
    dtype: str = "float32",
    max_length: int = 1024,
    limit: int | None = None,
    heldout: float | None = None,
    by: Sequence[str] = (),
    language_model: str | None = BASE,
    gold: str | None = None,
    candidates: Sequence[str] = (),
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Every number of `ppomax eval reward`, JSON-ready.

    Args:
        models: reward models; each reads a dialogue with its own tokenizer, template and system
            prompt.
        heldout: take only the pairs that training holds out with this share.
        by: columns to give numbers by, beside language, kind and source.
        language_model: whose likelihood of an answer is a baseline; `base`: what the first model
            started from, if that is still there; None: no such baseline.
        gold: another reward model, by which the replies that each model likes best are judged.
        candidates: files of several replies to each prompt for that; default the pairs' answers.

    Returns:
        `evaluate_pairs`' result for one model; for several a record of kind `comparison` with
        `models` (such results) and `comparisons`.

    Raises:
        DataError: no pair fits `max_length`.
        ModelError: a model cannot be loaded as a reward model.
    """
    settings = parse(
        StageSettings,
        {
            "model": models[0],
            "out": ".",
            "dtype": dtype,
            "max_length": max_length,
            "device": device,
            "trust_remote_code": trust_remote_code,
        },
        "options",
    )
    columns = tuple(dict.fromkeys((*SUBSET_COLUMNS, *by)))
    with world(device) as here:
        judges = [load_judge(name, settings) for name in models]
        loaded = load_preferences([SourceConfig(path=path) for path in files], max_bad_rows=1.0)
        rows = loaded.rows if heldout is None else split_by_prompt(loaded.rows, heldout).heldout
        rows = rows[:limit]
        encoded = _encode(rows, judges, max_length)
        if not encoded:
            raise DataError(
                f"setting max_length: no pair of {', '.join(files)} fits {max_length} tokens"
            )
        kept = [pairs[0].row for pairs in encoded]
        likelihoods, judge_name, note = _likelihoods(
            language_model, judges[0], kept, settings, here
        )
        curves = _curves(judges, gold, candidates, kept, settings, here)
        results: list[dict[str, Any]] = []
        for place, judge in enumerate(judges):
            pairs = [column[place] for column in encoded]
            scores = judge_pairs(judge, pairs, settings, here)
            result = evaluate_pairs(
                scores.chosen,
                scores.rejected,
                [pair.chosen.num_targets for pair in pairs],
                [pair.rejected.num_targets for pair in pairs],
                meta=[row.meta for row in kept],
                ids=[row.id for row in kept],
                prompts=[list(row.prompt) for row in kept],
                chosen=[row.chosen for row in kept],
                rejected=[row.rejected for row in kept],
                likelihoods=likelihoods,
                columns=columns,
            )
            results.append(result | scores.extra | {"model": judge.name} | curves.get(place, {}))
            results[-1] |= {"warnings": _trained_on(judge, kept)}
            results[-1]["gaps"] = scores.chosen - scores.rejected
    gaps = [result.pop("gaps") for result in results]
    common = {
        "files": files,
        "quarantined": len(loaded.bad),
        "over_long": len(rows) - len(kept),
        "language_model": judge_name,
        "notes": [note] if note else [],
    }
    if len(results) == 1:
        return results[0] | common
    metas, prompts = [row.meta for row in kept], [list(row.prompt) for row in kept]
    return {
        "kind": "comparison",
        "models": results,
        "comparisons": compare(
            [judge.name for judge in judges], gaps, metas, prompts, columns=columns
        ),
        **common,
    }


def load_judge(name: str, settings: StageSettings) -> Judge:
    """A reward model's template and card; its weights are loaded when it scores.

    Raises:
        ModelError: no such model, or a damaged list of members.
    """
    place = Path(resolve(name))
    members = [str(path) for path in ensemble_members(place)] if place.is_dir() else [name]
    card = read_reward_card(place) if (place / REWARD_CARD_FILE).is_file() else None
    tokenizer = load_tokenizer(name, trust_remote_code=settings.trust_remote_code)
    return Judge(name, members, ChatTemplate(tokenizer, card.system if card else None), card)


@dataclass(frozen=True, slots=True)
class JudgedPairs:
    """Scores of an evaluation's pairs; of an ensemble the members' mean."""

    chosen: Floats
    rejected: Floats
    extra: dict[str, Any]
    """`ensemble`: number of members and how far they disagree; nothing for one model."""


def judge_pairs(
    judge: Judge, pairs: list[Pair], settings: StageSettings, here: World
) -> JudgedPairs:
    """Scores of both answers of each pair."""
    pad = int(judge.template.tokenizer.pad_token_id)
    found = []
    for member in judge.members:
        model = _scorer(member, settings, here)
        found.append(torch.stack(score_pairs(model, pairs, pad, settings, here)).double().numpy())
    scores = np.stack(found)  # members, sides, pairs
    chosen, rejected = scores.mean(0)
    if len(found) == 1:
        return JudgedPairs(chosen, rejected, {})
    votes = (scores[:, 0] > scores[:, 1]).mean(0)
    extra = {
        "members": len(found),
        "score_std": float(scores.std(0, ddof=1).mean()),
        "pairs_in_dispute": float(((votes > 0) & (votes < 1)).mean()),
        "accuracies": (scores[:, 0] > scores[:, 1]).mean(1).tolist(),
    }
    return JudgedPairs(chosen, rejected, {"ensemble": extra})


def _scorer(name: str, settings: StageSettings, here: World) -> Any:  # noqa: ANN401 - ScalarModel
    model = load_reward_model(
        name,
        dtype=settings.compute_dtype,
        init_from_lm=False,
        trust_remote_code=settings.trust_remote_code,
    )
    return model.to(here.device)


def _encode(rows: list[PreferenceRow], judges: list[Judge], max_length: int) -> list[list[Pair]]:
    """Of each row that fits every model, its pair in each model's ids."""
    found = []
    for row in rows:
        pairs = [encode_pair(row, judge.template, max_length) for judge in judges]
        kept = [pair for pair in pairs if pair is not None]
        if len(kept) == len(judges):
            found.append(kept)
    return found


def _likelihoods(
    name: str | None,
    judge: Judge,
    rows: list[PreferenceRow],
    settings: StageSettings,
    here: World,
) -> tuple[tuple[Floats, Floats] | None, str | None, str | None]:
    """Log-probs of both answers, whose they are, and why there are none."""
    if name is None:
        return None, None, None
    asked = name != BASE
    if not asked:
        base = judge.card.source_model if judge.card else None
        if base is None:
            return None, None, "No likelihood baseline: the model names none that it started from"
        name = base
    try:
        return log_likelihoods(name, rows, settings, here), name, None
    except PpomaxError as error:
        if asked:
            raise
        return None, None, f"No likelihood baseline: {error}"


@torch.no_grad()
def log_likelihoods(
    name: str, rows: list[PreferenceRow], settings: StageSettings, here: World
) -> tuple[Floats, Floats]:
    """Log-prob of the preferred and of the other answer under a language model, end included.

    Raises:
        DataError: a row does not fit `max_length` in its tokens.
        ModelError: it cannot be loaded as a language model.
    """
    trust = settings.trust_remote_code
    template = ChatTemplate(load_tokenizer(name, trust_remote_code=trust))
    model = LanguageModel(load_policy(name, dtype=settings.compute_dtype, trust_remote_code=trust))
    model.to(here.device)
    pairs = [pair for (pair,) in _encode(rows, [Judge(name, [], template, None)], 2**31)]
    if max(max(len(p.chosen.ids), len(p.rejected.ids)) for p in pairs) > 2 * settings.max_length:
        raise DataError(f"{name}: its tokenizer makes the texts twice as long; take another")
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    pad = int(template.tokenizer.pad_token_id)
    sums = torch.zeros(len(sides), dtype=torch.float64, device=here.device)
    plan = plan_micro_batches([len(side.ids) for side in sides], settings.micro_tokens, here.size)
    for indices, weight in rank_micro_batches(plan, here):
        batch = collate([(sides[i].ids, sides[i].mask) for i in indices], pad, here.device)
        with autocast(here, settings.compute_dtype):
            logprobs = model(batch).logprobs.double()
        parts = logprobs.split([sides[i].num_targets for i in indices])
        if weight:
            sums[indices] = torch.stack([part.sum() for part in parts])
    found = sum_tensor(sums, here).cpu().numpy()
    return found[: len(pairs)], found[len(pairs) :]


def _curves(
    judges: list[Judge],
    gold: str | None,
    files: Sequence[str],
    rows: list[PreferenceRow],
    settings: StageSettings,
    here: World,
) -> dict[int, dict[str, Any]]:
    """`best_of_n` of each model, by its place, where a gold scorer is given."""
    if gold is None:
        return {}
    found = load_candidates(files, rows)
    truth = score_candidates(load_judge(gold, settings), found, settings, here)
    return {
        place: {
            "best_of_n": {
                "judge": gold,
                **best_of_n_curve(found, score_candidates(judge, found, settings, here), truth),
            }
        }
        for place, judge in enumerate(judges)
    }


def score_candidates(
    judge: Judge, found: Candidates, settings: StageSettings, here: World
) -> Floats:
    """One score per reply, flat; nan where a reply does not fit."""
    template, ids = judge.template, []
    for prompt, reply in zip(found.prompts, found.replies, strict=True):
        answer = template.answer(reply)
        fitted = template.fit(prompt, settings.max_length - len(answer))
        ids.append(None if fitted is None else fitted[1] + answer)
    fitting = [i for i, row in enumerate(ids) if row is not None]
    rows = [row for row in ids if row is not None]
    pad = int(template.tokenizer.pad_token_id)
    scores = np.full(len(ids), np.nan)
    members = [
        score_rows(_scorer(member, settings, here), rows, pad, settings, here).double().numpy()
        for member in judge.members
    ]
    scores[fitting] = np.mean(members, axis=0)
    return scores


def _trained_on(judge: Judge, rows: list[PreferenceRow]) -> list[str]:
    """Pairs that the model's card shows to be training data, where its files are still there."""
    card = judge.card
    files = {
        path: digest
        for path, digest in (card.data if card else {}).items()
        if Path(locate(path)).is_file() and digest_of(Path(locate(path))) == digest
    }
    if card is None or not files:
        return []
    loaded = load_preferences([SourceConfig(path=path) for path in files], max_bad_rows=1.0)
    train = split_by_prompt(loaded.rows, card.heldout or 0.0).train
    found = {"prompt": overlap(train, rows), "last exchange": exchange_overlap(train, rows)}
    return [
        f"{len(same)} of {len(rows)} pairs have a {what} that the model was trained on "
        f"({sum(one.how == 'exact' for one in same)} exactly), the first: {same[0].heldout} and "
        f"{same[0].train}"
        for what, same in found.items()
        if same
    ]
