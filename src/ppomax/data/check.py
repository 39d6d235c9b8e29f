"""What `ppomax data check` says of files: rows, layout, defects and their lines."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ppomax.data.formats import (
    BadRow,
    Format,
    detect_format,
    iter_raw,
    parse_preference,
    parse_prompt,
    parse_sft,
    parse_text,
    place,
)
from ppomax.data.layouts import DIALOGUE, PREFERENCE, TEXT
from ppomax.data.sources import fingerprint, locate
from ppomax.errors import ConfigError
from ppomax.types import PreferenceRow, PromptRow, SFTRow, TextRow

Kind = Literal["preference", "SFT", "prompt", "text"]
AnyRow = PreferenceRow | SFTRow | PromptRow | TextRow
Parse = Callable[[object, str], Sequence[AnyRow] | BadRow]

PROMPTS_SHARE = 0.05
"""A file of dialogues is one of prompts where more than this share ends with the user's turn:
as SFT data a run would refuse it (`max_bad_rows`)."""

COUNTED = ("lang", "kind", "source", "label_by", "written_by", "category", "subset")
"""Columns whose values are counted."""


ONE_SIDED = 0.98
"""Share of pairs in which the same answer is the longer one above which length explains a data set
(ours)."""
MAX_NUMBERS = 500
"""Line numbers printed of one defect."""


@dataclass(slots=True)
class FileCheck:
    """What one file holds."""

    path: str
    kind: Kind
    """What the rows were checked as."""
    rows: int = 0
    usable: int = 0
    """Rows that would be taken, duplicates included; a ranked list is one row."""
    pairs: int = 0
    """Preference pairs in the usable rows."""
    formats: Counter[str] = field(default_factory=Counter)
    """Rows by layout; `unknown` where none fits."""
    refused: list[tuple[int, BadRow]] = field(default_factory=list)
    """Rows that would be refused, with their line (or row) number."""
    duplicates: list[tuple[int, BadRow]] = field(default_factory=list)
    """Usable rows that say the same as an earlier one of the file."""
    values: dict[str, Counter[str]] = field(default_factory=dict)
    """Rows by value, for the columns in `COUNTED`."""
    longer_wins: float | None = None
    """Share of pairs whose chosen answer has more characters, equal lengths left out."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check_files` found, file by file."""

    files: list[FileCheck]

    @property
    def refused(self) -> int:
        """Rows that would be refused, in all files."""
        return sum(len(file.refused) for file in self.files)


def check_files(paths: Sequence[str | Path], kind: Kind | None = None) -> CheckReport:
    """Read files as a run would and note what it would refuse.

    Args:
        paths: files, hub ids or `bundled:NAME`.
        kind: what the rows are to be used as; found out from each file's rows if not said.

    Raises:
        DataError: a file is missing, empty or damaged.
        ConfigError: the extra that reads a file is not installed.
    """
    return CheckReport([_check(str(path), kind) for path in paths])


def kind_named(name: str) -> Kind:
    """What rows are to be used as, by name; capitals do not matter.

    Raises:
        ConfigError: there is no such use.
    """
    for kind in get_args(Kind):
        if kind.lower() == name.lower():
            found: Kind = kind
            return found
    raise ConfigError(f"option kind: {name!r} is none of {', '.join(get_args(Kind))}")


def render(report: CheckReport) -> list[str]:
    """The report as plain lines."""
    lines = [line for file in report.files for line in _render(file)]
    if len(report.files) > 1:
        rows = sum(file.rows for file in report.files)
        lines.append(f"{len(report.files)} files, {rows} rows, {report.refused} refused")
    return lines


def _check(path: str, kind: Kind | None) -> FileCheck:
    rows = list(iter_raw(locate(path)))
    result = FileCheck(path, kind or _kind([raw for _, raw in rows]), rows=len(rows))
    parse = _parser(result.kind)
    seen: dict[str, int] = {}
    pairs: list[PreferenceRow] = []
    for number, raw in rows:
        where = place(path, number)
        found = raw if isinstance(raw, BadRow) else parse(raw, where)
        result.formats[_format_name(raw)] += 1
        if isinstance(found, BadRow):
            result.refused.append((number, found))
            continue
        result.usable += 1
        first = seen.setdefault(fingerprint(found), number)
        if first != number:
            reason = f"says the same as {place(path, first)}"
            result.duplicates.append((number, BadRow(where, "duplicate", reason)))
        pairs += [row for row in found if isinstance(row, PreferenceRow)]
        _count(result.values, raw)
    result.pairs = len(pairs)
    result.longer_wins = longer_wins(pairs)
    return result


