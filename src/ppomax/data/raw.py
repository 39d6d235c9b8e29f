"""Files and hub data sets as a stream of raw rows. What a row means is `formats`' business."""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppomax.data.layouts import detect_format
from ppomax.errors import ConfigError, DataError

MAX_BYTES = 16 * 2**30
"""A compressed file may hold at most this much: more is a zip bomb, or wants to be split."""
MAX_JSON_BYTES = 2 * 2**30
"""A `.json` file is read whole; a larger one belongs into JSON lines."""
MAX_LINE_BYTES = 256 * 2**20
BOMB_BYTES, BOMB_RATIO = 2**30, 1000
"""Beyond so many bytes, a file that grew by more than this factor is refused."""
TEXT_CHUNK = 4000
"""Characters of a plain text that make one row, at most."""

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt", ".parquet")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%:+-]+)?")
_FILES = re.compile(r"\.(csv|tsv|xlsx|arrow|zip|zst|bz2|xz|gz|ya?ml)", re.IGNORECASE)
"""How names of files end that are not read and are no hub ids either."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: it is set aside and reported, never dropped in silence."""

    where: str
    """`file:line`, or `file:row N` where the format has no lines."""
    kind: str
    """The defect in a word: `not-json`, `empty-answer`, ..."""
    reason: str
    """What was found, for people."""


def count_kinds(bad: Sequence[BadRow]) -> str:
    """Rows set aside by kind of defect, the commonest first."""
    counts = Counter(row.kind for row in bad)
    return ", ".join(f"{kind} {count}" for kind, count in counts.most_common())


def iter_raw(path: str | Path) -> Iterator[tuple[int, object | BadRow]]:
    """Every row of a file or hub data set with its number, in order.

    Reads `.json` (a list of rows, or an object around one list), `.jsonl`, `.txt` (chunks of
    paragraphs), each also as `.gz`; `.parquet`; and a hub id, `org/name` or `hub:org/name`, with
    `:split` behind it (default `train`). The number is the line (the first of a chunk), or the
    row, from 1, where `place` says so. A line that is not UTF-8 or not JSON is a `BadRow`.

    Raises:
        DataError: no such file, an empty or damaged one, one too large, or of an unknown kind.
        ConfigError: the extra that reads this kind is not installed.
    """
    rows = 0
    for rows, row in enumerate(_open(str(path)), start=1):  # noqa: B007 - counts
        yield row
    if not rows:
        raise DataError(f"{path}: holds no rows; an empty file cannot be used")


def place(path: str | Path, number: int) -> str:
    """Where a row of `iter_raw` stands: `file:line`, or `file:row N` for JSON, Parquet, hub."""
    by_line = _suffix(str(path)) in (".jsonl", ".ndjson", ".txt")
    return f"{path}:{number}" if by_line else f"{path}:row {number}"


def is_hub_id(path: str | Path) -> bool:
    """Whether the text names a hub data set and no file: nothing of that name exists here."""
    text = str(path)
    if text.startswith("hub:"):
        return True
    named = _HUB.fullmatch(text) is not None and not Path(text).exists()
    file = _suffix(text) or _FILES.fullmatch(Path(text).suffix)
    here = Path(text.partition("/")[0]).is_dir()  # data/rows: a file that is missing
    return named and not file and not here and not text.startswith((".", "~"))


def _open(path: str) -> Iterator[tuple[int, object | BadRow]]:
    if is_hub_id(path):
        return _hub(path)
    file, suffix = Path(path), _suffix(path)
    if not file.exists():
        raise DataError(f"{path}: no such file (a hub id is written org/name or hub:org/name)")
    if file.is_dir():
        raise DataError(f"{path}: is a folder; name the files in it")
    match suffix:
        case ".json":
            return _json(file)
        case ".jsonl" | ".ndjson":
            return _json_lines(path, _lines(file))
        case ".txt":
            return _chunks(path, _lines(file))
        case ".parquet":
            return _parquet(file)
        case _:
            raise DataError(
                f"{path}: unknown kind of file; read are .json, .jsonl, .txt (also .gz), .parquet"
            )


def _suffix(path: str) -> str:
    """The suffix that says what a file is: `.gz` looked through, "" if none is known."""
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    return suffix if suffix in _SUFFIXES else ""


