"""The two files that judging shares with people: pairs to compare, and the verdicts on them.

Both are JSONL. A pair is two replies to one prompt, `a` and `b`; a verdict is one person's or one
judge's answer to one question about one pair. Verdict files only grow: of several lines on the
same pair, question and annotator the last counts, so that a vote is undone by another one.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from ppomax.errors import DataError
from ppomax.types import Message, Messages

Question = Literal["helpful", "harmless"]
Choice = Literal["a", "b", "tie", "skip"]
QUESTIONS: tuple[Question, ...] = ("helpful", "harmless")
CHOICES: tuple[Choice, ...] = ("a", "b", "tie", "skip")
SWAPPED: dict[Choice, Choice] = {"a": "b", "b": "a", "tie": "tie", "skip": "skip"}
"""A choice as it reads when the two replies change places."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One side of a pair."""

    name: str
    """The model that wrote it; never shown to whoever judges."""
    response: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt."""

    pair: str
    """`pair_hash` of what follows."""
    prompt_id: str
    messages: Messages
    """The dialogue so far; the last message is the user's."""
    kind: str
    """`helpful`, `harmful`, ... as the prompt file says; empty where it does not."""
    lang: str
    a: Reply
    b: Reply


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer to one question about one pair."""

    pair: str
    prompt_id: str
    a: str
    """Name of the model behind side `a`."""
    b: str
    annotator: str
    question: Question
    verdict: Choice
    """Which side is better. `skip`: no answer, counted as none; it takes an earlier vote back."""
    time: str
    """When, ISO 8601 with the zone."""
    seconds: float
    """How long the pair was looked at."""
    note: str | None = None


def pair_hash(prompt_id: str, messages: Sequence[Message], a: str, b: str) -> str:
    """Name of the pair of replies `a` and `b` to a prompt: equal for equal content, in this order.

    The models' names are no part of it: the same replies under other names are the same pair.
    """
    return _sha256([prompt_id, _reply_hash(messages, a), _reply_hash(messages, b)])[:32]


def make_pair(
    prompt_id: str, messages: Messages, a: Reply, b: Reply, *, kind: str = "", lang: str = ""
) -> Pair:
    """A pair with its hash."""
    name = pair_hash(prompt_id, messages, a.response, b.response)
    return Pair(name, prompt_id, messages, kind, lang, a, b)


def swapped_hash(pair: Pair) -> str:
    """Name of the same two replies in the other order."""
    return pair_hash(pair.prompt_id, pair.messages, pair.b.response, pair.a.response)


def write_pairs(path: Path, pairs: Iterable[Pair]) -> int:
    """Write a pair file; returns how many.

    Raises:
        DataError: the file cannot be written.
    """
    rows = [asdict(pair) for pair in pairs]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    return len(rows)


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file, in order.

    Raises:
        DataError: unreadable, no pair, a line that is no pair, or a pair twice.
    """
    pairs: dict[str, Pair] = {}
    for where, row in _rows(path, torn_end=False):
        pair = _pair(row, where)
        if pair.pair in pairs:
            raise DataError(f"{where}: pair {pair.pair} stands twice")
        pairs[pair.pair] = pair
    if not pairs:
        raise DataError(f"{path}: no pairs; `ppomax eval policy ... --judge human` writes them")
    return list(pairs.values())


def append_verdict(path: Path, verdict: Verdict) -> None:
    """Add one verdict; it is on the disk (fsync) when this returns.

    A line that a crash cut short is closed first, so that it harms no other.
    """
    row = {key: value for key, value in asdict(verdict).items() if value is not None}
    append_line(path, json.dumps(row, ensure_ascii=False))


