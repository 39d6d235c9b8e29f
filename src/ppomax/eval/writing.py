"""Replies to a file as they end: long work that shows how far it is, and is not lost."""

import json
import time
from collections.abc import Sequence
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

    Raises:
        ConfigError: the file cannot be written.
        DataError: bad prompts.
        ModelError: a prompt leaves no position for a reply.
    """
    rows = load_prompts([SourceConfig(path=prompts)]).rows[:limit]
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"option out: {out} cannot be written; name a file in a folder there is")
    options: dict[str, Any] = {"seed": seed, "dtype": dtype, "system": system}
    try:
        if out.exists() and not out.is_file():  # /dev/stdout
            out.write_text(rundir.as_lines(generate_rows(model, rows, params, **options)))
        else:
            write_rows(out, model, rows, params, **options)
    except OSError as error:
        raise ConfigError(f"option out: cannot write {out} ({error.strerror})") from None
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
) -> None:
    """One reply per prompt, as `generate_rows` gives them, in the prompts' order.

    The file is there when it is whole. Until then replies stand in `<path>.unfinished`, in the
    order in which they ended, and the same call goes on behind them.
    """
    key = key_of(model, rows, params, seed=seed, dtype=dtype, system=system)
    unfinished = path.with_name(f"{path.name}.unfinished")
    before = list(rundir.read_jsonl(unfinished))
    held: dict[int, dict[str, Any]] = {}
    if before and before[0].get("key") == key:
        held = {row["row"]: row["reply"] for row in before[1:]}
    kept: list[dict[str, Any]] = [{"key": key}]
    kept += [{"row": row, "reply": reply} for row, reply in held.items()]
    rundir.write_text(unfinished, rundir.as_lines(kept))  # less a torn last line
    progress = Progress("generate", enabled=True)
    if held:
        progress.say(f"{len(held)} of {len(rows)} replies are there, in {unfinished}")
    shown = _Shown(progress, len(rows), len(held))

    def told(row: int, reply: dict[str, Any], tokens: int) -> None:
        rundir.append_jsonl(unfinished, [{"row": row, "reply": reply}])
        shown.one_more(tokens, finished=reply["finished"])

    try:
        replies = generate_rows(
            model, rows, params, seed=seed, dtype=dtype, system=system, held=held, told=told
        )
    finally:
        progress.close()
    rundir.write_text(path, rundir.as_lines(replies))
    unfinished.unlink(missing_ok=True)  # another process may write the same


class _Shown:
    """How far the replies are."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self.progress, self.total, self.done = progress, total, done
        self.every = SECONDS if progress.console.is_terminal else SECONDS_OF_LINES
        self.count = self.tokens = self.cut = 0
        self.began = self.last = time.monotonic()

    def one_more(self, tokens: int, *, finished: bool) -> None:
        """A reply of so many tokens has ended."""
        self.done, self.count = self.done + 1, self.count + 1
        self.tokens, self.cut = self.tokens + tokens, self.cut + (not finished)
        now = time.monotonic()
        if now - self.last < self.every and self.done < self.total:
            return
        self.last = now
        values = {
            "response/length_mean": self.tokens / self.count,
            "response/truncated_fraction": self.cut / self.count,
            "throughput/rollout_tokens_per_s": self.tokens / max(now - self.began, 1e-9),
        }
        self.progress.show("generate", self.done, self.total, values)
