"""Sources of a recipe to rows in memory: where they lie, filters, quarantine."""

import hashlib
import importlib.resources
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ppomax.config import Settings
from ppomax.data.formats import (
    BadRow,
    Format,
    iter_raw,
    parse_preference,
    parse_prompt,
    parse_sft,
    parse_text,
    place,
)
from ppomax.data.layouts import DIALOGUE, PREFERENCE, PROMPT, TEXT
from ppomax.data.raw import count_kinds, is_hub_id
from ppomax.data.splits import (
    Overlap,
    Split,
    check_weights,
    exchange_overlap,
    mixture_order,
    overlap,
    prompt_of,
    split_by_prompt,
)
from ppomax.errors import ConfigError, DataError
from ppomax.types import PreferenceRow, PromptRow, SFTRow, TextRow

__all__ = [
    "BUNDLED",
    "Loaded",
    "Overlap",
    "SourceConfig",
    "Sources",
    "Split",
    "exchange_overlap",
    "load_preferences",
    "load_prompts",
    "load_sft",
    "load_text",
    "locate",
    "mixture_order",
    "overlap",
    "prompt_of",
    "split_by_prompt",
]

BUNDLED = ("preferences", "prompts", "text")
"""The data sets that come with the package, read as `bundled:NAME`."""


class SourceConfig(Settings):
    """One file or data set; a recipe may write the path alone."""

    path: str
    """A file, a hub id (`org/name`, `hub:org/name:split`) or `bundled:preferences`,
    `bundled:prompts`, `bundled:text`. Relative to the current directory."""
    weight: float | None = Field(default=None, gt=0)
    """Share in the mixture, relative to the other sources' (all or none have one). Null: every
    row once an epoch."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many usable rows of the source, from its start (a ranked list is one)."""
    where: dict[str, str] = Field(default_factory=dict)
    """Take only rows whose columns have these values, as in `{lang: en}`."""
    strength: str | None = None
    """Column of a preference file that says how much better the chosen answer is, 0 or more; null
    takes `strength` or `margin` where a row has them. `reward.strength` says what it does."""
    format: Literal["auto"] | Format = "auto"
    """How the rows are written; found out row by row unless said."""

    @field_validator("path")
    @classmethod
    def _home(cls, value: str) -> str:
        return os.path.expanduser(value)  # noqa: PTH111 - an unknown ~user stays as it is

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:  # noqa: ANN401 - what a recipe holds
        return {"path": value} if isinstance(value, str | Path) else value


def _listed(value: Any) -> Any:  # noqa: ANN401 - what a recipe holds
    return [value] if isinstance(value, str | Path | dict | SourceConfig) else value


Sources = Annotated[list[SourceConfig], BeforeValidator(_listed)]
"""The type of a setting that takes one or several sources."""

Row = TypeVar("Row", PreferenceRow, SFTRow, PromptRow, TextRow)
Parser = Callable[[object, str, Format | None], list[Row] | BadRow]


@dataclass(frozen=True, slots=True)
class Loaded(Generic[Row]):
    """What the sources of one stage held."""

    rows: list[Row]
    bad: list[BadRow]
    """Rows set aside."""
    duplicates: list[BadRow]
    """Rows that say the same as an earlier one; they are in `rows` all the same."""
    files: dict[str, str]
    """Each source's path and the SHA-256 of its file (of its rows, for a hub data set)."""
    source_of: list[int]
    """For each row the source it is from."""
    weights: tuple[float | None, ...]
    """For each source its weight in the mixture."""

    def order(self, seed: int, epoch: int) -> list[int]:
        """Indices into `rows` for one epoch, a pure function of its arguments."""
        counts = Counter(self.source_of)
        lengths: list[int] = [counts[source] for source in range(len(self.weights))]
        starts = [0, *accumulate(lengths)]
        drawn = mixture_order(lengths, self.weights, seed=seed, epoch=epoch)
        return [starts[source] + row for source, row in drawn]

    def order_of(self, kept: Sequence[Row], seed: int, epoch: int) -> list[int]:
        """`order` for some of the rows: indices into `kept`, which holds rows of `rows` itself.

        As many as are kept; weights are shares of these.
        """
        places = {id(row): place for place, row in enumerate(kept)}
        if self.weights[0] is None:
            drawn = (id(self.rows[index]) for index in self.order(seed, epoch))
            return [places[row] for row in drawn if row in places]
        own: list[list[int]] = [[] for _ in self.weights]
        for row, source in zip(self.rows, self.source_of, strict=True):
            if id(row) in places:
                own[source].append(places[id(row)])
        mixed = mixture_order([len(rows) for rows in own], self.weights, seed=seed, epoch=epoch)
        return [own[source][row] for source, row in mixed]


def load_preferences(
    sources: Sequence[SourceConfig], *, max_bad_rows: float = 0.05
) -> Loaded[PreferenceRow]:
    """Preference pairs of all sources, in order.

    Args:
        sources: files and data sets, read one after the other.
        max_bad_rows: the share of rows that may be unusable.

    Raises:
        DataError: more bad rows than that, a source without a usable row, or an unreadable file.
        ConfigError: a source's settings do not fit, or an extra is missing.
    """
    return _load(sources, parse_preference, PREFERENCE, "preference", max_bad_rows)