def append_line(path: Path, line: str, *, sync: bool = True) -> None:
    """Add a line to a file that only grows; with `sync` it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            file.write(b"\n" if torn else b"")
        file.write(line.encode(errors="backslashreplace") + b"\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())
    if fresh and sync:
        _sync(path.parent)


def sync(path: Path) -> None:
    """Force a file and its name in its folder to the disk, if it is there."""
    if path.exists():
        _sync(path)
        _sync(path.parent)


def _sync(path: Path) -> None:
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts of a file in the order written, replaced ones left out, skips kept.

    A line `{pair, annotator, undo: true, time}` takes back what the annotator said of the pair.

    A last line cut short is left out: its vote was never confirmed.

    Raises:
        DataError: unreadable, or a line that is no verdict.
    """
    last: dict[tuple[str, str, str], Verdict] = {}
    for where, row in _rows(path, torn_end=True):
        if row.get("undo") is True:
            undone = (_text(row, "pair", where), _text(row, "annotator", where))
            last = {key: vote for key, vote in last.items() if (key[0], key[2]) != undone}
            continue
        verdict = _verdict(row, where)
        key = (verdict.pair, verdict.question, verdict.annotator)
        last.pop(key, None)  # the later one stands where it was given
        last[key] = verdict
    return list(last.values())


def verdicts_for(pair: Pair, by_pair: dict[str, list[Verdict]]) -> list[Verdict]:
    """Verdicts on a pair, those given on the swapped pair turned round; skips left out."""
    straight = by_pair.get(pair.pair, [])
    other = swapped_hash(pair)
    turned = [] if other == pair.pair else by_pair.get(other, [])
    found = straight + [
        replace(v, pair=pair.pair, a=v.b, b=v.a, verdict=SWAPPED[v.verdict]) for v in turned
    ]
    return [verdict for verdict in found if verdict.verdict != "skip"]


def _rows(path: Path, *, torn_end: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place and object; blank lines and (with `torn_end`) cut ones are passed over."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            if torn_end:  # a crash cuts a line short anywhere a later writer went on
                continue
            raise DataError(f"{where}: not JSON") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON object is wanted, found {type(row).__name__}")
        yield where, row


def _pair(row: dict[str, Any], where: str) -> Pair:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages: a list of turns is wanted, found {messages!r:.60}")
    dialogue = tuple(
        Message(role=_text(turn, "role", where), content=_text(turn, "content", where))
        for turn in messages
    )
    sides = [_side(row, key, where) for key in ("a", "b")]
    pair = make_pair(
        _text(row, "prompt_id", where),
        dialogue,
        *sides,
        kind=_text(row, "kind", where),
        lang=_text(row, "lang", where),
    )
    if row.get("pair") != pair.pair:
        raise DataError(f"{where}: pair: its content has the hash {pair.pair}, the line another")
    return pair


def _side(row: dict[str, Any], key: str, where: str) -> Reply:
    found = row.get(key)
    if not isinstance(found, dict):
        raise DataError(f"{where}: {key}: {{name, response}} is wanted, found {found!r:.60}")
    return Reply(_text(found, "name", where), _text(found, "response", where))


def _verdict(row: dict[str, Any], where: str) -> Verdict:
    question = _one_of(row, "question", QUESTIONS, where)
    choice = _one_of(row, "verdict", CHOICES, where)
    seconds, note = row.get("seconds", 0.0), row.get("note")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise DataError(f"{where}: seconds: a number is wanted, found {seconds!r:.60}")
    names = ("pair", "prompt_id", "a", "b", "annotator")
    pair, prompt_id, a, b, annotator = (_text(row, name, where) for name in names)
    return Verdict(
        pair=pair,
        prompt_id=prompt_id,
        a=a,
        b=b,
        annotator=annotator,
        question=cast("Question", question),
        verdict=cast("Choice", choice),
        time=_text(row, "time", where),
        seconds=float(seconds),
        note=note if isinstance(note, str) else None,
    )


def _one_of(row: dict[str, Any], key: str, known: Sequence[str], where: str) -> str:
    found = row.get(key)
    if found not in known:
        raise DataError(f"{where}: {key}: one of {', '.join(known)} is wanted, found {found!r:.60}")
    return str(found)


def _text(row: object, key: str, where: str) -> str:
    found = row.get(key) if isinstance(row, dict) else None
    if not isinstance(found, str):
        raise DataError(f"{where}: {key}: text is wanted, found {found!r:.60}")
    return found


def _reply_hash(messages: Sequence[Message], response: str) -> str:
    return _sha256([[(turn["role"], turn["content"]) for turn in messages], response])


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
