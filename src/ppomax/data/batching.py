"""Batches by token budget, and orders that are pure functions of (seed, epoch)."""

import hashlib
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

OVERHEAD = 16
"""A micro-batch counts, beside its tokens, as one part in so many of its budget (measured, see
docs/LOG.md): cutting a batch once more has to save more padding than that."""


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from a few numbers and names; equal parts give equal seeds on any machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permutation(count: int, *parts: int | str) -> list[int]:
    """A permutation of `count` places, a pure function of its arguments."""
    order = list(range(count))
    random.Random(derived_seed(*parts)).shuffle(order)
    return order


def plan_micro_batches(
    lengths: Sequence[int], max_tokens: int, at_least: int = 1
) -> list[list[int]]:
    """Cut sequences into micro-batches of at most `max_tokens` padded tokens, longest first.

    The plan is a pure function of its arguments. Sorted by length and cut where the padded tokens
    are fewest, a micro-batch itself counted as `max_tokens / OVERHEAD` of them. A sequence longer
    than the budget stands alone.

    Args:
        at_least: smallest number of micro-batches, where there are as many sequences (one per
            rank); where they can be cut further, their number is a multiple of it.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    widths = np.array([lengths[index] for index in order], dtype=np.int64)
    most = -(-len(order) // max(1, at_least))
    ends = _cheapest_cuts(widths, max_tokens, most, max_tokens // OVERHEAD)
    while len(ends) % at_least and len(ends) < len(order):
        _halve_largest(ends, widths)
    return [order[start:end] for start, end in pairwise([0, *ends])]


def _cheapest_cuts(widths: np.ndarray, max_tokens: int, most: int, overhead: int) -> list[int]:
    """Ends of the micro-batches of least cost, by dynamic programming over the sorted widths."""
    count = len(widths)
    cost = np.zeros(count + 1, dtype=np.int64)
    begin = np.zeros(count + 1, dtype=np.int64)
    first = 0  # earliest begin of a micro-batch that ends here and fits
    for end in range(1, count + 1):
        while end - first > 1 and (
            end - first > most or (end - first) * widths[first] > max_tokens
        ):
            first += 1
        starts = np.arange(first, end)
        costs = cost[first:end] + (end - starts) * widths[first:end] + overhead
        best = int(costs.argmin())  # of equals the longest micro-batch
        cost[end], begin[end] = costs[best], first + best
    ends: list[int] = []
    while count:
        ends.insert(0, count)
        count = int(begin[count])
    return ends


def _halve_largest(ends: list[int], widths: np.ndarray) -> None:
    """Cut the micro-batch of most padded tokens that holds two sequences."""
    spans = [(start, end) for start, end in pairwise([0, *ends]) if end - start > 1]
    start, end = max(spans, key=lambda span: (span[1] - span[0]) * widths[span[0]])
    ends.insert(ends.index(end), (start + end + 1) // 2)


def token_batches(
    order: Sequence[int],
    lengths: Sequence[int],
    batch_tokens: int,
    *,
    least: int = 1,
    most: int | None = None,
    together: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Runs of `order` of about `batch_tokens` tokens: the paper's dynamic batch.

    Zheng et al. 2023, §4: batches balanced by token count, between `least` and `most` items.

    Args:
        together: a label of each item; items of one label are in one batch, at the place of the
            first. More of them than `most` are a batch of their own. Where `order` repeats an item,
            its first places go together, then its second ones.
    """
    batches: list[list[list[int]]] = [[]]
    tokens = items = 0
    for unit in _units(order, together):
        more = sum(lengths[index] for index in unit)
        full = tokens + more > batch_tokens and items >= least
        if batches[-1] and (full or (most is not None and items + len(unit) > most)):
            batches.append([])
            tokens = items = 0
        batches[-1].append(unit)
        tokens, items = tokens + more, items + len(unit)
    _fill_last(batches, least, most)
    return [[index for unit in batch for index in unit] for batch in batches if batch]


def _units(order: Sequence[int], together: Sequence[Hashable] | None) -> list[list[int]]:
    """What stays in one batch, in order."""
    if together is None:
        return [[index] for index in order]
    units: dict[Hashable, list[int]] = {}
    seen: Counter[int] = Counter()
    for index in order:
        units.setdefault((together[index], seen[index]), []).append(index)
        seen[index] += 1
    return list(units.values())


def _fill_last(batches: list[list[list[int]]], least: int, most: int | None) -> None:
    """A last batch of fewer than `least` items joins the one before, or takes some of its."""

    def size(batch: list[list[int]]) -> int:
        return sum(map(len, batch))

    if len(batches) < 2 or size(batches[-1]) >= least:
        return
    before, last = batches[-2:]
    if most is None or size(before) + size(last) <= most:
        batches[-2:] = [before + last]
        return
    while size(last) < least <= size(before) - len(before[-1]):
        last.insert(0, before.pop())


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded sequences and which tokens are targets."""

    input_ids: Int[Tensor, "batch sequence"]
    targets: Bool[Tensor, "batch sequence"]
    lengths: Int[Tensor, " batch"]

    @property
    def num_targets(self) -> int:
        """Target tokens in the batch."""
        return int(self.targets.sum())


def collate(
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]], pad_id: int, device: torch.device
) -> TokenBatch:
    """Right-pad (ids, target mask) rows; masks come from lengths, never from ids.

    Raises:
        ValueError: a row's mask is not as long as its ids.
    """
    if any(len(ids) != len(mask) for ids, mask in rows):
        raise ValueError("a row has not as many marks as ids")
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.full(inside.shape, pad_id)
    input_ids[inside] = _flat([ids for ids, _ in rows], np.int64)
    targets = torch.zeros_like(inside)
    targets[inside] = _flat([mask for _, mask in rows], np.bool_)
    return TokenBatch(input_ids.to(device), targets.to(device), lengths.to(device))


def _flat(rows: Iterable[Sequence[int]], kind: type[np.generic]) -> Tensor:
    """All rows, one after the other."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(rows), kind))
