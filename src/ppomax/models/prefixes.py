"""Texts as their distinct prefixes: a causal model's state of a token depends on nothing else.

What several texts of a batch begin with - a template's opening, a prompt to which there are two
replies - is then one row of every matrix product instead of many, and padding is none.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn


class Texts(NamedTuple):
    """How rows of tokens stand in texts that are as long as the longest, `batch` of them."""

    batch: int
    length: int
    places: Int[Tensor, " rows"] | None = None
    """Where each row stands first, text * length + position; None: each place is a row."""
    counts: Int[Tensor, " rows"] | None = None
    """In how many texts, one after the other, it stands."""
    lengths: Int[Tensor, " batch"] | None = None
    """Positions of each text that are rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefixes:
    """A batch of texts, each distinct prefix of which is a row."""

    ids: Int[Tensor, " rows"]
    """The last token of each."""
    positions: Int[Tensor, " rows"]
    """Where that stands."""
    texts: Texts
    """Sorted, so that those which begin alike stand together."""
    rows: Int[Tensor, "batch length"]
    """Of each token of the batch as it was given; beyond a text's length any."""


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Whose states a caller reads, of texts as their distinct prefixes."""

    prefixes: Prefixes
    rows: Int[Tensor, " read"]
    """Prefixes whose states are read, each once."""
    last: nn.Module
    """The block that heeds that: what others make of a token, later ones read."""

    @property
    def inputs(self) -> dict[str, Any]:
        """For a backbone's forward: as one text, with a mask that nobody reads.

        Masks of four dimensions `transformers` hands on to blocks as they are.
        """
        return {
            "position_ids": self.prefixes.positions[None],
            "attention_mask": torch.empty(1, 1, 1, 1),
            "reading": self,
        }


def prefixes_of(input_ids: Int[Tensor, "batch length"], lengths: Int[Tensor, " batch"]) -> Prefixes:
    """The distinct prefixes of the first `lengths` tokens of each row, a pure function of both.

    The last few are remembered: policy, reference and critic read a batch one after the other.

    Raises:
        ValueError: a length is longer than the rows, or all are 0.
    """
    spans = tuple(lengths.tolist())
    if min(spans) < 0 or not 0 < max(spans) <= input_ids.shape[1]:
        raise ValueError(f"texts of {spans} tokens do not fit rows of {input_ids.shape[1]}")
    ids = input_ids.to("cpu", torch.int64).contiguous()
    return _prefixes_of(ids.numpy().tobytes(), ids.shape[1], spans)


@lru_cache(maxsize=4)
@torch.inference_mode(mode=False)  # training may be next to read them
def _prefixes_of(key: bytes, length: int, spans: tuple[int, ...]) -> Prefixes:
    given = torch.frombuffer(bytearray(key), dtype=torch.int64).view(-1, length)
    texts = [row[:span] for row, span in zip(given.tolist(), spans, strict=True)]
    order = torch.tensor(sorted(range(len(texts)), key=texts.__getitem__))
    ids, lengths = given[order], torch.tensor(spans)[order]
    there = torch.arange(length) < lengths[:, None]
    same = (ids[1:] == ids[:-1]) & there[1:] & there[:-1]
    repeated = F.pad(same.cumprod(1).bool(), (0, 0, 1, 0))  # begins as the text before it
    places = (there & ~repeated).flatten().nonzero().flatten()
    rows = torch.zeros_like(ids).flatten()
    rows[places] = torch.arange(len(places))
    rows = rows.view_as(ids).cummax(0).values  # what is repeated is the row last seen above it
    counts = torch.bincount(rows[there], minlength=len(places))
    as_given = torch.empty_like(rows)
    as_given[order] = rows
    laid = Texts(len(texts), length, places, counts, lengths)
    return Prefixes(ids.flatten()[places], places % length, laid, as_given)