def _blocks(file: Path, *, whole: bool = False) -> Iterator[bytes]:
    """The file's bytes, decompressed, with an eye on how many they become."""
    packed, total = file.stat().st_size, 0
    zipped = file.name.lower().endswith(".gz")
    try:
        with gzip.open(file) if zipped else file.open("rb") as stream:
            while block := stream.read(2**20):
                total += len(block)
                if whole and total > MAX_JSON_BYTES:
                    raise DataError(
                        f"{file}: more than {MAX_JSON_BYTES / 2**30:.3g} GiB of JSON; "
                        "write it as .jsonl, one row a line"
                    )
                if zipped and total > MAX_BYTES:
                    raise DataError(
                        f"{file}: more than {MAX_BYTES / 2**30:.3g} GiB decompressed; split it"
                    )
                if zipped and total > BOMB_BYTES and total > BOMB_RATIO * packed:
                    raise DataError(
                        f"{file}: grows more than {BOMB_RATIO}-fold when decompressed; refused"
                    )
                yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file}: damaged gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their end; a byte order mark is taken off the first."""
    number, rest = 0, b""
    for block in _blocks(file):
        *whole, rest = (rest + block).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise DataError(
                f"{file}:{number + len(whole) + 1}: line of more than "
                f"{MAX_LINE_BYTES >> 20} MiB; one row a line is wanted"
            )
        for line in whole:
            number += 1
            yield number, line.removeprefix(_BOM) if number == 1 else line
    if rest:
        yield number + 1, rest.removeprefix(_BOM) if number == 0 else rest


def _json_lines(
    path: str, lines: Iterator[tuple[int, bytes]]
) -> Iterator[tuple[int, object | BadRow]]:
    for number, line in lines:
        if line.strip():
            yield number, _json_value(line, f"{path}:{number}")


def _json_value(data: bytes, where: str) -> object | BadRow:
    try:
        value: object = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(where, "not-utf8", f"byte {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(where, "not-json", f"not JSON: {error.msg} at character {error.pos}")
    except (ValueError, RecursionError) as error:  # endless numbers, bottomless nesting
        return BadRow(where, "not-json", f"not readable JSON: {error}")
    return value


def _json(file: Path) -> Iterator[tuple[int, object | BadRow]]:
    data = b"".join(_blocks(file, whole=True)).removeprefix(_BOM)
    if not data.strip():
        return
    value = _json_value(data, f"{file}:row 1")
    if isinstance(value, BadRow) and "Extra data" in value.reason:  # JSON lines under that name
        for index, line in enumerate(filter(bytes.strip, data.split(b"\n")), start=1):
            yield index, _json_value(line, f"{file}:row {index}")
        return
    yield from enumerate(_rows_in(value), start=1)


def _rows_in(value: object | BadRow) -> list[Any]:
    """The rows of a JSON document: a list, or an object around exactly one list of objects.

    An object with the columns of a row is that row.
    """
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and detect_format(value) in (None, "text"):
        lists = [item for item in value.values() if isinstance(item, list)]
        rest = [item for item in value.values() if isinstance(item, str)]
        if (
            len(lists) == 1
            and all(
                isinstance(row, dict) and "role" not in row and "from" not in row
                for row in lists[0]
            )
            and (lists[0] or not rest)
        ):
            return lists[0]
    return [value]


def _chunks(path: str, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, object | BadRow]]:
    """A plain text in pieces of at most `TEXT_CHUNK` characters that together are the text.

    Pieces end at a blank line where one is near, else at a line's end, else where they are full.
    """
    start, text, paragraph_end = 1, "", 0
    for number, data in lines:
        try:
            line = data.decode("utf-8").removesuffix("\r") + "\n"
        except UnicodeDecodeError as error:
            yield number, BadRow(f"{path}:{number}", "not-utf8", f"byte {error.start} is not UTF-8")
            continue
        while len(text) + len(line) > TEXT_CHUNK:
            cut = paragraph_end or len(text)
            if not cut:  # one line alone is too long
                text, line, cut = line[:TEXT_CHUNK], line[TEXT_CHUNK:], TEXT_CHUNK
            piece, text = text[:cut], text[cut:]
            if piece.strip():
                yield start, piece
            start += piece.count("\n")
            paragraph_end = 0
        text += line
        if not line.strip():
            paragraph_end = len(text)
    if text.strip():
        yield start, text


def _parquet(file: Path) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f'{file}: reading Parquet needs pyarrow: pip install "ppomax[parquet]"'
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            meta = table.metadata
            groups = (meta.row_group(index) for index in range(meta.num_row_groups))
            if sum(group.total_byte_size for group in groups) > MAX_BYTES:
                raise DataError(f"{file}: more than {MAX_BYTES >> 30} GiB of data; split it")
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        raise DataError(f"{file}: not a readable Parquet file ({first})") from None


def _hub(path: str) -> Iterator[tuple[int, object]]:
    name, _, split = path.removeprefix("hub:").partition(":")
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f'{path}: no such file, and reading it from the hub needs: pip install "ppomax[hub]"'
        ) from None
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise DataError(f"{path}: not to be had from the hub ({first})") from None
    yield from enumerate(table, start=1)
