"""Answers of judges on disk: a file that only grows, each answer in it before anything is done.

An answer is handed to the system as it comes, so a process killed at any moment loses at most
those still under way; it is forced to the disk within a second, so a power failure costs no more.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ppomax import rundir
from ppomax.errors import ConfigError
from ppomax.eval.pairs import append_line, sync

SYNC_SECONDS = 1.0
"""fsync takes 70 ms on a busy disk: one for each of 400 answers would be half the time (ours)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge said, and what it used."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    attempts: int = 1
    """Requests sent for it."""
    lost: int = 0
    """Those of them that may have been charged although no answer came to be read."""
    refused: bool = False
    """The endpoint does not take the question; the text is empty."""


@dataclass(slots=True)
class Answers:
    """The file and what it holds, by key."""

    path: Path
    known: dict[str, Answer] = field(default_factory=dict)
    judges: dict[str, str] = field(default_factory=dict)
    """Which judge gave the answer of a key."""
    synced: float = 0.0

    def add(self, key: str, judge: str, answer: Answer) -> None:
        """Keep an answer; a killed process has not lost it once this returns."""
        row = {
            "key": key,
            "judge": judge,
            "text": answer.text,
            "tokens_in": answer.tokens_in,
            "tokens_out": answer.tokens_out,
            "attempts": answer.attempts,
        }
        row |= {"lost": answer.lost} if answer.lost else {}
        row |= {"refused": True} if answer.refused else {}
        now = time.monotonic()
        append_line(self.path, json.dumps(row), sync=now - self.synced >= SYNC_SECONDS)
        if now - self.synced >= SYNC_SECONDS:
            self.synced = now
        self.known[key], self.judges[key] = answer, judge

    def used(self, judge: str) -> list[Answer]:
        """Every answer of one judge, whatever it was asked."""
        return [self.known[key] for key, name in self.judges.items() if name == judge]


@contextmanager
def open_answers(path: Path) -> Iterator[Answers]:
    """The answers in a file, for one process at a time.

    Raises:
        ConfigError: another process is judging into the file, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=0):
            answers = read_answers(path)
            try:
                yield answers
            finally:
                sync(path)
    except Timeout:
        raise ConfigError(
            f"{path}: another process is judging into it; wait for it or give another --out"
        ) from None
    except PermissionError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def read_answers(path: Path) -> Answers:
    """The answers in a file; lines cut short by a crash are left out."""
    answers = Answers(path)
    for row in rundir.read_jsonl(path):
        key, judge, text = row.get("key"), row.get("judge"), row.get("text")
        if isinstance(key, str) and isinstance(judge, str) and isinstance(text, str):
            names = ("tokens_in", "tokens_out", "attempts", "lost")
            tokens_in, tokens_out, attempts, lost = (_count(row, name) for name in names)
            refused = row.get("refused") is True
            answer = Answer(text, tokens_in, tokens_out, attempts, lost, refused)
            answers.known[key], answers.judges[key] = answer, judge
    return answers


def _count(row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    return value if isinstance(value, int) else 0