def longer_wins(pairs: Sequence[PreferenceRow]) -> float | None:
    """Share of pairs whose chosen answer is the longer one, in characters; None without such."""
    signs = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    unequal = [sign for sign in signs if sign]
    return sum(sign > 0 for sign in unequal) / len(unequal) if unequal else None


def _kind(rows: Sequence[object]) -> Kind:
    """What a file is for: the commonest use of its rows' layouts."""
    usable = [row for row in rows if not isinstance(row, BadRow)]
    uses: Counter[Kind] = Counter(_use(detect_format(row)) for row in usable)
    kind: Kind = uses.most_common(1)[0][0] if uses else "preference"
    if kind != "SFT":
        return kind
    ends = [parse_sft(row, "") for row in usable]
    waiting = sum(isinstance(end, BadRow) and end.kind == "last-turn" for end in ends)
    return "prompt" if waiting > PROMPTS_SHARE * len(usable) else "SFT"


def _use(layout: Format | None) -> Kind:
    if layout in PREFERENCE:
        return "preference"
    if layout in TEXT:
        return "text"
    return "SFT" if layout in DIALOGUE else "prompt"


def _parser(kind: Kind) -> Parse:
    match kind:
        case "preference":
            return parse_preference
        case "SFT":
            return parse_sft
        case "prompt":
            return parse_prompt
        case "text":
            return parse_text


def _format_name(raw: object) -> str:
    return "unreadable" if isinstance(raw, BadRow) else detect_format(raw) or "unknown"


def _count(values: dict[str, Counter[str]], raw: Any) -> None:  # noqa: ANN401 - any JSON value
    if isinstance(raw, dict):
        for column in COUNTED:
            if isinstance(raw.get(column), str):
                values.setdefault(column, Counter())[raw[column]] += 1


def _render(file: FileCheck) -> list[str]:
    formats = ", ".join(f"{name} {count}" for name, count in file.formats.most_common())
    lines = [
        f"{file.path}: {file.rows} rows, read as {file.kind} data ({formats}); "
        f"{file.usable} usable, {len(file.refused)} refused"
    ]
    if file.pairs:
        wins = (
            ""
            if file.longer_wins is None
            else (f"; the longer answer is the chosen one in {file.longer_wins:.1%}")
        )
        lines.append(f"  pairs: {file.pairs}{wins}")
    if file.longer_wins is not None and not ONE_SIDED > file.longer_wins > 1 - ONE_SIDED:
        lines.append("  one-sided: length alone tells which answer is preferred")
    for column, counts in file.values.items():
        lines.append(f"  {column}: {_top(counts)}")
    by_line = ":row " not in place(file.path, 1)
    for title, found in (("refused", file.refused), ("duplicate, kept", file.duplicates)):
        kinds: dict[str, list[tuple[int, BadRow]]] = {}
        for number, bad in found:
            kinds.setdefault(bad.kind, []).append((number, bad))
        for kind, items in kinds.items():
            numbers = ", ".join(str(number) for number, _ in items[:MAX_NUMBERS])
            numbers += ", ..." if len(items) > MAX_NUMBERS else ""
            name = title if kind == "duplicate" else f"{title}, {kind}"
            unit = "line" if by_line else "row"
            lines.append(f"  {name}: {len(items)} ({unit} {numbers})")
            lines += [f"    {bad.where}: {bad.reason}" for _, bad in items[:3]]
    return lines


def _top(counts: Counter[str], most: int = 8) -> str:
    shown = ", ".join(f"{value} {count}" for value, count in counts.most_common(most))
    return shown + (f", {len(counts) - most} more values" if len(counts) > most else "")
