"""Rows that parse and still cannot be used: too long, refused by the template, equal as ids."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ppomax.data.raw import BadRow, count_kinds
from ppomax.data.sources import Loaded, Row
from ppomax.data.turns import Defect
from ppomax.errors import DataError, ModelError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limit:
    """What a row has to fit."""

    setting: str
    tokens: int
    what: str
    """One row's name in messages."""


def fit_row(
    row: Row, encode: Callable[[Row], T | None], limit: Limit, bad: list[BadRow]
) -> T | None:
    """The row encoded; None where it cannot be, which is added to `bad`.

    Args:
        encode: None where it does not fit; may raise `Defect`, or `ModelError` where the chat
            template refuses the dialogue.
    """
    try:
        item = encode(row)
    except Defect as defect:
        bad.append(BadRow(row.where, defect.kind, defect.reason))
        return None
    except ModelError as error:
        bad.append(BadRow(row.where, "template", str(error)))
        return None
    if item is None:
        bad.append(BadRow(row.where, "too-long", f"does not fit {limit.setting} {limit.tokens}"))
    return item


def check_fitting(
    loaded: Loaded[Row], bad: list[BadRow], max_bad_rows: float, limit: Limit, *, some: bool
) -> None:
    """Hold all that cannot be used against what may be, each line once (a list has many pairs).

    Args:
        some: whether any row fits.

    Raises:
        DataError: none does, or too few.
    """
    lost = {row.where for row in bad}
    total = len(lost | {row.where for row in loaded.rows})
    if some and len(lost) <= max_bad_rows * total:
        return
    other = next((row for row in bad if row.kind in ("template", "identical-pair")), None)
    if not some and other is None:
        raise DataError(
            f"setting {limit.setting}: no {limit.what} fits {limit.tokens} tokens; raise it"
        )
    text = f"{len(lost)} of {total} rows cannot be used ({count_kinds(bad)})"
    if some:
        text += (
            f", more than max_bad_rows = {max_bad_rows:.1%}; raise {limit.setting} "
            f"({limit.tokens}) or max_bad_rows"
        )
    raise DataError(text + (f"; {other.where}: {other.reason}" if other is not None else ""))
