"""The matrix products of training, in tiles and without."""

import ctypes
import math
import mmap
import sys
from pathlib import Path

import pytest
import torch

from ppomax.models import products
from ppomax.models.compiled import library
from ppomax.models.products import FEWEST, KEPT, MOST, SOURCE, tiles_for
from ppomax.models.rooms import Rooms

TILES = tiles_for(torch.bfloat16) is not None
tiles = pytest.mark.skipif(not TILES, reason="this processor multiplies no tiles")
KINDS = [torch.float32, torch.bfloat16]
SHAPES = [
    # tokens, inputs, outputs of each matrix
    (FEWEST, 32, (32,)),
    (33, 1, (1,)),
    (65, 33, (31,)),
    (97, 16, (17,)),
    (100, 70, (130,)),
    (150, 576, (192, 64, 64)),
    (64, 40, (5, 33)),
    (40, 64, (1, 1, 1)),
    (79, 1100, (700,)),  # in several sweeps
    (1030, 96, (48, 48)),
]


def randn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, dtype=torch.bfloat16):
    """Right but for one rounding to the dtype, and the sums' own."""
    unit = 2**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(
        found.double(), expected, rtol=unit + 1e-6, atol=2e-6 * float(expected.abs().max())
    )


def all_three(tokens, inputs, outputs, kind, seed=0):
    """Products of a shape, and what they are in float64."""
    x = randn(tokens, inputs, seed=seed)
    gradient = randn(tokens, sum(outputs), seed=seed + 1)
    weights = [
        randn(count, inputs, seed=seed + 2 + i, dtype=kind) for i, count in enumerate(outputs)
    ]
    whole = torch.cat(weights).bfloat16().double()
    return [
        (products.forward(x, *weights), x.double() @ whole.T),
        (products.to_input(gradient, *weights), gradient.double() @ whole),
        (products.to_weight(gradient, x), gradient.double().T @ x.double()),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
def test_products_are_those_of_the_rounded_matrices(tokens, inputs, outputs, kind):
    forward, to_input, to_weight = all_three(tokens, inputs, outputs, kind)
    for found, expected in (forward, to_input):
        assert found.dtype == torch.bfloat16
        assert found.shape == expected.shape
        close(found, expected)
    assert to_weight[0].dtype == torch.float32
    close(*to_weight, torch.float32 if TILES else torch.bfloat16)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_thread_has_its_part(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = [each for each, _ in all_three(100, 300, (200, 90), torch.float32)]
        torch.set_num_threads(1)
        alone = [each for each, _ in all_three(100, 300, (200, 90), torch.float32)]
    finally:
        torch.set_num_threads(before)
    for some, one in zip(found, alone, strict=True):
        assert torch.equal(some, one) if TILES else torch.allclose(some, one, rtol=2**-7, atol=0.1)


@tiles
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_no_other_row(kind):
    x, weight = randn(200, 70), randn(90, 70, seed=1, dtype=kind)
    whole = products.forward(x, weight)
    assert torch.equal(products.forward(x[37:150].clone(), weight), whole[37:150])
    gradient = randn(200, 90, seed=2)
    back = products.to_input(gradient, weight)
    assert torch.equal(products.to_input(gradient[37:150].clone(), weight), back[37:150])


@tiles
@pytest.mark.parametrize("call", ["forward", "to_input", "to_weight"])
def test_what_is_no_number_stays_where_it_belongs(call):
    left, right = randn(70, 50), randn(70, 50, seed=1)
    left[41, 13] = math.nan
    if call == "to_weight":
        found = products.to_weight(left, right)
        assert found[13].isnan().all()
        assert found.isnan().sum() == found.shape[1]
    else:
        found = getattr(products, call)(left, right[:50])
        assert found[41].isnan().all()
        assert found.isnan().sum() == found.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_larger_matrix_is_written_and_nothing_beside_it(kind):
    whole = torch.full((96, 48), 7.0, dtype=kind)
    gradient, x = randn(64, 31), randn(64, 48, seed=1)
    products.to_weight(gradient, x, out=whole[33:64])
    close(whole[33:64], gradient.double().T @ x.double())
    assert (whole[:33] == 7).all()
    assert (whole[64:] == 7).all()
    out = torch.full((66, 31), 7.0, dtype=torch.bfloat16)
    products.forward(x, gradient[:31, :].new_ones(31, 48), out=out[1:65])
    close(out[1:65], x.double().sum(1, keepdim=True).expand(64, 31))
    assert (out[[0, 65]] == 7).all()


@tiles
@pytest.mark.parametrize("columns", [1, 5, 16, 17, 31, 32, 33, 48])
def test_gradients_that_do_not_begin_at_a_whole_cache_line(columns):
    room = torch.zeros(40 * columns + 8)
    for start in range(8):
        out = room[start : start + 40 * columns].view(40, columns)
        gradient, x = randn(50, 40, seed=start), randn(50, columns, seed=9)
        products.to_weight(gradient, x, out=out)
        close(out, gradient.double().T @ x.double(), torch.float32)


@pytest.mark.parametrize("turned", ["x", "weight", "gradient"])
def test_what_does_not_lie_in_one_piece_is_multiplied_too(turned):
    x, weight, gradient = randn(64, 40), randn(48, 40, seed=1), randn(64, 48, seed=2)
    given = {"x": x, "weight": weight, "gradient": gradient}
    given[turned] = given[turned].T.contiguous().T
    close(products.forward(given["x"], given["weight"]), x.double() @ weight.double().T)
    close(
        products.to_input(given["gradient"], given["weight"]), gradient.double() @ weight.double()
    )
    found = products.to_weight(given["gradient"], given["x"])
    assert found.dtype == torch.float32
    close(found, gradient.double().T @ x.double())


@pytest.mark.parametrize("mixed", [True, False])
def test_matrices_of_several_kinds_or_many(mixed):
    count = 2 if mixed else MOST + 1
    kinds = [torch.float32, torch.bfloat16] if mixed else [torch.float32] * count
    weights = [randn(20, 40, seed=i, dtype=kind) for i, kind in enumerate(kinds)]
    x, whole = randn(64, 40, seed=9), torch.cat([each.bfloat16() for each in weights]).double()
    close(products.forward(x, *weights), x.double() @ whole.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_pytorch_s(dtype):
    x, weight = randn(64, 40, dtype=dtype), randn(48, 40, seed=1, dtype=dtype)
    assert torch.equal(products.forward(x, weight), torch.mm(x, weight.T))
    gradient = randn(64, 48, seed=2, dtype=dtype)
    assert torch.equal(products.to_input(gradient, weight), torch.mm(gradient, weight))
    found = products.to_weight(gradient, x, out=torch.empty(48, 40, dtype=dtype))
    assert torch.equal(found, torch.mm(gradient.T, x))


@tiles
def test_pytorch_s_own_products_in_tiles_are_not_disturbed():
    a, b = randn(256, 256), randn(256, 256, seed=1)
    before = torch.mm(a, b)
    for tokens, inputs, outputs in SHAPES:
        all_three(tokens, inputs, outputs, torch.float32)
        assert torch.equal(torch.mm(a, b), before)


BAD = {
    "fewer inputs": lambda: products.forward(randn(64, 40), randn(8, 41)),
    "three dimensions": lambda: products.forward(randn(64, 2, 20), randn(8, 20)),
    "another out": lambda: products.forward(
        randn(64, 40), randn(8, 40), out=torch.empty(64, 8, dtype=torch.float64)
    ),
    "fewer outputs": lambda: products.to_input(randn(64, 40), randn(41, 50)),
    "one matrix wider": lambda: products.to_input(randn(64, 40), randn(20, 50), randn(20, 51)),
    "more tokens": lambda: products.to_weight(randn(64, 40), randn(65, 50)),
    "two dtypes": lambda: products.to_weight(randn(64, 40).float(), randn(64, 50)),
    "an out too small": lambda: products.to_weight(
        randn(64, 40), randn(64, 50), out=torch.empty(39, 50)
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_as_pytorch_refuses_it(name):
    with pytest.raises(RuntimeError):
        BAD[name]()


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(0, 40, 8), (64, 0, 8), (64, 40, 0)])
def test_nothing_times_something(tokens, inputs, outputs):
    for found, expected in all_three(tokens, inputs, [outputs], torch.float32):
        assert torch.equal(found.double(), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as Linux has it")
@pytest.mark.parametrize("inputs", [33, 40, 64])
def test_nothing_is_read_behind_a_matrix(inputs):
    x, weight = at_an_edge(randn(75, inputs)), at_an_edge(randn(45, inputs, dtype=torch.float32))
    gradient = at_an_edge(randn(75, 45))
    products.forward(x, weight)
    products.forward(x, at_an_edge(randn(45, inputs)))
    products.to_input(gradient, weight)
    products.to_weight(gradient, x)


def at_an_edge(matrix):
    """The same in memory behind which a read ends the process."""
    size = matrix.numel() * matrix.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    last = ctypes.c_void_p(start + whole)
    assert libc.mprotect(last, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    place = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=whole - size)
    return place.view(matrix.dtype).view(matrix.shape).copy_(matrix)


@tiles
def test_large_packed_sides_are_not_kept(monkeypatch):
    monkeypatch.setattr(products, "ROOMS", Rooms())
    products.forward(randn(64, 200), randn(300, 200))
    held = len(products.ROOMS.packed.held)
    assert 0 < held <= KEPT
    products.forward(randn(64, 600), randn(8000, 600))
    assert len(products.ROOMS.packed.held) == held


def test_tiles_are_used_where_the_processor_has_them():
    found = library(SOURCE)
    if isinstance(found, str) or not Path("/proc/cpuinfo").exists():
        pytest.skip("no compiled kernels, or nobody says what this processor has")
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert bool(found.may_use()) == TILES
    assert hasattr(found, "to_weight") <= ("amx_bf16" in told)
    if hasattr(found, "to_weight"):
        assert TILES
        gradient, x = randn(64, 40), randn(64, 50, seed=1)
        rounded = torch.mm(gradient.T, x).float()
        assert not torch.equal(products.to_weight(gradient, x), rounded)