def load_sft(sources: Sequence[SourceConfig], *, max_bad_rows: float = 0.05) -> Loaded[SFTRow]:
    """Dialogues to imitate; arguments and errors as for `load_preferences`."""
    return _load(sources, parse_sft, PREFERENCE | DIALOGUE, "SFT", max_bad_rows)


def load_prompts(
    sources: Sequence[SourceConfig], *, max_bad_rows: float = 0.05
) -> Loaded[PromptRow]:
    """Dialogues to answer; arguments and errors as for `load_preferences`."""
    return _load(sources, parse_prompt, PREFERENCE | DIALOGUE | PROMPT, "prompt", max_bad_rows)


def load_text(sources: Sequence[SourceConfig], *, max_bad_rows: float = 0.05) -> Loaded[TextRow]:
    """Plain texts; arguments and errors as for `load_preferences`."""
    return _load(sources, parse_text, TEXT, "text", max_bad_rows)


def locate(path: str) -> str:
    """The file behind `bundled:NAME`; any other path unchanged.

    Raises:
        DataError: no bundled data set has that name.
    """
    kind, _, name = path.partition(":")
    if kind != "bundled":
        return path
    if name not in BUNDLED:
        raise DataError(f"{path}: no such bundled data; there are {', '.join(BUNDLED)}")
    return str(importlib.resources.files("ppomax") / "data" / "bundled" / f"{name}.jsonl")


def fingerprint(rows: Sequence[PreferenceRow | SFTRow | PromptRow | TextRow]) -> str:
    """What the records of one raw row say, names and places aside: equal for duplicates."""
    said = []
    for row in rows:
        if isinstance(row, PreferenceRow):
            said.append([row.prompt, row.chosen, row.rejected])
        else:
            said.append([row.text if isinstance(row, TextRow) else row.messages])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _load(
    sources: Sequence[SourceConfig],
    parse: Parser[Row],
    known: frozenset[Format],
    wanted: str,
    max_bad_rows: float,
) -> Loaded[Row]:
    _check_settings(sources, known, wanted)
    loaded: Loaded[Row] = Loaded([], [], [], {}, [], tuple(source.weight for source in sources))
    seen: dict[str, str] = {}
    total = 0
    for index, source in enumerate(sources):
        usable = 0
        for where, found in _parsed(source, parse, loaded.files):
            total += 1
            if isinstance(found, BadRow):
                loaded.bad.append(found)
                continue
            first = seen.setdefault(fingerprint(found), where)
            if first != where:
                loaded.duplicates.append(BadRow(where, "duplicate", f"says the same as {first}"))
            loaded.rows.extend(found)
            loaded.source_of.extend([index] * len(found))
            usable += 1
            if usable == source.limit:
                break
    _check_loaded(sources, loaded, total, wanted, max_bad_rows)
    return loaded


def _parsed(
    source: SourceConfig, parse: Parser[Row], files: dict[str, str]
) -> Iterator[tuple[str, list[Row] | BadRow]]:
    """The rows of a source that its filter lets through; notes the hash of what was read."""
    path = locate(source.path)
    layout = None if source.format == "auto" else source.format
    digest = hashlib.sha256()
    if not is_hub_id(path) and Path(path).is_file():
        files[source.path] = file_sha256(Path(path))
    for number, raw in iter_raw(path):
        where = place(source.path, number) if path == source.path else f"{source.path}:{number}"
        if isinstance(raw, BadRow):
            yield where, raw
            continue
        if source.path not in files or is_hub_id(path):
            digest.update(json.dumps(raw, sort_keys=True, default=str).encode())
            files[source.path] = digest.hexdigest()
        if all(
            isinstance(raw, dict) and _written(raw.get(column)) == value
            for column, value in source.where.items()
        ):
            if source.strength and isinstance(raw, dict):
                own = {column: value for column, value in raw.items() if column != "margin"}
                raw = {**own, "strength": raw.get(source.strength)}
            yield where, parse(raw, where, layout)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _written(value: object) -> str:
    """A column's value as a recipe writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_settings(sources: Sequence[SourceConfig], known: frozenset[Format], wanted: str) -> None:
    if not sources:
        raise ConfigError(f"no {wanted} data: name at least one source")
    check_weights([source.weight for source in sources])
    for source in sources:
        if source.format != "auto" and source.format not in known:
            raise ConfigError(
                f"{source.path}: format {source.format} holds no {wanted} rows; "
                f"take auto or one of {', '.join(sorted(known))}"
            )


def _check_loaded(
    sources: Sequence[SourceConfig],
    loaded: Loaded[Row],
    total: int,
    wanted: str,
    max_bad_rows: float,
) -> None:
    bad = loaded.bad
    if total and len(bad) / total > max_bad_rows:
        shown = "; ".join(f"{row.where} {row.kind} ({row.reason})" for row in bad[:3])
        raise DataError(
            f"{len(bad)} of {total} rows ({len(bad) / total:.1%}) cannot be used as {wanted} rows, "
            f"more than max_bad_rows = {max_bad_rows:.1%}: {shown}"
            + (f"; and {len(bad) - 3} more, in all {count_kinds(bad)}" if len(bad) > 3 else "")
        )
    for index in sorted(set(range(len(sources))) - set(loaded.source_of)):
        source = sources[index]
        filtered = f" where {source.where}" if source.where else ""
        raise DataError(
            f"{source.path}: no usable {wanted} row{filtered}; `ppomax data check` says why"
        )
