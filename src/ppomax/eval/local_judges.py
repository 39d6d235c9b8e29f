"""Judges that run here: a reward model, a language model, a Python function."""

import asyncio
import importlib
import inspect
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ppomax.data.batching import derived_seed
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, world
from ppomax.errors import ConfigError, ModelError
from ppomax.eval.answers import Answer
from ppomax.eval.asking import Ask
from ppomax.eval.outcomes import Judged, Side, question_of
from ppomax.eval.pairs import Pair
from ppomax.eval.scorers import ensemble_scores, load_scorer
from ppomax.models.export import REWARD_CARD_FILE, read_reward_card
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.models.names import resolve
from ppomax.rollout import EngineSettings, SamplingParams, build_engine
from ppomax.train.reading import load_reading
from ppomax.train.rewards import load_callable
from ppomax.train.scoring import score_rows
from ppomax.train.settings import ComputeSettings

Keep = Callable[[Ask, Answer], None]
CHUNK = 16
"""Answers of a local judge written side by side, and kept together."""


def by_reward_model(pairs: Sequence[Pair], model: str) -> list[Judged]:
    """The reply with the higher score wins; the score is read at the reply's end.

    A reward model reads a dialogue in its own template and tokens, whole: replies are texts here.

    Raises:
        ModelError: no reward model, or a dialogue longer than its positions.
    """
    texts = [(pair, side) for pair in pairs for side in (pair.a.response, pair.b.response)]
    scores = ensemble_scores(model, partial(_member_scores, texts))
    rows = []
    for place, pair in enumerate(pairs):
        a, b = scores[2 * place], scores[2 * place + 1]
        # Equal replies may differ in the last bits of their scores.
        side: Side = (
            "tie" if pair.a.response == pair.b.response or a == b else "a" if a > b else "b"
        )
        rows.append(Judged(pair, question_of(pair.kind), side, side, ordered=False))
    return rows


def _member_scores(texts: Sequence[tuple[Pair, str]], name: str) -> Tensor:
    """Of dialogues in one reward model's own ids; by this rank alone, while the others wait."""
    card = Path(resolve(name)) / REWARD_CARD_FILE
    system = read_reward_card(card.parent).system if card.is_file() else None
    reading = load_reading(name, system, f"judge reward:{name}")
    ids = [reading.ids(pair.messages, text) for pair, text in texts]
    settings = ComputeSettings()
    with world() as here:
        alone = World(0, 1, here.device)
        model = load_scorer(name, settings, alone)
        longest = max(map(len, ids), default=0)
        if reading.positions is not None and longest > reading.positions:
            raise ModelError(
                f"judge reward:{name}: a dialogue has {longest} tokens, the model "
                f"{reading.positions} positions; leave its prompt out, or name another judge"
            )
        pad = int(reading.template.tokenizer.pad_token_id)
        scores = score_rows(model, ids, pad, settings, alone)
    if not torch.isfinite(scores).all():
        raise ModelError(f"judge reward:{name}: a score is not finite; name another judge")
    return scores


def ask_local(
    asks: Sequence[Ask], name: str, max_tokens: int, temperature: float, keep: Keep
) -> None:
    """Put the questions to a language model here.

    A question that leaves no room for an answer gets an empty one, which counts as unparsed.
    """
    template = ChatTemplate(load_tokenizer(name))
    prompts = [template.prompt([{"role": "user", "content": ask.text}]) for ask in asks]
    with world() as here:
        lm = load_policy(name)
        limit = int(getattr(lm.config, "max_position_embeddings", 1 << 30))
        engine = build_engine(EngineSettings(slots=CHUNK), lm, template, here, torch.float32)
        params = SamplingParams(temperature=temperature, max_new_tokens=max_tokens)
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) < limit]
        for i in sorted(set(range(len(asks))) - set(fits)):
            keep(asks[i], Answer("", len(prompts[i]), 0))
        for start in range(0, len(fits), CHUNK):
            part = fits[start : start + CHUNK]
            seeds = [derived_seed("judge", asks[i].key) for i in part]
            rollout = engine.generate([prompts[i] for i in part], params, seeds)
            for i, reply in zip(part, rollout.responses, strict=True):
                keep(asks[i], Answer(template.decode(reply), len(prompts[i]), len(reply)))


def ask_callable(asks: Sequence[Ask], name: str, keep: Keep) -> None:
    """Put the questions to `function(messages, first, second, *, question, lang)`.

    It returns 1, 2 or "tie", or is awaited for that; anything else counts as unparsed.

    Raises:
        ConfigError: it cannot be imported, or raises.
    """
    function = load_callable(name, "judge")
    with asyncio.Runner() as runner:  # one loop, which a function's client may be bound to
        for ask in asks:
            messages = [dict(turn) for turn in ask.pair.messages]
            try:
                found = function(
                    messages, ask.first, ask.second, question=ask.question, lang=ask.language
                )
                if inspect.isawaitable(found):
                    found = runner.run(_awaited(found))
            except Exception as error:  # noqa: BLE001 - whatever a user's function raises
                raise ConfigError(
                    f"judge callable:{name}: {type(error).__name__} on prompt "
                    f"{ask.pair.prompt_id}: {error}"
                ) from None
            known = found if isinstance(found, str | int) and not isinstance(found, bool) else ""
            keep(ask, Answer(f"{ask.mark}: {known}"))


async def _awaited(found: Awaitable[object]) -> object:
    return await found


def source_of(name: str) -> str:
    """The text of a judge function's module, so that another version is asked anew."""
    module = name.partition(":")[0]
    try:
        return inspect.getsource(importlib.import_module(module))
    except (ImportError, OSError, TypeError):
        return ""


def fingerprint(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of a model folder's files; empty for a hub id."""
    folder = Path(resolve(model))
    if not folder.is_dir():
        return []
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
