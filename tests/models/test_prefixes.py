"""Texts as their distinct prefixes, and heads of those in every text that has them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.models.kernels import HeadNorms, Turns, kernels_for
from ppomax.models.prefixes import Texts, prefixes_of

HEADS, KV_HEADS, DIM = 4, 2, 6
batches = st.integers(1, 6).flatmap(
    lambda length: st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=length, max_size=length), st.integers(0, length)
        ),
        min_size=1,
        max_size=6,
    ).filter(lambda rows: any(span for _, span in rows))
)
"""Texts and how many tokens of each are read."""


def of(batch):
    ids, lengths = (torch.tensor(part) for part in zip(*batch, strict=True))
    return ids, prefixes_of(ids, lengths)


@given(batches)
def test_each_distinct_prefix_is_one_row(batch):
    ids, found = of(batch)
    every = [
        (text, place, tuple(row[: place + 1]))
        for text, (row, length) in enumerate(batch)
        for place in range(length)
    ]
    row_of = {}
    for text, place, prefix in every:
        row = int(found.rows[text, place])
        assert row_of.setdefault(prefix, row) == row
        assert (int(found.ids[row]), int(found.positions[row])) == (prefix[-1], place)
    assert sorted(row_of.values()) == list(range(len(found.ids)))
    assert len(set(row_of.values())) == len(row_of)
    for row, count in enumerate(found.texts.counts.tolist()):
        assert count == sum(row_of[prefix] == row for *_, prefix in every)
    assert found.texts[:2] == tuple(ids.shape)


@given(batches)
def test_sorted_texts_are_read_back_from_places_and_counts(batch):
    ids, found = of(batch)
    texts = found.texts
    read = torch.full((len(ids), ids.shape[1]), -1)
    for token, place, count in zip(found.ids, texts.places, texts.counts, strict=True):
        text, at = divmod(int(place), ids.shape[1])
        assert (read[text : text + count, at] == -1).all()
        read[text : text + count, at] = token
    inside = torch.arange(ids.shape[1]) < texts.lengths[:, None]
    assert ((read != -1) == inside).all()
    wanted = sorted(row[:length] for row, length in batch)
    assert [r[:n].tolist() for r, n in zip(read, texts.lengths, strict=True)] == wanted


@pytest.mark.parametrize("lengths", [[0, 0], [3, 5], [-1, 2]])
def test_lengths_that_are_none_are_refused(lengths):
    with pytest.raises(ValueError, match="do not fit rows of 4"):
        prefixes_of(torch.zeros(2, 4, dtype=torch.long), torch.tensor(lengths))


def test_what_is_remembered_is_of_these_ids_and_lengths():
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    for _ in range(2):
        assert len(prefixes_of(ids, torch.tensor([3, 3])).ids) == 4
        assert len(prefixes_of(ids.int(), torch.tensor([3, 2])).ids) == 3
        assert len(prefixes_of(ids.view(3, 2), torch.tensor([2, 2, 2])).ids) == 6
        ids = ids.clone()


def test_texts_that_share_nothing_are_all_their_tokens():
    ids = torch.arange(12).view(3, 4)
    found = prefixes_of(ids, torch.tensor([4, 4, 4]))
    assert torch.equal(found.ids, ids.flatten())
    assert torch.equal(found.rows.flatten(), torch.arange(12))


pytest_kernels = pytest.mark.skipif(
    kernels_for(torch.float32) is None, reason="no compiled kernels: no C++ compiler"
)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest_kernels
@settings(deadline=None, max_examples=40)
@given(batch=batches, normed=st.booleans())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_prefixes_are_those_of_whole_texts(dtype, batch, normed):
    """Split into every text that has them, and the way back the sum over those."""
    ids, found = of(batch)
    count, length = ids.shape
    kernels, rows, texts = kernels_for(dtype), len(found.ids), found.texts
    qkv = 2 * randn(rows, (HEADS + 2 * KV_HEADS) * DIM, dtype=dtype)
    table = randn(2, length, DIM, seed=1)
    norms = HeadNorms(randn(DIM, seed=2), randn(DIM, seed=3), 1e-5) if normed else HeadNorms()
    inside = torch.arange(length) < texts.lengths[:, None]
    owner = torch.zeros(count, length, dtype=torch.long)
    for row, (place, times) in enumerate(zip(texts.places, texts.counts, strict=True)):
        owner[place // length : place // length + times, place % length] = row
    spread = qkv[owner.flatten()] if rows else qkv.new_zeros(count * length, qkv.shape[1])
    whole, turns = Texts(count, length), Turns(*table)
    some = Turns(*table[:, found.positions].contiguous())
    apart = kernels.split_heads(spread, turns, norms, whole, HEADS, KV_HEADS)
    split = kernels.split_heads(qkv, some, norms, texts, HEADS, KV_HEADS)
    for one, two in zip(split, apart, strict=True):
        assert torch.equal(one, torch.where(inside[:, None, :, None], two, 0))
    slopes = [randn(*each.shape, seed=5, dtype=dtype) for each in split]
    first = torch.zeros(count * length, dtype=torch.bool)
    first[texts.places] = True
    slopes[0] *= first.view(count, 1, length, 1)  # of a query the first place alone is read
    slopes = [torch.where(inside[:, None, :, None], slope, 0) for slope in slopes]
    joined, to_norms = kernels.join_heads(*slopes, qkv, some, norms, texts)
    exact, others = kernels.join_heads(*slopes, spread, turns, norms, whole)
    wanted = torch.zeros(rows, qkv.shape[1], dtype=torch.double)
    wanted.index_add_(0, owner.flatten(), exact.double())
    rtol = 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(joined.double(), wanted, rtol=rtol, atol=rtol)
    if normed:
        torch.testing.assert_close(to_norms, others, rtol=rtol, atol=20 * rtol)


@pytest_kernels
@settings(deadline=None, max_examples=30)
@given(batch=batches, plain=st.booleans())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_side_by_side_and_back(dtype, batch, plain):
    ids, found = of(batch)
    count, length = ids.shape
    texts = Texts(count, length) if plain else found.texts
    heads = randn(count, HEADS, length, DIM, dtype=dtype)
    every = heads.transpose(1, 2).reshape(count * length, -1)
    rows = kernels_for(dtype).gather_heads(heads, texts.places)
    assert torch.equal(rows, every if plain else every[texts.places])
    back = kernels_for(dtype).scatter_heads(rows, texts, DIM, texts.places)
    wanted = torch.zeros_like(every)
    wanted[slice(None) if plain else texts.places] = rows
    assert torch.equal(back, wanted.view(count, length, HEADS, DIM).transpose(1, 2))
