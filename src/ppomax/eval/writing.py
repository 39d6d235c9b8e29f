"""Replies to a file as they end: long work that shows how far it is, and is not lost."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppomax import rundir
from ppomax.data.sources import SourceConfig, load_prompts
from ppomax.errors import ConfigError
from ppomax.eval.generate import generate_rows
from ppomax.eval.local_judges import fingerprint
from ppomax.rollout import SamplingParams
from ppomax.train.progress import Progress
from ppomax.types import PromptRow

SECONDS, SECONDS_OF_LINES = 0.5, 15.0
"""Between two signs of progress, on a terminal and where each is a line."""


def generate_file(
    model: str,
    prompts: str,
    out: Path,
    params: SamplingParams,
    *,
    seed: int,
    dtype: str,
    limit: int | None,
    system: str | None = None,
) -> int:
    """Answer every prompt of a file, as `write_rows` does; returns how many.

    What is a link or no file (a pipe, /dev/stdout) gets all replies at the end.

    Raises:
        ConfigError: the file cannot be written.
        DataError: bad prompts.
        ModelError: a prompt leaves no position for a reply.
    """
    rows = load_prompts([SourceConfig(path=prompts)]).rows[:limit]
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"option out: {out} cannot be written; name a file in a folder there is")
    options: dict[str, Any] = {"seed": seed, "dtype": dtype, "system": system}
    if out.is_symlink() or (out.exists() and not out.is_file()):
        text = rundir.as_lines(generate_rows(model, rows, params, **options))
        with _writing(out):
            out.write_text(text, encoding="utf-8")
    else:
        write_rows(out, model, rows, params, **options)
    return len(rows)


def key_of(
    model: str,
    rows: Sequence[PromptRow],
    params: SamplingParams,
    *,
    seed: int,
    dtype: str,
    system: str | None = None,
) -> str:
    """All that replies depend on, as JSON."""
    own = {} if system is None else {"system": system}
    return json.dumps(
        {
            "model": fingerprint(model) or model,
            "sampling": params.model_dump(mode="json"),
            "seed": seed,
            "dtype": dtype,
            "prompts": [[row.id, row.messages] for row in rows],
            **own,
        }
    )


def write_rows(
    path: Path,
    model: str,
    rows: Sequence[PromptRow],
    params: SamplingParams,
    *,
    seed: int,
    dtype: str,
    system: str | None = None,
    mark: Path | None = None,
) -> None:
    """One reply per prompt, as `generate_rows` gives them, in the prompts' order.

    The file is there when it is whole. Until then replies stand in `<path>.unfinished`, in the
    order in which they ended, and the same call goes on behind them; in bfloat16 without compiled
    kernels those that are left may then be other draws, for they are written in other company.

    Args:
        mark: a file that is to hold the key of these replies, and no other; whoever gives it owns
            `path`, so that unfinished replies of another call are let go.

    Raises:
        ConfigError: unfinished replies of another call are there, or a file cannot be written.
    """
    key = key_of(model, rows, params, seed=seed, dtype=dtype, system=system)
    unfinished = _Unfinished(path.with_name(f"{path.name}.unfinished"), key, len(rows))
    if unfinished.foreign and mark is None:
        raise ConfigError(
            f"option out: {unfinished.path} holds something else, as replies of a call with other "
            "settings; make that call again, delete the file, or name another one"
        )
    if unfinished.foreign:
        unfinished.path.unlink()
        unfinished.torn = False
    try:
        replies = generate_rows(
            model,
            rows,
            params,
            seed=seed,
            dtype=dtype,
            system=system,
            held=unfinished.held,
            began=unfinished.begin,
            told=unfinished.add,
        )
    except BaseException:
        unfinished.leave()
        raise
    unfinished.progress.close()
    with _writing(path):
        if mark is not None:
            mark.unlink(missing_ok=True)
        rundir.write_text(path, rundir.as_lines(replies))
        if mark is not None:
            rundir.write_text(mark, key)
    unfinished.clear()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the system says against it as an error of the user's."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise ConfigError(f"option out: cannot write {place} ({error.strerror})") from None


class _Unfinished:
    """The replies of a call that are there, and how far they are.

    A line is a reply and says of which call it is: another one may write to the file too.
    """

    def __init__(self, path: Path, key: str, total: int) -> None:
        self.path, self.total = path, total
        self.call = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self.held: dict[int, tuple[str, bool]] = {}
        """Text, and whether it ended by itself, by the prompt's index."""
        text = path.read_bytes() if path.is_file() else b""
        self.foreign = bool(text) or path.is_dir()
        """Whether there is something, and no reply of this call."""
        self.torn = not text.endswith(b"\n") and bool(text)
        for line in rundir.read_jsonl(path) if text else ():
            match line:
                case {
                    "call": self.call,
                    "row": int(row),
                    "response": str(reply),
                    "finished": bool(finished),
                } if 0 <= row < total:
                    self.held[row] = (reply, finished)
                    self.foreign = False
        self.progress = Progress("generate", enabled=True)
        self.every = SECONDS if self.progress.console.is_terminal else SECONDS_OF_LINES
        self.count = self.tokens = self.cut = 0
        self.started = self.last = 0.0
        if self.held:
            self.progress.say(f"{len(self.held)} of {total} replies are there, in {path}")
        self.done = len(self.held)

    def begin(self) -> None:
        """The first reply is begun."""
        self.started = self.last = time.monotonic()

    def add(self, row: int, reply: str, finished: bool, tokens: int) -> None:
        """A reply has ended."""
        line = {"call": self.call, "row": row, "response": reply, "finished": finished}
        with _writing(self.path):
            if self.torn:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n")
                self.torn = False
            rundir.append_jsonl(self.path, [line])
        self.done, self.count = self.done + 1, self.count + 1
        self.tokens, self.cut = self.tokens + tokens, self.cut + (not finished)
        now = time.monotonic()
        if now - self.last < self.every and self.done < self.total:
            return
        self.last = now
        values = {
            "response/length_mean": self.tokens / self.count,
            "response/truncated_fraction": self.cut / self.count,
            "throughput/rollout_tokens_per_s": self.tokens / max(now - self.started, 1e-9),
        }
        self.progress.show("generate", self.done, self.total, values)

    def leave(self) -> None:
        """Stopped: say what is kept."""
        self.progress.close()
        if self.count:
            self.progress.say(
                f"{self.done} of {self.total} replies are kept in {self.path}; the same call goes "
                "on"
            )

    def clear(self) -> None:
        """Let the file go, unless replies of another call stand in it."""
        if all(line.get("call") == self.call for line in rundir.read_jsonl(self.path)):
            self.path.unlink(missing_ok=True)
