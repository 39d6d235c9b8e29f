"""Columns of a row to dialogues and ranked answers: the layouts public data sets come in."""

import math
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from ppomax.data.turns import (
    Defect,
    assistant,
    is_hh,
    read_hh,
    read_messages,
    read_prompt,
    read_turns,
    text_of,
    user,
)
from ppomax.types import Message, Messages

Format = Literal[
    "pair",
    "hh",
    "ranked",
    "two-responses",
    "two-responses-safer",
    "alpaca-pair",
    "sharegpt-pair",
    "messages",
    "completion",
    "alpaca",
    "sharegpt",
    "turn-list",
    "turns",
    "prompt",
    "text",
]
"""What a row can be written in. `two-responses-safer` (PKU SafeRLHF by its safety label) is never
detected, only asked for."""

PREFERENCE: frozenset[Format] = frozenset(
    ["pair", "hh", "ranked", "two-responses", "two-responses-safer", "alpaca-pair", "sharegpt-pair"]
)
DIALOGUE: frozenset[Format] = frozenset(
    ["messages", "completion", "alpaca", "sharegpt", "turn-list", "turns"]
)
PROMPT: frozenset[Format] = frozenset(["prompt"])
TEXT: frozenset[Format] = frozenset(["text"])

Row = dict[str, Any]


class Ranked(NamedTuple):
    """Answers to one dialogue; a lower rank is a better answer."""

    prompt: Messages
    answers: list[str]
    ranks: list[float]


_BY_COLUMNS: tuple[tuple[set[str], Format], ...] = (
    ({"chosen", "rejected", "others"}, "ranked"),
    ({"chosen", "rejected", "conversations"}, "sharegpt-pair"),
    ({"chosen", "rejected", "instruction"}, "alpaca-pair"),
    ({"chosen", "rejected"}, "pair"),
    ({"responses", "ranks"}, "ranked"),
    ({"responses", "scores"}, "ranked"),
    ({"response_0", "response_1"}, "two-responses"),
    ({"messages"}, "messages"),
    ({"conversations"}, "sharegpt"),
    ({"instruction"}, "alpaca"),
    ({"prompt", "completion"}, "completion"),
    ({"prompt", "response"}, "completion"),
    ({"turns"}, "turns"),
    ({"prompt"}, "prompt"),
    ({"text"}, "text"),
)
"""The first whose columns a row has is its layout."""

_PARTNERS = {
    "chosen": "rejected",
    "rejected": "chosen",
    "response_0": "response_1",
    "response_1": "response_0",
    "responses": "ranks (or scores)",
    "completion": "prompt",
    "output": "instruction",
}
_COMPLEMENT = {"a preference": "chosen and rejected", "an SFT": "completion"}


def detect_format(raw: object) -> Format | None:
    """The layout a row is written in, from its columns; None if it is none of ours."""
    if isinstance(raw, list):
        return "turn-list" if raw and isinstance(raw[0], str) else "messages"
    if isinstance(raw, str):
        return "text"
    if not isinstance(raw, dict):
        return None
    keys = {key for key, value in raw.items() if value is not None}
    found = next((layout for wanted, layout in _BY_COLUMNS if keys >= wanted), None)
    if found == "pair" and isinstance(raw["chosen"], str) and is_hh(raw["chosen"]):
        return "hh"
    return found


def unknown(raw: object, found: Format | None, wanted: str) -> Defect:
    """Why a row that is no `wanted` row is none, naming the column it lacks if there is one."""
    if isinstance(raw, dict):
        for have, lack in _PARTNERS.items() if found not in PREFERENCE else ():
            if raw.get(have) is not None and raw.get(lack) is None:
                return Defect("missing-field", f"has {have} but no {lack}")
        if found == "prompt" and wanted in _COMPLEMENT:
            return Defect("missing-field", f"has prompt but no {_COMPLEMENT[wanted]}")
    if found is not None:
        return Defect("unknown-format", f"is a row of the form {found}, which is not {wanted} row")
    seen = _shown(raw) if isinstance(raw, dict) else f"{raw!r:.80}"
    return Defect("unknown-format", f"no known form of {wanted} row; found {seen}")


def need(row: Row, column: str) -> Any:  # noqa: ANN401 - any JSON value
    """The value of a column, which must be there."""
    if column not in row:
        raise Defect("missing-field", f"no {column}; found {_shown(row)}")
    return row[column]


