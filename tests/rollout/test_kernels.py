import math
import shutil
import stat
from pathlib import Path

import pytest
import torch

from ppomax.models import compiled as loader
from ppomax.models.compiled import build, library
from ppomax.rollout import sampling
from ppomax.rollout.kernels import SOURCE, TILE, Kernels

FOUND = library(SOURCE)
compiled = pytest.mark.skipif(isinstance(FOUND, str), reason=f"no compiled kernels: {FOUND}")
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, dtype):
    """To a few roundings of float, or one of bf16."""
    torch.testing.assert_close(
        found.double(), expected, rtol=2e-6 if dtype == torch.float32 else 2**-8, atol=2e-6
    )


# --- each part against float64


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [1, 16, 37, 576])
@pytest.mark.parametrize("more", [False, True])
def test_norm_adds_in_place_and_normalises(dtype, rows, width, more):
    stream, weight = 3 * randn(rows, width), 1 + randn(width, seed=1)
    added = randn(rows, width, seed=2, dtype=dtype) if more else None
    total = stream.double() + (added.double() if more else 0)
    found = Kernels(FOUND, dtype).norm(stream, added, weight, EPS)
    expected = total / (total.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()
    assert found.dtype == dtype
    close(found, expected, dtype)
    torch.testing.assert_close(stream.double(), total, rtol=1e-6, atol=1e-6)


@compiled
def test_what_is_rounded_to_bfloat16_is_rounded_as_pytorch_does():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    exact = every.float()
    word = exact.view(torch.int32)
    odd = [(word + low).view(torch.float32) for low in (0x7FFF, 0x8000, 0x8001, 1)]
    weight = torch.cat([exact, *odd])
    ones = torch.ones(1, len(weight))  # their norm is 1 to the bit
    found = Kernels(FOUND, torch.bfloat16).norm(ones, None, weight, 0.0)[0]
    expected = weight.to(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    faint = weight.abs() < torch.finfo(torch.float32).tiny  # a processor may round them to 0
    assert ((found[faint] == 0) | (found[faint] == expected[faint])).all()
    kept = ~(expected.isnan() | faint)
    assert torch.equal(found[kept].view(torch.int16), expected[kept].view(torch.int16))


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_over_the_whole_range(dtype):
    gate = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([1e30, -1e30, 0.0])])
    gate, up = gate.to(dtype), randn(4004, seed=1, dtype=dtype)
    found = Kernels(FOUND, dtype).swiglu(torch.stack([torch.cat([gate, up])] * 3))
    silu = (gate.double() * torch.sigmoid(gate.double())).to(dtype)  # rounded, as in training
    close(found[2], silu.double() * up.double(), dtype)
    assert torch.equal(found[0], found[2])


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_none_stays_one(dtype):
    parts, nan = Kernels(FOUND, dtype), float("nan")
    assert parts.swiglu(torch.tensor([[nan, 1.0, 1.0, nan]]).to(dtype)).isnan().all()
    assert parts.norm(torch.tensor([[nan, 1.0]]), None, torch.ones(2), EPS).isnan().all()
    given = attention(dtype, 2, 2, 1, 16, [3, 0])
    given["qkv"][0, 0] = nan
    found = parts.attend(*given.values(), EPS).view(2, 2, 16)
    assert found[0, 0].isnan().all()
    assert found[0, 1].isfinite().all()
    assert found[1].isfinite().all()


