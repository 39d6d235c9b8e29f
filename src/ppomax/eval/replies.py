"""Replies to compare: from files written before, or from models that answer now."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppomax import rundir
from ppomax.data.formats import parse_prompt
from ppomax.data.raw import BadRow, iter_raw
from ppomax.data.sources import SourceConfig, load_prompts
from ppomax.data.template import ChatTemplate
from ppomax.errors import ConfigError, DataError
from ppomax.eval.pairs import Pair, Reply, make_pair
from ppomax.eval.writing import key_of, write_rows
from ppomax.models.load import load_tokenizer
from ppomax.rollout import SamplingParams
from ppomax.types import PromptRow

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Prompts:
    """What both models answer."""

    rows: list[PromptRow]
    repeated: int
    """Rows left out because an earlier one says the same."""


@dataclass(frozen=True, slots=True)
class Replies:
    """One model's replies, by id of the prompt."""

    name: str
    texts: dict[str, str]
    origin: dict[str, Any]
    """Where they are from and every setting of their sampling that is known."""
    notes: dict[str, int]
    """Counted oddities: empty replies, replies without an end, hidden system turns."""


def load_unique_prompts(
    sources: Sequence[SourceConfig], *, limit: int | None = None, max_bad_rows: float = 0.05
) -> Prompts:
    """The prompts of all files, each once.

    Raises:
        DataError: as `load_prompts`; also one id for two different prompts.
    """
    rows = load_prompts(sources, max_bad_rows=max_bad_rows).rows
    kept = unique(rows)
    seen: dict[str, PromptRow] = {}
    for row in kept:
        other = seen.setdefault(row.id, row)
        if other is not row:
            raise DataError(
                f"{row.where}: id {row.id} is also that of another prompt ({other.where}); replies "
                "are told apart by it, so give each prompt its own"
            )
    return Prompts(kept[:limit], len(rows) - len(kept))


def unique(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """The rows without those that say the same as an earlier one."""
    seen: dict[str, PromptRow] = {}
    for row in rows:
        seen.setdefault(json.dumps(row.messages), row)
    return list(seen.values())


def is_file_of_replies(name: str) -> bool:
    """Whether a name on the command line is a file of replies rather than a model."""
    return name.endswith(SUFFIXES) or Path(name).is_file()


def read_replies(path: str, rows: Sequence[PromptRow], name: str) -> Replies:
    """The replies of a file of {id, prompt?, response} rows, as `ppomax generate` writes it.

    Replies to other prompts are counted and left out.

    Raises:
        DataError: a row without id or response, an id twice, a prompt that is not the one of that
            id, or a prompt without a reply.
    """
    wanted = {row.id: row for row in rows}
    texts: dict[str, str] = {}
    origin: dict[str, Any] = {}
    notes: Counter[str] = Counter()
    for number, raw in iter_raw(path):
        where = f"{path}:{number}"
        if isinstance(raw, BadRow):
            raise DataError(f"{where}: {raw.reason}")
        if not isinstance(raw, dict) or not isinstance(raw.get("response"), str):
            raise DataError(f"{where}: a row with id and response is wanted (ppomax generate)")
        found = str(raw.get("id", ""))
        if found not in wanted:
            notes["replies to other prompts"] += 1
            continue
        if found in texts:
            raise DataError(f"{where}: id {found} has a reply already")
        if "prompt" in raw and not _same(raw["prompt"], wanted[found]):
            raise DataError(
                f"{where}: its prompt is not the one of id {found} in {wanted[found].where}; the "
                "replies are to another set of prompts"
            )
        texts[found] = raw["response"]
        notes["empty"] += not raw["response"].strip()
        notes["cut at the limit"] += raw.get("finished") is False
        origin = {key: raw[key] for key in ("model", "sampling", "seed") if key in raw}
    missing = [key for key in wanted if key not in texts]
    if missing:
        raise DataError(
            f"{path}: no reply to {len(missing)} of {len(wanted)} prompts, the first is "
            f"{missing[0]}; both sides must have answered the same prompts"
        )
    return Replies(name, texts, {"file": path} | origin, _counted(notes))


def write_replies(
    model: str,
    rows: Sequence[PromptRow],
    params: SamplingParams,
    path: Path,
    name: str,
    *,
    seed: int,
    dtype: str,
    say: Callable[[str], None],
) -> Replies:
    """A model's replies, taken from `path` if it holds those of this very model, else written."""
    key = key_of(model, rows, params, seed=seed, dtype=dtype)
    mark = path.with_suffix(".key")
    if path.exists() and mark.exists() and mark.read_text(encoding="utf-8") == key:
        say(f"{name}: replies in {path} are used again")
    else:
        say(f"{name}: answering {len(rows)} prompts")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, model, rows, params, seed=seed, dtype=dtype, mark=mark)
        rundir.write_text(mark, key)
    found = read_replies(str(path), rows, name)
    hidden = hidden_system_turns(model, rows)
    notes = found.notes | ({"system turns the template hides": hidden} if hidden else {})
    return Replies(name, found.texts, found.origin, notes)


def hidden_system_turns(model: str, rows: Sequence[PromptRow]) -> int:
    """Prompts whose system turn the model's chat template leaves out: it never saw them."""
    with_system = [row for row in rows if row.messages[0]["role"] == "system"]
    if not with_system:
        return 0
    template = ChatTemplate(load_tokenizer(model))
    return sum(template.prompt(r.messages) == template.prompt(r.messages[1:]) for r in with_system)


def make_pairs(rows: Sequence[PromptRow], baseline: Replies, candidate: Replies) -> list[Pair]:
    """One pair per prompt: `a` is the baseline's reply, `b` the candidate's."""
    texts = {r.name: [r.texts[row.id] for row in rows] for r in (baseline, candidate)}
    return pairs_of(rows, texts)


def pairs_of(rows: Sequence[PromptRow], texts: dict[str, list[str]]) -> list[Pair]:
    """Pairs of the replies of two models, by name; the first is side `a`."""
    a, b = texts
    return [
        make_pair(
            row.id,
            row.messages,
            Reply(a, first),
            Reply(b, second),
            kind=str(row.meta.get("kind", "")),
            lang=str(row.meta.get("lang", "")),
        )
        for row, first, second in zip(rows, texts[a], texts[b], strict=True)
    ]


def say(line: str) -> None:
    """A line of a stage's evaluation, for the terminal."""
    sys.stderr.write(f"eval: {line}\n")


def names_of(models: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart.

    Raises:
        ConfigError: one is given twice.
    """
    if len(set(models)) < len(models):
        twice = next(name for name, count in Counter(models).items() if count > 1)
        raise ConfigError(f"{twice}: given twice; name two different models or files")
    parts = [Path(name).parts for name in models]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names) and not {"export"} & set(names):
            return names
    return list(models)


def _same(prompt: object, row: PromptRow) -> bool:
    read = parse_prompt({"prompt": prompt}, row.where)
    return isinstance(read, list) and [found.messages for found in read] == [row.messages]


def _counted(notes: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in notes.items() if count}