def _shown(row: Row) -> str:
    """The names of a row's first columns, on one line."""
    return ", ".join(" ".join(column.split())[:40] for column in sorted(row)[:8]) or "no columns"


def read_dialogue(raw: object, row: Row, layout: Format) -> Messages:
    """The whole dialogue of a row, answer included; of a preference row the best answer.

    Args:
        raw: the row as it was read, which may be a bare list.
        row: its columns, empty for a bare list.
        layout: any but `prompt` and `text`.
    """
    match layout:
        case "turn-list":
            messages = read_turns(raw, "row")
        case "messages":
            messages = read_messages(need(row, "messages") if row else raw, "messages")
        case "sharegpt":
            messages = read_messages(need(row, "conversations"), "conversations")
        case "turns":
            messages = read_turns(need(row, "turns"), "turns")
        case "completion":
            column = "completion" if "completion" in row else "response"
            question = read_prompt(need(row, "prompt"), "prompt")
            messages = question + _answer(need(row, column), column)
        case "alpaca":
            return read_alpaca(row) + _answer(need(row, "output"), "output")
        case _:
            prompt, answers, ranks = read_ranked(row, layout)
            return (*prompt, assistant(answers[ranks.index(min(ranks))]))
    return with_system(row, messages)


def read_question(row: Row) -> Messages:
    """The dialogue in the column `prompt`."""
    return with_system(row, read_prompt(need(row, "prompt"), "prompt"))


def read_alpaca(row: Row) -> Messages:
    """What an Alpaca row asks: `instruction` and `input` behind `system` and `history`."""
    history: list[Message] = []
    for index, exchange in enumerate(_list(row.get("history", []), "history")):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise Defect("wrong-type", f"history[{index}] is not a pair of question and answer")
        history += read_turns(exchange, f"history[{index}]")
    parts = [
        text_of(need(row, "instruction"), "instruction"),
        text_of(row.get("input", ""), "input"),
    ]
    question = user("\n".join(part for part in parts if part.strip()))
    return with_system(row, (*history, question))


def with_system(row: Row, messages: Messages) -> Messages:
    """The dialogue with the text of the column `system` before it, if there is one."""
    system = text_of(row.get("system", ""), "system")
    if not system.strip():
        return messages
    return ({"role": "system", "content": system}, *messages)


def read_ranked(row: Row, layout: Format) -> Ranked:
    """The answers of a preference row in one form, whatever its layout."""
    match layout:
        case "ranked":
            ranked = _ranked(row)
        case "two-responses" | "two-responses-safer":
            ranked = _two_responses(row, "safer" if layout.endswith("safer") else "better")
        case "alpaca-pair":
            ranked = Ranked(read_alpaca(row), _two_answers(row), [0, 1])
        case "sharegpt-pair":
            prompt = with_system(row, read_messages(need(row, "conversations"), "conversations"))
            ranked = Ranked(prompt, _two_answers(row), [0, 1])
        case _:
            ranked = _pair(row)
    if not ranked.answers:
        raise Defect("empty-answer", "there are no answers")
    return ranked


def _answer(value: object, name: str) -> Messages:
    """One answer as it is written: a string, or a list of messages."""
    return (assistant(value),) if isinstance(value, str) else read_messages(value, name)


def _two_answers(row: Row) -> list[str]:
    answers = []
    for name in ("chosen", "rejected"):
        messages = _answer(need(row, name), name)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise Defect("last-turn", f"{name} is not one answer of the assistant's")
        answers.append(messages[0]["content"])
    return answers


def _two_responses(row: Row, label: str) -> Ranked:
    best = need(row, f"{label}_response_id")
    if isinstance(best, bool) or best not in (0, 1):
        raise Defect("wrong-type", f"{label}_response_id is {best!r}, wanted 0 or 1")
    answers = [text_of(need(row, name), name) for name in ("response_0", "response_1")]
    return Ranked(read_question(row), answers, [float(best != 0), float(best != 1)])


