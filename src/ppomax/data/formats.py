"""One raw row to records, or to the reason why it cannot be used. Pure functions of the row."""

import hashlib
import json
import math
from collections.abc import Callable
from itertools import combinations
from typing import Any, TypeVar

from ppomax.data.layouts import (
    DIALOGUE,
    PREFERENCE,
    PROMPT,
    TEXT,
    Format,
    Row,
    detect_format,
    need,
    number,
    read_alpaca,
    read_dialogue,
    read_question,
    read_ranked,
    unknown,
)
from ppomax.data.raw import BadRow, count_kinds, iter_raw, place
from ppomax.data.turns import Defect, check_turns, text_of
from ppomax.types import PreferenceRow, PromptRow, SFTRow, TextRow

__all__ = [
    "BadRow",
    "Format",
    "count_kinds",
    "detect_format",
    "iter_raw",
    "parse_preference",
    "parse_prompt",
    "parse_sft",
    "parse_text",
    "place",
]

MAX_ANSWERS = 100
"""A ranked list makes a pair of every two answers; longer lists are refused."""

# fmt: off
_CONTENT = frozenset((
    "id", "strength", "margin", "system", "history", "prompt", "messages",
    "conversations", "turns", "instruction", "input", "output", "completion", "response",
    "text", "chosen", "rejected", "others", "responses", "ranks", "scores", "response_0",
    "response_1", "better_response_id",
))
# fmt: on
"""Columns with a meaning of their own; every other scalar goes into `meta`."""

T = TypeVar("T")


def parse_preference(
    raw: object, where: str, layout: Format | None = None
) -> list[PreferenceRow] | BadRow:
    """A preference row as pairs: one, or all pairs of a ranked list, whose weights sum to 1.

    Equal ranks and equal answers make no pair. `ranks` count down from the best, `scores` count
    up to it; the optional column `strength` (or `margin`) goes to every pair of the row.
    """
    return _guarded(lambda: _preferences(raw, where, layout), raw, where)


def parse_sft(raw: object, where: str, layout: Format | None = None) -> list[SFTRow] | BadRow:
    """A dialogue that ends with the assistant's answer; of a preference row, the best answer."""

    def read() -> list[SFTRow]:
        found, row = _columns(raw, layout, PREFERENCE | DIALOGUE, "an SFT")
        messages = read_dialogue(raw, row, found)
        check_turns(messages, last="assistant")
        return [SFTRow(_id(raw), messages, _meta(row), where)]

    return _guarded(read, raw, where)


def parse_prompt(raw: object, where: str, layout: Format | None = None) -> list[PromptRow] | BadRow:
    """A dialogue that waits for the assistant; of a finished one, what stands before its end."""

    def read() -> list[PromptRow]:
        found, row = _columns(raw, layout, PREFERENCE | DIALOGUE | PROMPT, "a prompt")
        if found == "prompt":
            messages = read_question(row)
        elif found == "alpaca":
            messages = read_alpaca(row)
        else:
            messages = read_dialogue(raw, row, found)
            if messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
        check_turns(messages, last="user")
        return [PromptRow(_id(raw), messages, _meta(row), where)]

    return _guarded(read, raw, where)


def parse_text(raw: object, where: str, layout: Format | None = None) -> list[TextRow] | BadRow:
    """Plain text: a `{text}` row, or a piece of a `.txt` file."""

    def read() -> list[TextRow]:
        _, row = _columns(raw, layout, TEXT, "a text")
        text = raw if isinstance(raw, str) else text_of(need(row, "text"), "text")
        if not text.strip():
            raise Defect("empty-text", "the text is empty")
        return [TextRow(_id(raw), text, where)]

    return _guarded(read, raw, where)


def _preferences(raw: object, where: str, layout: Format | None) -> list[PreferenceRow]:
    found, row = _columns(raw, layout, PREFERENCE, "a preference")
    prompt, answers, ranks = read_ranked(row, found)
    if len(answers) > MAX_ANSWERS:
        raise Defect("wrong-type", f"{len(answers)} answers, at most {MAX_ANSWERS} are taken")
    for index, answer in enumerate(answers):
        if not answer.strip():
            raise Defect("empty-answer", f"{_name(index, answers)} is empty")
    ordered = [
        (i, j) if ranks[i] < ranks[j] else (j, i)
        for i, j in combinations(range(len(answers)), 2)
        if ranks[i] != ranks[j]
    ]
    if not ordered:
        raise Defect("no-order", "no answer is better than another")
    pairs = [(i, j) for i, j in ordered if answers[i].strip() != answers[j].strip()]
    if not pairs:
        raise Defect("identical-pair", "the answers are equal")
    check_turns(prompt, last="user")
    name, meta, strength = _id(raw), _meta(row), _strength(row)
    return [
        PreferenceRow(
            id=name if len(pairs) == 1 else f"{name}#{i}-{j}",
            prompt=prompt,
            chosen=answers[i],
            rejected=answers[j],
            weight=1 / len(pairs),
            strength=strength,
            meta=meta,
            where=where,
        )
        for i, j in pairs
    ]


def _name(index: int, answers: list[str]) -> str:
    return ("chosen", "rejected")[index] if len(answers) == 2 else f"answer {index + 1}"


def _strength(row: Row) -> float | None:
    column = "strength" if "strength" in row else "margin"
    if column not in row:
        return None
    strength = number(row[column], column)
    if strength < 0:
        raise Defect("wrong-type", f"{column} is {strength:g}, wanted a number of 0 or more")
    return strength


def _guarded(read: Callable[[], T], raw: object, where: str) -> T | BadRow:
    try:
        _canonical(raw).encode("utf-8")
        return read()
    except Defect as defect:
        return BadRow(where, defect.kind, defect.reason)
    except UnicodeEncodeError:
        return BadRow(where, "not-utf8", "a string holds half a character (a lone surrogate)")
    except RecursionError:
        return BadRow(where, "wrong-type", "the row is nested too deep")


def _columns(
    raw: object, layout: Format | None, known: frozenset[Format], wanted: str
) -> tuple[Format, Row]:
    """The row's layout, and its columns that hold something (none of a bare list or string)."""
    row = raw if isinstance(raw, dict) else {}
    found = layout or detect_format(raw)
    if found is None or found not in known:
        raise unknown(raw, found, wanted)
    return found, {column: value for column, value in row.items() if value is not None}


def _canonical(raw: object) -> str:
    return json.dumps(raw, ensure_ascii=False, sort_keys=True, default=str)


def _id(raw: object) -> str:
    given = raw.get("id") if isinstance(raw, dict) else None
    if isinstance(given, str | int) and not isinstance(given, bool) and str(given):
        return str(given)
    return hashlib.sha256(_canonical(raw).encode()).hexdigest()[:16]


def _meta(row: Row) -> dict[str, Any]:
    return {
        column: value
        for column, value in row.items()
        if column not in _CONTENT
        and isinstance(value, str | int | float)
        and not (isinstance(value, float) and not math.isfinite(value))
    }