def attention(dtype, slots, heads, kv_heads, dim, positions, normed=False, spread=1.0):
    """What `attend` takes; the cache holds more slots and positions than are used."""
    length = -(-(max(positions) + 1) // TILE) * TILE
    angles = torch.arange(length)[:, None, None] / 10 ** torch.linspace(0, 2, dim // 2)
    cos, sin = angles.cos(), angles.sin()
    return {
        "qkv": spread * randn(slots, (heads + 2 * kv_heads) * dim, dtype=dtype),
        "qk_norm": 1 + randn(heads + kv_heads, dim, seed=1) if normed else None,
        "turns": (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)),
        "positions": torch.tensor(positions),
        "slots": None,
        "keys": randn(slots + 1, kv_heads, dim, length, seed=2, dtype=dtype),
        "values": randn(slots + 1, kv_heads, length, dim, seed=3, dtype=dtype),
    }


def attended(qkv, qk_norm, turns, positions, slots, keys, values, heads):
    """The same in float64, slot by slot and head by head; rounds what the cache and products do."""
    dtype, (_, kv_heads, dim, _) = qkv.dtype, keys.shape
    keys, values = keys.clone(), values.clone()
    rows = []
    for row, at in enumerate(positions.tolist()):
        slot = row if slots is None else int(slots[row])
        parts = qkv[row].double().view(-1, dim)

        def turned(index, scale, parts=parts, at=at):
            x = parts[index]
            if qk_norm is not None:
                x = x / (x.square().mean() + EPS).sqrt() * qk_norm[index].double()
            pairs = torch.view_as_complex(torch.stack(x.chunk(2), -1))
            cos, sin = (turn[at, 0, dim // 2 :].double() for turn in turns)
            real = torch.view_as_real(pairs * torch.complex(cos, sin)).T.flatten()
            return (real * scale).to(dtype)

        for head in range(kv_heads):
            keys[slot, head, :, at] = turned(heads + head, 1.0)
            values[slot, head, at] = parts[heads + kv_heads + head].to(dtype)
        for index in range(heads):
            head = index // (heads // kv_heads)
            scores = turned(index, dim**-0.5).double() @ keys[slot, head, :, : at + 1].double()
            rows.append(scores.softmax(0) @ values[slot, head, : at + 1].double())
    return torch.stack(rows).view(len(positions), heads * dim), keys, values


def check(given, found, expected, keys, values):
    """What was read, and the cache, to a few roundings of the compute dtype."""
    exact = found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-5 if exact else 2**-7, atol=1e-5 if exact else 2**-8
    )
    torch.testing.assert_close(given["keys"], keys, rtol=1e-6 if exact else 2**-7, atol=1e-6)
    assert torch.equal(given["values"], values)


SHAPES = [(9, 3, 64), (4, 4, 16), (8, 2, 80), (4, 2, 12), (10, 2, 128), (8, 1, 8), (2, 1, 96)]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("normed", [False, True])
def test_attention_is_that_of_float64_and_fills_the_cache(dtype, heads, kv_heads, dim, normed):
    positions = [0, 1, 15, 31, 32, 70]
    given = attention(dtype, len(positions), heads, kv_heads, dim, positions, normed)
    expected = attended(**given, heads=heads)
    check(given, Kernels(FOUND, dtype).attend(*given.values(), EPS), *expected)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_texts_are_read_into_any_slots_each_token_seeing_those_before_it(dtype):
    lengths, homes = [70, 33, 1, 32], [2, 0, 3, 1]
    positions = [at for length in lengths for at in range(length)]
    given = attention(dtype, len(positions), 6, 2, 24, positions)
    given["keys"], given["values"] = given["keys"][:4].clone(), given["values"][:4].clone()
    given["slots"] = torch.tensor(homes).repeat_interleave(torch.tensor(lengths))
    expected = attended(**given, heads=6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)  # tokens of one text are of several threads
        found = Kernels(FOUND, dtype).attend(*given.values(), EPS)
    finally:
        torch.set_num_threads(threads)
    check(given, found, *expected)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_leave_no_infinity(dtype):
    given = attention(dtype, 3, 4, 2, 64, [40, 63, 2], spread=60.0)
    given["keys"] *= 60
    expected, _, _ = attended(**given, heads=4)
    found = Kernels(FOUND, dtype).attend(*given.values(), EPS)
    torch.testing.assert_close(
        found.double(), expected, rtol=2e-3 if dtype == torch.float32 else 2**-7, atol=4e-3
    )


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slot_never_depends_on_others_nor_on_threads_nor_on_what_lies_beyond(dtype):
    positions = [5, 40, 17, 63]
    given = attention(dtype, 4, 6, 2, 64, positions)
    parts, threads = Kernels(FOUND, dtype), torch.get_num_threads()
    whole = parts.attend(*given.values(), EPS)
    for slot, at in enumerate(positions):
        one = {
            name: given[name][slot : slot + 1].clone()
            for name in ("qkv", "positions", "keys", "values")
        }
        one["keys"][..., at + 1 :] = 1e4
        one["values"][:, :, at + 1 :] = -1e4
        alone = parts.attend(*(given | one).values(), EPS)
        assert torch.equal(alone[0], whole[slot])
    try:
        torch.set_num_threads(3)
        assert torch.equal(parts.attend(*given.values(), EPS), whole)
    finally:
        torch.set_num_threads(threads)


# --- products and the search of a vocabulary


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 8, 9, 16, 31, 70])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (64, 48), (130, 49), (32, 300)])
@pytest.mark.parametrize("offset", [False, True])
def test_a_product_is_that_of_float64(dtype, rows, inputs, outputs, offset):
    parts = Kernels(FOUND, dtype)
    x, weight = randn(rows, inputs, dtype=dtype), randn(outputs, inputs, seed=1, dtype=dtype)
    bias = randn(outputs, seed=2, dtype=dtype) if offset else None
    packed = parts.pack([weight])
    if packed is None:
        pytest.skip(f"this processor has no product in {dtype} of its own")
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    exact = dtype == torch.float32
    torch.testing.assert_close(
        parts.product(outputs, x, packed, bias).double(),
        expected,
        rtol=1e-5 if exact else 2**-8,
        atol=1e-4,
    )


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_a_products_numbers_in_fp32(dtype):
    parts = Kernels(FOUND, dtype)
    x, packed = randn(9, 64, dtype=dtype), parts.pack([randn(100, 64, seed=1, dtype=dtype)])
    if packed is None:
        pytest.skip(f"this processor has no product in {dtype} of its own")
    logits = parts.logits(100, x, packed, None)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, parts.product(100, x, packed, None).float())


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_is_the_same_to_the_bit_beside_any_others(dtype):
    parts = Kernels(FOUND, dtype)
    x, packed = randn(40, 64, dtype=dtype), parts.pack([randn(100, 64, seed=1, dtype=dtype)])
    if packed is None:
        pytest.skip(f"this processor has no product in {dtype} of its own")
    whole = parts.product(100, x, packed, None)
    for rows in (slice(1), slice(3, 8), slice(5, 22), slice(39, 40)):
        assert torch.equal(parts.product(100, x[rows], packed, None), whole[rows])


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 17, 33, 64])
def test_products_of_ours_and_of_pytorch_take_turns_in_every_thread(dtype, rows):
    """Where a processor has tiles, both set them up and think they know how they are."""
    parts = Kernels(FOUND, dtype)
    x, weight = randn(rows, 96, dtype=dtype), randn(160, 96, seed=1, dtype=dtype)
    packed = parts.pack([weight])
    if packed is None:
        pytest.skip(f"this processor has no product in {dtype} of its own")
    others = x @ weight.T, weight @ x.T
    ours = parts.product(160, x, packed, None)
    for _ in range(3):
        assert torch.equal(x @ weight.T, others[0])
        assert torch.equal(parts.product(160, x, packed, None), ours)
        assert torch.equal(weight @ x.T, others[1])


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("inputs", [2, 64, 70, 200])
def test_matrices_are_packed_below_one_another_and_rounded_once(dtype, given, inputs):
    parts = Kernels(FOUND, dtype)
    if not parts.panel:
        pytest.skip(f"this processor has no product in {dtype} of its own")
    each = [randn(rows, inputs, seed=rows, dtype=given) for rows in (1, 50, 47, 130)]
    packed, depth = parts.pack(each), 1 if dtype == torch.float32 else 2
    whole = torch.cat(each).to(dtype)
    panels = -(-len(whole) // parts.panel)
    padded = -(-inputs // parts.step) * parts.step
    assert packed.shape == (panels, padded // depth, parts.panel, depth)
    laid = packed.transpose(1, 2).reshape(panels * parts.panel, padded)
    assert torch.equal(laid[: len(whole), :inputs], whole)
    assert not laid[len(whole) :].any()
    assert not laid[:, inputs:].any()
    assert torch.equal(parts.pack([each[3].T.contiguous().T]), parts.pack(each[3:]))


@compiled
def test_what_it_cannot_pack_is_left_to_others():
    if Kernels(FOUND, torch.bfloat16).panel:
        assert Kernels(FOUND, torch.bfloat16).pack([torch.ones(4, 3)]) is None
    assert Kernels(FOUND, torch.float32).pack([torch.ones(4, 3)]) is not None


@compiled
@pytest.mark.parametrize("vocab", [5, 64, 300, 4099, 49152])
@pytest.mark.parametrize("count", [1, 5, 256])
def test_the_most_likely_are_those_of_a_whole_sort(vocab, count):
    count = min(count, vocab)
    logits = 4 * randn(5, vocab)
    logits[1] = logits[1].bfloat16().float()  # equals
    logits[2] = 1.0
    logits[3, ::2] = float("-inf")
    values, ids, normaliser = Kernels(FOUND, torch.float32).most_likely(logits, count)
    expected, places = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :count])
    assert torch.equal(ids, places[:, :count])
    torch.testing.assert_close(
        normaliser.double(), logits.double().logsumexp(1), rtol=1e-6, atol=2e-6
    )


@compiled
@pytest.mark.parametrize("vocab", [1, 5, 300, 512, 513, 4099, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_a_compiled_draw_is_that_of_pytorchs_operations(vocab, temperature):
    rows = 300 if vocab < 10_000 else 60
    spread = 16 * torch.linspace(0, 1, rows)[:, None] ** 2  # from nearly all tail to none
    logits = spread * randn(rows, vocab)
    logits[1, 1::2] = float("-inf")
    logits[2:12] += 8192  # where a float has three digits behind the point
    seeds, steps = torch.arange(rows) * 0x9E3779B97F4A7 + 2**62, torch.arange(rows) % 50
    params = sampling.SamplingParams(temperature=temperature)
    parts = Kernels(FOUND, torch.float32)
    tools = sampling.Tools(parts.most_likely)  # which of equals it takes
    expected = sampling.sample(logits, seeds, steps, params, tools=tools)
    count = sampling.candidates_of_all(vocab)
    found = parts.draw_plain(logits, seeds, steps, temperature, count)
    assert torch.equal(found.tokens, expected.tokens)
    far = torch.tensor([2 <= row < 12 for row in range(rows)])
    for some, within in ((~far, 1e-5), (far, 2e-3)):
        torch.testing.assert_close(
            found.logprobs[some], expected.logprobs[some], rtol=0, atol=within
        )
    if vocab > 4000:
        among = logits.topk(sampling.CANDIDATES).indices
        beyond = (among != found.tokens[:, None]).all(1)
        assert 5 < int(beyond.sum()) < rows - 5, "of the tail, and of the most likely"


RARE = [25044495, 7610959, 26275011, 11802274, 3241721, 25189112, 27237174, 20241730, 26527441]
"""Seeds whose tail has noise above 15, once in 3,000,000."""


@compiled
@pytest.mark.parametrize("mass", [1e-5, 1e-6, 3e-7, 1e-7])
def test_a_tail_of_next_to_no_mass_is_drawn_where_its_noise_is_large(mass):
    vocab, count, beyond = 8192, sampling.CANDIDATES, 0
    seeds, steps = torch.tensor(RARE), torch.zeros(len(RARE), dtype=torch.long)
    parts, params = Kernels(FOUND, torch.float32), sampling.SamplingParams()
    for case in range(16):  # a sum of candidates may round to more than that of all
        row = randn(vocab, seed=case)
        row[:count] = 20 + randn(count, seed=100 + case).clamp(-3)  # the candidates
        inside, tail = (part.double().logsumexp(0) for part in (row[:count], row[count:]))
        row[count:] += float(inside - tail) + math.log(mass)
        logits = row.repeat(len(RARE), 1)
        found = parts.draw_plain(logits, seeds, steps, 1.0, count)
        expected = sampling.sample(logits, seeds, steps, params)
        assert torch.equal(found.tokens, expected.tokens)
        beyond += int((found.tokens >= count).sum())
    assert beyond


@compiled
@pytest.mark.parametrize("vocab", [300, 4096])
def test_a_compiled_draw_of_what_is_no_number_is_a_token(vocab):
    logits = randn(3, vocab)
    logits[0, 7], logits[1] = float("nan"), float("nan")
    seeds = torch.arange(3)
    count = sampling.candidates_of_all(vocab)
    draw = Kernels(FOUND, torch.float32).draw_plain(logits, seeds, seeds, 1.0, count)
    assert draw.logprobs.isnan().tolist() == [True, True, False]
    assert ((draw.tokens >= 0) & (draw.tokens < vocab)).all()


@compiled
def test_a_long_tail_counts_beside_a_token_that_is_nearly_certain():
    logits = torch.full((2, 151_936), -16.8)
    logits[0, 0] = logits[1, 77_777] = 0.0
    _, _, normaliser = Kernels(FOUND, torch.float32).most_likely(logits, 256)
    torch.testing.assert_close(normaliser.double(), logits.double().logsumexp(1), rtol=0, atol=2e-6)


@compiled
def test_what_lies_in_pieces_or_does_not_fit_is_refused():
    parts = Kernels(FOUND, torch.float32)
    with pytest.raises(ValueError, match="one piece"):
        parts.swiglu(randn(8, 6).T)
    given = attention(torch.float32, 2, 2, 1, 16, [3, 0])
    given["keys"] = given["keys"][..., :30].contiguous()
    with pytest.raises(ValueError, match="30 positions"):
        parts.attend(*given.values(), EPS)


@compiled
def test_the_search_survives_what_is_no_number():
    logits = randn(3, 4096)
    logits[0, 7], logits[1] = float("nan"), float("nan")
    values, ids, normaliser = Kernels(FOUND, torch.float32).most_likely(logits, 256)
    assert normaliser.isnan().tolist() == [True, True, False]
    assert ids[0, 0] == 7
    assert values[0, 0].isnan()
    assert all(len(set(row)) == 256 for row in ids.tolist())
    assert ((ids >= 0) & (ids < 4096)).all()


# --- where they cannot be built


@pytest.fixture
def anew():
    """`library` looks again, and forgets after the test what it found."""
    library.cache_clear()
    yield
    library.cache_clear()


def test_a_compiler_that_fails_is_named_with_its_first_line(anew, monkeypatch, tmp_path):
    broken = tmp_path / "broken++"
    broken.write_text("#!/bin/sh\necho 'In a file:' >&2\necho 'error: no such flag' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    said = library(SOURCE)
    assert str(broken) in said
    assert said.endswith("no such flag")


@compiled
def test_a_folder_that_cannot_be_written_is_no_error(anew, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PPOMAX_CACHE", str(tmp_path / "file"))
    assert "does not build them" in library(SOURCE)


@pytest.mark.slow
@compiled
def test_a_library_that_is_broken_is_no_error(anew, monkeypatch, tmp_path):
    monkeypatch.setenv("PPOMAX_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compiler = next(filter(None, map(shutil.which, loader.COMPILERS)))
    built = build(compiler, SOURCE, tmp_path / "kernels")
    broken = tmp_path / "broken"
    broken.write_bytes(b"broken")
    broken.replace(built)
    assert "cannot be loaded" in library(SOURCE)


@pytest.mark.slow
@compiled
def test_they_are_built_once_for_a_source_and_nothing_else_is_left(monkeypatch, tmp_path):
    compiler = next(filter(None, map(shutil.which, loader.COMPILERS)))
    first = build(compiler, SOURCE, tmp_path)
    when = first.stat().st_mtime_ns
    assert build(compiler, SOURCE, tmp_path) == first
    assert first.stat().st_mtime_ns == when
    assert list(tmp_path.iterdir()) == [first]
    other = tmp_path / "other.cpp"
    other.write_text(SOURCE.read_text() + "\n")

    def no_links(self, target):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    second = build(compiler, other, tmp_path)
    assert second != first
    assert second.exists()