def _ranked(row: Row) -> Ranked:
    if "others" in row:
        others = _list(row["others"], "others")
        prompt, best, _ = _pair(row)
        answers = best + [text_of(item, f"others[{i}]") for i, item in enumerate(others)]
        return Ranked(prompt, answers, [float(rank) for rank in range(len(answers))])
    responses = _list(need(row, "responses"), "responses")
    answers = [text_of(item, f"responses[{i}]") for i, item in enumerate(responses)]
    column, sign = ("ranks", 1) if "ranks" in row else ("scores", -1)
    ranks = [sign * number(item, column) for item in _list(need(row, column), column)]
    if len(ranks) != len(answers):
        raise Defect("wrong-type", f"{len(answers)} responses but {len(ranks)} {column}")
    return Ranked(read_question(row), answers, ranks)


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Defect("wrong-type", f"{name} is {type(value).__name__}, wanted a list")
    return value


def number(value: object, name: str) -> float:
    """The value itself, which must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Defect("wrong-type", f"{name} holds {str(value)[:40]!r}, wanted a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise Defect("wrong-type", f"{name} holds {str(value)[:40]}, wanted a finite number")
    return result


def _pair(row: Row) -> Ranked:
    """`{prompt?, chosen, rejected}`: answers, or dialogues that share all but the last turn.

    The prompt of plain answers may also be called `question` or `query`.
    """
    chosen, rejected = need(row, "chosen"), need(row, "rejected")
    before = read_prompt(row["prompt"], "prompt") if "prompt" in row else ()
    if (
        isinstance(chosen, str)
        and isinstance(rejected, str)
        and not (is_hh(chosen) or is_hh(rejected))
    ):
        if "prompt" not in row:
            asked = next((name for name in ("question", "query") if name in row), None)
            if asked is None:
                return _shared_text(row, chosen, rejected)
            question = read_prompt(row[asked], asked)
            return Ranked(with_system(row, question), [chosen, rejected], [0, 1])
        if isinstance(row["prompt"], str) and is_hh(row["prompt"]):
            chosen, rejected = chosen.strip(), rejected.strip()
        return Ranked(with_system(row, before), [chosen, rejected], [0, 1])
    left, right = _whole(chosen, "chosen", before), _whole(rejected, "rejected", before)
    prompt = left[:-1]
    if prompt != right[:-1]:
        same = sum(
            1 for _ in takewhile(lambda two: two[0] == two[1], zip(left, right, strict=False))
        )
        raise Defect(
            "prompt-mismatch",
            f"the dialogues part at turn {same + 1}, before the answer "
            f"(chosen has {len(left)} turns, rejected {len(right)})",
        )
    if before and not _holds(prompt, before):
        raise Defect("prompt-mismatch", "prompt is not what stands before the answers")
    return Ranked(with_system(row, prompt), [left[-1]["content"], right[-1]["content"]], [0, 1])


def _whole(value: object, name: str, before: Messages) -> Messages:
    """A dialogue that ends with an answer; one that begins with an answer continues the prompt."""
    if isinstance(value, str):
        messages = read_hh(value) if is_hh(value) else (assistant(value),)
    else:
        messages = read_messages(value, name)
    if not messages:
        raise Defect("empty-answer", f"{name} has no turns")
    if messages[-1]["role"] != "assistant":
        raise Defect("last-turn", f"{name} ends with the {messages[-1]['role']}'s turn")
    return before + messages if messages[0]["role"] == "assistant" else messages


def _holds(prompt: Messages, before: Messages) -> bool:
    """Whether the prompt column says the same: all turns, or one user turn (UltraFeedback)."""

    def bare(messages: Messages) -> list[tuple[str, str]]:
        return [(m["role"], m["content"].strip()) for m in messages if m["role"] != "system"]

    return bare(prompt) == bare(before) or (len(before) == 1 and bare(before)[0] in bare(prompt))


def _shared_text(row: Row, chosen: str, rejected: str) -> Ranked:
    """The implicit prompt of two plain strings: how both begin, up to a word's edge."""
    end = sum(
        1 for _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))
    )

    def inside_word(at: int) -> bool:
        return any(
            text[max(at - 1, 0) : at + 1].isascii()
            and text[at - 1 : at + 1].isalnum()
            and len(text) > at
            for text in (chosen, rejected)
        )

    while end and inside_word(end):
        end -= 1
    while end and chosen[end - 1] == " ":
        end -= 1
    if not chosen[:end].strip():
        raise Defect("empty-prompt", "no prompt, and chosen and rejected do not begin alike")
    prompt = with_system(row, (user(chosen[:end]),))
    return Ranked(prompt, [chosen[end:], rejected[end:]], [0, 1])
