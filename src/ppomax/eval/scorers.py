"""Reward models and language models as judges of texts: one is loaded at a time, for all rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.errors import ConfigError, DataError
from ppomax.eval.best_of_n import Candidates
from ppomax.eval.statistics import Floats
from ppomax.models.ensembles import members, standards
from ppomax.models.export import REWARD_CARD_FILE, RewardCard, read_reward_card
from ppomax.models.heads import ScalarModel
from ppomax.models.language import LanguageModel
from ppomax.models.load import load_policy, load_reward_model, load_tokenizer
from ppomax.models.names import resolve
from ppomax.train.pairs import Pair, encode_pair
from ppomax.train.reading import Reading, load_reading
from ppomax.train.scoring import score_pairs, score_rows, summed_logprobs
from ppomax.train.settings import ComputeSettings
from ppomax.types import PreferenceRow


class JudgingSettings(ComputeSettings):
    """How reward models read and score."""

    max_length: int = Field(1024, ge=8)
    """Longest dialogue in tokens; older turns are dropped until one fits. Unless said, no more than
    the positions of the models."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A reward model to be judged: where it is, how it reads dialogues, what it says of itself."""

    name: str
    members: list[str]
    """Folders or ids whose mean standardized score is its score; one but for an ensemble."""
    reading: Reading
    card: RewardCard | None

    @property
    def pad(self) -> int:
        """The id that ends no text."""
        return int(self.reading.template.tokenizer.pad_token_id)


def load_judge(name: str, settings: ComputeSettings) -> Judge:
    """A reward model's reading and card; its weights are loaded when it scores.

    Raises:
        ModelError: no such model, or a damaged list of members.
        ConfigError: a model of another trainer without a chat template.
    """
    place = Path(resolve(name))
    found = members(str(place)) if place.is_dir() else [name]
    card = read_reward_card(place) if (place / REWARD_CARD_FILE).is_file() else None
    system, trust = card.system if card else None, settings.trust_remote_code
    reading = load_reading(name, system, "reward model", trust_remote_code=trust)
    return Judge(name, found, reading, card)


def within_positions(
    settings: JudgingSettings, judges: Sequence[Judge], *, given: bool
) -> JudgingSettings:
    """The settings with a `max_length` that every model has positions for.

    Args:
        given: `max_length` is the user's and not to be changed.

    Raises:
        ConfigError: it is, and a model has fewer positions.
    """
    for judge in judges:
        positions = judge.reading.positions
        if positions is None or positions >= settings.max_length:
            continue
        if given:
            raise ConfigError(
                f"setting max_length: {settings.max_length} is more than the {positions} positions "
                f"of {judge.name}"
            )
        settings = settings.model_copy(update={"max_length": positions})
    return settings


@dataclass(frozen=True, slots=True)
class JudgedPairs:
    """Scores of an evaluation's pairs; of an ensemble the members' standardized ones' mean."""

    chosen: Floats
    rejected: Floats
    extra: dict[str, Any]
    """`ensemble`: number of members and how far they disagree; nothing for one model."""


def judge_pairs(
    judge: Judge, pairs: list[Pair], settings: ComputeSettings, here: World
) -> JudgedPairs:
    """Scores of both answers of each pair."""
    found = []
    for member, (mean, std) in zip(judge.members, standards(judge.members), strict=True):
        model = load_scorer(member, settings, here)
        raw = torch.stack(score_pairs(model, pairs, judge.pad, settings, here)).double().numpy()
        found.append((raw - mean) / std)
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


def load_scorer(name: str, settings: ComputeSettings, here: World) -> ScalarModel:
    """A reward model ready to score.

    Raises:
        ModelError: it cannot be loaded, or is none.
    """
    model = load_reward_model(
        name,
        dtype=settings.compute_dtype,
        init_from_lm=False,
        trust_remote_code=settings.trust_remote_code,
    )
    return model.to(here.device)


def ensemble_scores(name: str, score: Callable[[str], Tensor]) -> list[float]:
    """Scores by a reward model; by an ensemble the mean of its members' standardized ones.

    Args:
        score: scores by one member, from its folder or id.
    """
    return mean_score(members(resolve(name)), score)


def mean_score(names: list[str], score: Callable[[str], Tensor]) -> list[float]:
    """The mean of standardized scores of an ensemble's members; the scores themselves of one."""
    shares = [
        (score(member).double() - mean) / std / len(names)
        for member, (mean, std) in zip(names, standards(names), strict=True)
    ]
    return [float(total) for total in sum(shares, torch.zeros_like(shares[0]))]


def encode_for_all(
    rows: list[PreferenceRow], judges: list[Judge], max_length: int
) -> list[list[Pair]]:
    """Of each row that fits every model, its pair in each model's ids."""
    found = []
    for row in rows:
        answers = (row.chosen, row.rejected)
        sides = [judge.reading.encode(row.prompt, answers, max_length) for judge in judges]
        kept = [Pair(row, *both) for both in sides if both is not None]
        if len(kept) == len(judges):
            found.append(kept)
    return found


class LogLikelihoods(NamedTuple):
    """Of both answers of every pair under a language model, and their tokens in its tokenizer."""

    chosen: Floats
    rejected: Floats
    chosen_tokens: Floats
    rejected_tokens: Floats


def log_likelihoods(
    name: str, rows: list[PreferenceRow], settings: JudgingSettings, here: World
) -> LogLikelihoods:
    """Log-prob of the preferred and of the other answer under a language model, end included.

    Older turns are dropped until a dialogue fits `max_length`, or twice that where its tokenizer
    needs more tokens than the reward models' for the last turn alone.

    Raises:
        DataError: a row fits neither, or not the model's positions.
        ModelError: it cannot be loaded as a language model.
    """
    trust = settings.trust_remote_code
    template = ChatTemplate(load_tokenizer(name, trust_remote_code=trust))
    lm = load_policy(name, dtype=settings.compute_dtype, trust_remote_code=trust)
    model = LanguageModel(lm).to(here.device)
    positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or 2**31
    limits = [min(length, positions) for length in (settings.max_length, 2 * settings.max_length)]
    pairs = []
    for row in rows:
        fitted = [pair for n in limits if (pair := encode_pair(row, template, n)) is not None]
        if not fitted:
            raise DataError(
                f"{name}: {row.where} does not fit {limits[-1]} tokens of its tokenizer (twice "
                f"max_length, or its positions); take another model"
            )
        pairs.append(fitted[0])
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    pad = int(template.tokenizer.pad_token_id)
    texts = [(side.ids, side.mask) for side in sides]
    found = summed_logprobs(model, texts, pad, settings, here).cpu().numpy()
    tokens = np.array([side.num_targets for side in sides], dtype=np.float64)
    return LogLikelihoods(*np.split(found, 2), *np.split(tokens, 2))


def score_candidates(
    judge: Judge, found: Candidates, settings: JudgingSettings, here: World
) -> Floats:
    """One score per reply, flat; nan where a reply does not fit."""
    ids = []
    for prompt, reply in zip(found.prompts, found.replies, strict=True):
        sides = judge.reading.encode(prompt, [reply], settings.max_length)
        ids.append(None if sides is None else sides[0].ids)
    fitting = [i for i, row in enumerate(ids) if row is not None]
    rows = [row for row in ids if row is not None]
    scores = np.full(len(ids), np.nan)

    def score(member: str) -> Tensor:
        return score_rows(
            load_scorer(member, settings, here), rows, judge.pad, settings, here
        ).cpu()

    scores[fitting] = mean_score(judge.members, score)
    return scores
