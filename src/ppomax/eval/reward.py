"""Judge reward models on held-out preferences: score all answers, then `preference` counts.

Several models are judged on the same pairs, those that fit all of them.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppomax.config import parse
from ppomax.data.formats import BadRow
from ppomax.data.sources import (
    SourceConfig,
    exchange_overlap,
    file_sha256,
    load_preferences,
    locate,
    overlap,
    split_by_prompt,
)
from ppomax.distributed import World, world
from ppomax.errors import ConfigError, DataError, PpomaxError
from ppomax.eval.best_of_n import best_of_n_curve, load_candidates
from ppomax.eval.preference import SUBSET_COLUMNS, compare, evaluate_pairs
from ppomax.eval.scorers import (
    Judge,
    JudgedPairs,
    JudgingSettings,
    LogLikelihoods,
    encode_for_all,
    judge_pairs,
    load_judge,
    log_likelihoods,
    score_candidates,
    within_positions,
)
from ppomax.train.pairs import Pair
from ppomax.types import PreferenceRow

BASE = "base"
"""As language model: the one the first reward model's card says it started from."""


def evaluate_reward(
    models: Sequence[str],
    files: list[str],
    *,
    dtype: str = "float32",
    max_length: int | None = None,
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
        max_length: longest dialogue in tokens; default 1024, or the models' positions if fewer.
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
        ConfigError: `heldout` is no share, or no pair has a column of `by`.
        DataError: no pair is held out, or none fits `max_length`.
        ModelError: a model cannot be loaded as a reward model.
    """
    given = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    given |= {} if max_length is None else {"max_length": max_length}
    settings = parse(JudgingSettings, given, "options")
    columns = tuple(dict.fromkeys((*SUBSET_COLUMNS, *by)))
    with world(device) as here:
        judges = [load_judge(name, settings) for name in models]
        golden = None if gold is None else load_judge(gold, settings)
        settings = within_positions(
            settings, [*judges, *([golden] if golden else [])], given=max_length is not None
        )
        rows, bad = _rows(files, heldout, limit, by)
        encoded = encode_for_all(rows, judges, settings.max_length)
        if not encoded:
            raise DataError(
                f"setting max_length: no pair of {', '.join(files)} fits {settings.max_length} "
                "tokens; raise it"
            )
        kept = [pairs[0].row for pairs in encoded]
        likelihoods = _likelihoods(language_model, judges[0], kept, settings, here)
        curves = _curves(judges, golden, candidates, kept, settings, here)
        judged = [
            judge_pairs(judge, [pairs[place] for pairs in encoded], settings, here)
            for place, judge in enumerate(judges)
        ]
    results = [
        _result(scores, [pairs[place] for pairs in encoded], likelihoods, columns)
        | {"model": judge.name, "warnings": _trained_on(judge, kept)}
        | curves.get(place, {})
        for place, (judge, scores) in enumerate(zip(judges, judged, strict=True))
    ]
    common = {
        "files": files,
        "quarantined": dict(Counter(row.kind for row in bad).most_common()),
        "max_length": settings.max_length,
        "over_long": len(rows) - len(kept),
        "language_model": likelihoods.model,
        "notes": [likelihoods.note] if likelihoods.note else [],
    }
    if len(results) == 1:
        return results[0] | common
    gaps = [scores.chosen - scores.rejected for scores in judged]
    meta, prompts = [row.meta for row in kept], [list(row.prompt) for row in kept]
    return {
        "kind": "comparison",
        "models": results,
        "comparisons": compare(list(models), gaps, meta, prompts, columns=columns),
        **common,
    }


def _rows(
    files: Sequence[str], heldout: float | None, limit: int | None, by: Sequence[str]
) -> tuple[list[PreferenceRow], list[BadRow]]:
    """The pairs asked for, and the rows of the files that are none."""
    if heldout is not None and not 0 < heldout < 1:
        raise ConfigError(f"option heldout: a share between 0 and 1 is wanted, found {heldout:g}")
    loaded = load_preferences([SourceConfig(path=path) for path in files], max_bad_rows=1.0)
    rows = loaded.rows if heldout is None else split_by_prompt(loaded.rows, heldout).heldout
    if heldout is not None and not rows:
        raise DataError(
            f"option heldout: none of {len(loaded.rows)} pairs is held out with the share "
            f"{heldout}; leave it out"
        )
    _check_columns(by, rows[:limit])
    return rows[:limit], loaded.bad


def _check_columns(by: Sequence[str], rows: Sequence[PreferenceRow]) -> None:
    for name in by:
        if all(row.meta.get(name) is None for row in rows):
            known = ", ".join(sorted({key for row in rows for key in row.meta})) or "none"
            raise ConfigError(f"option by: no pair has a column {name!r}; there are: {known}")


class Likelihoods(NamedTuple):
    """Log-probs of both answers of every pair under a language model, or why there are none."""

    sides: LogLikelihoods | None
    model: str | None = None
    note: str | None = None


def _result(
    scores: JudgedPairs, pairs: list[Pair], likelihoods: Likelihoods, columns: tuple[str, ...]
) -> dict[str, Any]:
    rows = [pair.row for pair in pairs]
    found = evaluate_pairs(
        scores.chosen,
        scores.rejected,
        [pair.chosen.num_targets for pair in pairs],
        [pair.rejected.num_targets for pair in pairs],
        meta=[row.meta for row in rows],
        ids=[row.id for row in rows],
        prompts=[list(row.prompt) for row in rows],
        chosen=[row.chosen for row in rows],
        rejected=[row.rejected for row in rows],
        likelihoods=likelihoods.sides and likelihoods.sides[:2],
        likelihood_tokens=likelihoods.sides and likelihoods.sides[2:],
        columns=columns,
    )
    return found | scores.extra


def _likelihoods(
    name: str | None,
    judge: Judge,
    rows: list[PreferenceRow],
    settings: JudgingSettings,
    here: World,
) -> Likelihoods:
    if name is None:
        return Likelihoods(None)
    asked = name != BASE
    if not asked:
        base = judge.card.source_model if judge.card else None
        if base is None:
            return Likelihoods(None, note="No likelihood baseline: the model names no base")
        name = base
    try:
        return Likelihoods(log_likelihoods(name, rows, settings, here), name)
    except PpomaxError as error:
        if asked:
            raise
        return Likelihoods(None, note=f"No likelihood baseline: {error}")


def _curves(
    judges: list[Judge],
    gold: Judge | None,
    files: Sequence[str],
    rows: list[PreferenceRow],
    settings: JudgingSettings,
    here: World,
) -> dict[int, dict[str, Any]]:
    """`best_of_n` of each model, by its place, where a gold scorer is given."""
    if gold is None:
        return {}
    found = load_candidates(files, rows)
    truth = score_candidates(gold, found, settings, here)
    return {
        place: {
            "best_of_n": {
                "judge": gold.name,
                **best_of_n_curve(found, score_candidates(judge, found, settings, here), truth),
            }
        }
        for place, judge in enumerate(judges)
    }


def _trained_on(judge: Judge, rows: list[PreferenceRow]) -> list[str]:
    """Pairs that the model's card shows to be training data, where its files are still there."""
    card = judge.card
    files = {
        path: digest
        for path, digest in (card.data if card else {}).items()
        if Path(locate(path)).is_file() and file_sha256(Path(locate(path))) == digest
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
