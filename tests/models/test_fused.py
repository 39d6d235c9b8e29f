"""Blocks that run as one operation, and the compiled passes they are made of."""

import copy
import ctypes
import pickle
import platform
import shutil
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ppomax.data.batching import collate
from ppomax.models import compiled, fused, reading
from ppomax.models.attention import use_grouped_attention
from ppomax.models.blocks import decoder_blocks
from ppomax.models.fused import is_fused, use_fused_blocks
from ppomax.models.heads import ScalarModel, hidden_states, states_of
from ppomax.models.kernels import SOURCE, HeadNorms, Kernels, Turns, kernels_for
from ppomax.models.language import LanguageModel, values_of_replies
from ppomax.models.lean import use_lean_blocks
from ppomax.models.lora import LoraSettings, add_lora
from ppomax.models.prefixes import Texts, prefixes_of
from ppomax.models.rooms import Rooms

pytestmark = pytest.mark.skipif(
    kernels_for(torch.float32) is None, reason="no compiled kernels: no C++ compiler"
)
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5
SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, dtype, scale=1.0):
    """To a few roundings of float, or one of bf16."""
    rtol = 4e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol * scale)


# --- each pass against float64's own gradients


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), rows=st.integers(1, 7), width=st.sampled_from([1, 7, 16, 33, 64]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_backward_is_the_gradient_of_a_stream_that_also_goes_around(dtype, seed, rows, width):
    x, weight = 2 * randn(rows, width, seed=seed), 1 + randn(width, seed=seed + 1)
    slope, around = (
        randn(rows, width, seed=seed + 2, dtype=dtype),
        randn(rows, width, seed=seed + 3),
    )
    exact = x.double().requires_grad_(), weight.double().requires_grad_()
    normed = exact[0] / (exact[0].square().mean(1, keepdim=True) + EPS).sqrt() * exact[1]
    loss = (normed * slope.double()).sum() + (exact[0] * around.double()).sum()
    to_x, to_weight = torch.autograd.grad(loss, exact)
    found, rounded, found_weight = kernels_for(dtype).norm_backward(x, weight, slope, around, EPS)
    torch.testing.assert_close(found.double(), to_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_weight.double(), to_weight, rtol=1e-4, atol=1e-4)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, found.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_without_a_sum_is_that_of_a_sum_with_nothing(dtype):
    x, weight = randn(5, 37), randn(37, seed=1)
    kernels = kernels_for(dtype)
    total, normed = kernels.add_and_norm(x, torch.zeros(5, 37, dtype=dtype), weight, EPS)
    assert torch.equal(total, x)
    assert torch.equal(normed, kernels.norm(x, weight, EPS))
    more = randn(5, 37, seed=2, dtype=dtype)
    total, normed = kernels.add_and_norm(x, more, weight, EPS)
    assert torch.equal(total, x + more)
    assert torch.equal(normed, kernels.norm(x + more, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 50])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_swiglu_and_its_gradient_are_those_of_the_formula(dtype, width, scale):
    both = (scale * randn(9, 2 * width)).to(dtype)
    slope = randn(9, width, seed=1, dtype=dtype)
    exact = both.double().requires_grad_()
    product = torch.nn.functional.silu(exact[:, :width]) * exact[:, width:]
    [wanted] = torch.autograd.grad(product, exact, slope.double())
    kernels = kernels_for(dtype)
    found, made = kernels.swiglu_backward(both, slope)
    # forward rounds silu(gate) once more, as transformers does
    loose = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), wanted, rtol=loose, atol=loose * scale**2)
    torch.testing.assert_close(made.double(), product.detach(), rtol=loose, atol=1e-6)
    assert torch.equal(made, kernels.swiglu(both))


def test_exponentials_are_as_near_as_is_said_and_the_same_in_and_beside_a_vector():
    gate = torch.linspace(-87, -1e-3, 4001).repeat_interleave(37).view(-1, 37)  # 32 and 5 beside
    found = kernels_for(torch.float32).swiglu(torch.cat([gate, torch.ones_like(gate)], 1))
    assert (found == found[:, :1]).all()
    x = gate[:, 0].double()
    error = (found[:, 0].double() / (x / (1 + (-x).exp())) - 1).abs()
    units = torch.finfo(torch.float32).eps * (3 + x.abs() / 2)  # without fused products
    assert (error < units).all()
    assert float(error[x > -1].max()) < 3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_at_the_ends_is_finite(dtype):
    gate = torch.tensor([[-1e4, -90.0, -87.5, 0.0, 88.0, 1e4] * 6]).to(dtype)
    both = torch.cat([gate, torch.ones_like(gate)], 1)
    kernels = kernels_for(dtype)
    made = kernels.swiglu(both)
    close(made, torch.nn.functional.silu(gate.double()), dtype)
    found, _ = kernels.swiglu_backward(both, torch.ones_like(gate))
    assert found.isfinite().all()
    assert float(found[0, 5]) == 1.0  # an open gate
    nan = kernels.swiglu(torch.full((1, 64), float("nan")).to(dtype))
    assert nan.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_split_normed_and_rotated_as_transformers_does_and_joined_back(
    dtype, own, normed
):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    batch, length, heads, kv_heads, dim = 3, 5, 4, 2, 6
    qkv = 2 * randn(batch * length, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angle = randn(batch if own else 1, length, dim, seed=1)
    sine = randn(*angle.shape, seed=2)  # halves that differ, too
    turns, texts = Turns(angle.cos().view(-1, dim), sine.view(-1, dim)), Texts(batch, length)
    norms = HeadNorms(1 + randn(dim, seed=3), 1 + randn(dim, seed=4), EPS)
    exact, weights = qkv.double().requires_grad_(), [norms.q.double(), norms.k.double()]
    apart = exact.view(batch, length, -1, dim).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
    q, k = apart[:2]
    if normed:
        scaled = [part / (part.square().mean(-1, True) + EPS).sqrt() for part in (q, k)]
        q, k = (x * weight.requires_grad_() for x, weight in zip(scaled, weights, strict=True))
    q, k = apply_rotary_pos_emb(q, k, angle.cos().double(), sine.double())
    wanted, norms = (q, k, apart[2]), norms if normed else HeadNorms()
    kernels = kernels_for(dtype)
    found = kernels.split_heads(qkv, turns, norms, texts, heads, kv_heads)
    slopes = [randn(*part.shape, seed=9 + i, dtype=dtype) for i, part in enumerate(wanted)]
    for one, two in zip(found, wanted, strict=True):
        close(one, two.detach(), dtype)
    to_qkv, to_norms = kernels.join_heads(*slopes, qkv, turns, norms, texts)
    asked = [exact, *weights] if normed else [exact]
    first, *others = torch.autograd.grad(wanted, asked, [slope.double() for slope in slopes])
    close(to_qkv, first, dtype)
    for one, two in zip(to_norms, others, strict=normed):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 16, 17, 40])
def test_causal_softmax_and_its_gradient_are_those_of_the_formula(dtype, length):
    scores = (4 * randn(3, 2 * length, length)).to(dtype)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1).repeat(2, 1)
    exact = scores.double().requires_grad_()
    wanted = torch.softmax(exact.masked_fill(hidden, -torch.inf), -1)
    kernels = kernels_for(dtype)
    shares = kernels.softmax_(scores.clone())
    close(shares, wanted.detach(), dtype)
    assert not shares[hidden.expand_as(shares)].any()
    slope = randn(*scores.shape, seed=1, dtype=dtype)
    kept = shares.double().requires_grad_()
    along = (kept * slope.double()).sum(-1, keepdim=True)
    to_scores = (0.3 * kept * (slope.double() - along)).detach()
    close(kernels.softmax_backward_(shares, slope.clone(), 0.3), to_scores, dtype)
    if dtype == torch.float32:
        [through] = torch.autograd.grad(wanted, exact, slope.double())
        torch.testing.assert_close(to_scores, 0.3 * through, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00101, 0x7FFFFFFF, -1])
def test_a_score_that_is_no_number_stays_in_its_row(bits):
    scores, nan = torch.zeros(1, 20, 20), torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    scores[0, 18, 3], scores[0, 5, 9] = nan, nan  # the second is not seen
    shares = kernels_for(torch.float32).softmax_(scores)
    assert shares[0, 18, :19].isnan().all()
    assert shares.isnan().any(-1).sum() == 1


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have no wide vectors")
@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_in_narrower_vectors_give_the_same(dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-mno-avx512f"))
    compiler = next(filter(None, map(shutil.which, compiled.COMPILERS)))
    narrow = Kernels(ctypes.CDLL(str(compiled.build(compiler, SOURCE, tmp_path))), dtype)
    rows, width = 5, 37
    x, weight, around = randn(rows, width), randn(width, seed=1), randn(rows, width, seed=2)
    slope, wide = randn(rows, width, seed=3, dtype=dtype), randn(rows, 2 * width, dtype=dtype)
    scores = randn(2, 3 * width, width, seed=4, dtype=dtype)
    qkv = randn(6, 4 * 22, seed=5, dtype=dtype)
    turns = Turns(randn(6, 22, seed=6), randn(6, 22, seed=7))
    texts = prefixes_of(torch.tensor([[1, 2, 4], [1, 2, 3]]), torch.tensor([3, 3])).texts
    texts = (Texts(2, 3), texts)
    norms = HeadNorms(randn(22, seed=8), randn(22, seed=9), EPS)
    logits, targets = randn(rows, width, seed=10, dtype=dtype), torch.arange(rows)

    def passes(kernels):
        for each, rows in zip(texts, (6, 4), strict=True):
            own, turned = qkv[:rows], Turns(turns.cos[:rows], turns.sin[:rows])
            q, k, v = kernels.split_heads(own, turned, norms, each, 2, 1)
            yield from (q, k, v, *kernels.join_heads(q, k, v, own, turned, norms, each))
        yield from (kernels.norm(x, weight, EPS), *kernels.add_and_norm(x, slope, weight, EPS))
        yield from kernels.norm_backward(x, weight, slope, around, EPS)
        yield from (kernels.swiglu(wide), *kernels.swiglu_backward(wide, slope))
        shares = kernels.softmax_(scores.clone())
        yield from (shares, kernels.softmax_backward_(shares, scores.clone(), 0.3))
        yield from kernels.logprobs([(0, logits)], targets, width, 0.7, entropy=True)

    for one, two in zip(passes(narrow), passes(kernels_for(dtype)), strict=True):
        torch.testing.assert_close(
            one, two, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )


# --- whole blocks


def make(name, seed=0):
    torch.manual_seed(seed)
    kind, config = FAMILIES[name]
    model = kind(copy.deepcopy(config))
    model.set_attn_implementation("sdpa")
    use_grouped_attention(model)
    use_lean_blocks(model)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    use_fused_blocks(model)
    return model.eval()


def result(model, ids, dtype, **given):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = hidden_states(model, ids, **given)
    slope = randn(*hidden.shape, seed=5)
    (hidden * slope).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), grads


def plainly(monkeypatch, *given, **more):
    """The same with the blocks as `transformers` and lean.py have them."""
    with monkeypatch.context() as patch:
        patch.setattr(fused, "kernels_for", lambda dtype: None)
        return result(*given, **more)


@pytest.fixture
def calls(monkeypatch):
    """One entry for each block that ran as one operation."""
    seen, original = [], fused._Block.forward

    def forward(ctx, *given):
        seen.append(given[0].kernels.dtype)
        return original(ctx, *given)

    monkeypatch.setattr(fused._Block, "forward", staticmethod(forward))
    return seen


def ids_of(batch=3, length=21):
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(1))


def alike():
    """Texts that begin alike, in pairs for longer, two of them to the end."""
    ids = ids_of(6)
    ids[:, :4] = ids[0, :4]
    ids[4, :13], ids[3] = ids[2, :13], ids[5]
    return ids


def apart(one, two):
    """Distance of all gradients, of the length of the second."""
    assert one.keys() == two.keys()
    gap = sum(float((one[name].double() - two[name].double()).square().sum()) for name in one)
    return (gap / sum(float(g.double().square().sum()) for g in two.values())) ** 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_computes_what_transformers_does_in_fp32(name, monkeypatch, calls):
    model, ids = make(name), ids_of()
    hidden, grads = result(model, ids, torch.float32)
    assert calls == [torch.float32] * 2
    wanted, others = plainly(monkeypatch, model, ids, torch.float32)
    assert len(calls) == 2
    torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)
    for key, other in others.items():
        torch.testing.assert_close(grads[key], other, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bf16_it_is_no_further_from_fp32_than_transformers(name, monkeypatch, calls):
    model, ids = make(name), ids_of()
    exact, exact_grads = result(model, ids, torch.float32)
    hidden, grads = result(model, ids, torch.bfloat16)
    assert calls == [torch.float32] * 2 + [torch.bfloat16] * 2
    other, other_grads = plainly(monkeypatch, model, ids, torch.bfloat16)
    assert hidden.dtype == torch.float32
    assert float((hidden - exact).norm()) < 1.15 * float((other - exact).norm())
    assert apart(grads, exact_grads) < 1.15 * apart(other_grads, exact_grads)
    assert all(grad.dtype == torch.float32 for grad in grads.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_text_s_numbers_do_not_hang_on_what_follows_it_or_stands_beside_it(dtype):
    model, ids = make("llama"), ids_of(2, 30)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        whole = hidden_states(model, ids)
        part = hidden_states(model, ids[:1, :12])
    # products of other sizes may add in another order
    loose = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(part, whole[:1, :12], rtol=loose, atol=loose)


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_bf16_weights_give_the_bits_of_their_fp32_masters(name, calls):
    model, ids = make(name), ids_of()
    model.bfloat16().float()
    frozen = copy.deepcopy(model).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hidden_states(model, ids), hidden_states(frozen, ids))
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_twice_is_the_same_to_the_bit(dtype):
    model, ids = make("llama"), ids_of()
    one, two = result(model, ids, dtype), result(model, ids, dtype)
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(one[1][key], two[1][key]) for key in one[1])


def test_sizes_dtypes_inference_and_threads_take_turns_in_the_rooms_of_scores(monkeypatch):
    monkeypatch.setattr(fused, "ROOMS", Rooms())
    model, long, short = make("llama"), ids_of(4, 40), ids_of(2, 9)
    with torch.inference_mode():
        hidden_states(model, long)
    for ids in (short, long, short):
        for dtype in (torch.float32, torch.bfloat16):
            found, grads = result(model, ids, dtype)
            monkeypatch.setattr(fused, "ROOMS", Rooms())
            alone, same = result(model, ids, dtype)
            assert torch.equal(found, alone)
            assert all(torch.equal(grads[key], same[key]) for key in grads)
    like, places = torch.empty(0), []

    def take():
        places.append(fused.ROOMS.shares.of(like, 3, 4))

    worker = threading.Thread(target=take)
    worker.start()
    worker.join()
    take()
    assert places[0].data_ptr() != places[1].data_ptr()


def test_frozen_weights_get_no_gradient_and_the_others_the_same(calls):
    model, ids = make("llama"), ids_of()
    _, whole = result(model, ids, torch.float32)
    frozen = ("layers.0", "k_proj", "embed", "lm_head")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in key for part in frozen))
    _, some = result(model, ids, torch.float32)
    assert len(calls) == 4
    assert {key for key, p in model.named_parameters() if p.requires_grad} == set(some)
    assert all(torch.equal(some[key], whole[key]) for key in some)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_weight_alone_may_be_frozen(name):
    model, ids = make(name), ids_of()
    _, whole = result(model, ids, torch.float32)
    for key, parameter in model.model.layers[1].named_parameters(prefix="model.layers.1"):
        parameter.requires_grad_(False)
        _, some = result(model, ids, torch.float32)
        parameter.requires_grad_(True)
        assert set(whole) - set(some) == {key}
        assert all(torch.equal(some[other], whole[other]) for other in some)


def test_a_cache_is_filled(calls):
    model, ids, cache = make("llama"), ids_of(), DynamicCache()
    with torch.no_grad():
        whole = hidden_states(model, ids)
        assert len(calls) == 2
        hidden_states(model, ids[:, :20], past=cache)
        last = hidden_states(model, ids[:, 20:], past=cache)
    assert len(calls) == 2
    torch.testing.assert_close(last, whole[:, 20:], rtol=1e-4, atol=1e-4)


def test_checkpointing_recomputes_the_same(calls):
    model, ids = make("llama"), ids_of()
    hidden, grads = result(model, ids, torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again, same = result(model, ids, torch.bfloat16)
    assert len(calls) == 2 + 2 * 2
    assert torch.equal(again, hidden)
    assert all(torch.equal(same[key], grads[key]) for key in grads)


def asked_for(monkeypatch, model, ids, dtype, asked, *, told):
    """States and gradients where only those of some tokens are read, and tokens of the last MLP."""
    rows, original = [], fused.Kernels.add_and_norm

    def watched(kernels, x, *given):
        rows.append(len(x))
        return original(kernels, x, *given)

    model.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(fused.Kernels, "add_and_norm", watched)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            lengths = torch.full((len(ids),), ids.shape[1])
            every = hidden_states if not told else states_of
            hidden = every(model, ids, *[asked, lengths] * told)
            hidden = hidden if told else hidden[asked]
        (hidden * randn(*hidden.shape, seed=5)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), grads, rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_block_goes_on_with_the_tokens_that_are_asked_for(
    name, dtype, checkpointing, monkeypatch
):
    model, ids = make(name), alike()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    asked = randn(*ids.shape, seed=3) > 0.5
    asked[1] = False  # a text of which nothing is read
    hidden, grads, rows = asked_for(monkeypatch, model, ids, dtype, asked, told=True)
    wanted, others, whole = asked_for(monkeypatch, model, ids, dtype, asked, told=False)
    read = [tuple(ids[at, : place + 1].tolist()) for at, place in asked.nonzero().tolist()]
    every = {tuple(row[: place + 1]) for row in ids.tolist() for place in range(len(row))}
    some, every = len(set(read)), len(every)
    assert some < len(read)
    assert every < ids.numel()
    assert rows == ([every, some, some, every] if checkpointing else [every, some])
    assert set(whole) == {ids.numel()}
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(hidden, wanted, rtol=rtol, atol=rtol)
    assert apart(grads, others) < rtol


@torch.no_grad()
def test_every_reading_of_a_batch_asks_for_all_that_it_reads(monkeypatch):
    rows = [([*range(1, 2 + n)], [False] * 2 + [True] * (n - 2) + [False]) for n in (9, 5, 2)]
    batch = collate(rows, 0, torch.device("cpu"))
    scalar = ScalarModel.from_causal_lm(make("llama"), seed=0)

    def readings():
        values, last = values_of_replies(scalar, batch)
        scores = scalar.scores(batch.input_ids, batch.lengths)
        return (*LanguageModel(make("llama"))(batch)[:2], values, last, scores)

    found = readings()
    for module in (fused, reading):
        monkeypatch.setattr(module, "kernels_for", lambda dtype: None)
    for one, two in zip(found, readings(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_token_at_all_may_be_asked_for(dtype, monkeypatch):
    model, ids = make("llama"), ids_of()
    asked = torch.zeros(ids.shape, dtype=torch.bool)
    hidden, grads, rows = asked_for(monkeypatch, model, ids, dtype, asked, told=True)
    assert rows == [ids.numel()] * 2  # there is nothing to be made of
    assert len(hidden) == 0
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_stands_behind_a_text_is_not_read(dtype):
    model, ids = make("llama"), alike()
    lengths = torch.tensor([21, 17, 5, 1, 9, 20])
    inside = torch.arange(21) < lengths[:, None]
    other = torch.where(inside, ids, 63 - ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        one, two = (states_of(model, each, inside, lengths) for each in (ids, other))
        whole = hidden_states(model, ids)[inside]
    assert torch.equal(one, two)
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(one, whole, rtol=rtol, atol=rtol)


def test_two_texts_are_read_apart_from_where_they_differ(calls):
    model, ids = make("llama"), ids_of(1).repeat(2, 1)
    ids[1, 10] = (ids[0, 10] + 1) % 64
    states = states_of(model, ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([21, 21]))
    one, two = states.view(2, 21, -1)
    assert len(calls) == 2
    assert torch.equal(one[:10], two[:10])
    assert (one[10:] != two[10:]).any(1).all()


def watch_attention(model):
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)


def watch_norm(model):
    model.model.norm.register_forward_hook(lambda *_: None)


def watch_backbone(model):
    model.model.register_forward_hook(lambda *_: None)


def watch_block(model):
    model.model.layers[0].register_forward_pre_hook(lambda *_: None)


def replace_last(model):
    """As a trunk of all blocks does."""
    block = model.model.layers[-1]
    forward = block.forward
    block.forward = lambda *given, **more: forward(*given, **more)


def adapt(model):
    add_lora(model, LoraSettings(rank=2), seed=0)


def cut(model):
    """As somebody who lets a model end after one block, and names no other change."""
    model.model.layers.append(copy.deepcopy(model.model.layers[-1]))


def foreign(model):
    model.model.__class__ = type("Mine", (type(model.model),), {"__module__": "mine"})


@pytest.mark.parametrize(
    "change",
    [watch_attention, watch_norm, watch_backbone, watch_block, replace_last, adapt, cut, foreign],
    ids=lambda change: change.__name__,
)
def test_where_a_block_cannot_read_prefixes_none_does(change, monkeypatch):
    model, ids = make("llama"), alike()
    wanted = hidden_states(model, ids)
    monkeypatch.setattr(reading, "prefixes_of", None)  # would fail
    change(model)
    asked = ids % 2 == 0
    found = states_of(model, ids, asked, torch.full((len(ids),), 21))
    torch.testing.assert_close(found, wanted[asked], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4),
        PhiConfig(vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4),
        GPT2Config(vocab_size=64, n_embd=48, n_layer=2, n_head=4),
        MambaConfig(vocab_size=64, hidden_size=48, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_models_of_other_kinds_are_read_whole(config, dtype):
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), alike()
    asked, lengths = ids % 2 == 0, torch.full((len(ids),), 21)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = states_of(model, ids, asked, lengths)
        assert torch.equal(found, hidden_states(model, ids)[asked])


def test_training_may_follow_on_a_reading_in_inference_mode():
    model, ids = make("llama"), alike()
    asked, lengths = ids % 2 == 0, torch.full((len(ids),), 21)
    with torch.inference_mode():
        wanted = states_of(model, ids, asked, lengths)
    found = states_of(model, ids, asked, lengths)
    found.sum().backward()
    assert torch.equal(found, wanted)


def test_nothing_behind_a_text_can_be_asked_for():
    model, ids = make("llama"), alike()
    lengths = torch.tensor([21, 21, 9, 21, 21, 21])
    with pytest.raises(ValueError, match="behind the end of a text"):
        states_of(model, ids, torch.ones_like(ids, dtype=torch.bool), lengths)


def test_bf16_weights_are_read_as_prefixes_where_the_stream_is_raised(calls):
    model, ids = make("llama"), alike()
    model.bfloat16().float()
    frozen, lengths = copy.deepcopy(model).bfloat16(), torch.full((len(ids),), 21)
    asked = ids % 2 == 0
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            one, two = (states_of(each, ids, asked, lengths) for each in (model, frozen))
        assert len(calls) == 4
        assert torch.equal(one, two)
        states_of(frozen, ids, asked, lengths)
    assert len(calls) == 4


@pytest.mark.parametrize("window", [8, 21])
def test_prefixes_are_read_in_windows_that_hold_the_texts(window, monkeypatch, calls):
    config = MistralConfig(**SIZES, sliding_window=window)
    monkeypatch.setitem(FAMILIES, "window", (MistralForCausalLM, config))
    model, ids = make("window"), alike()
    asked = ids % 2 == 0
    found = states_of(model, ids, asked, torch.full((len(ids),), 21))
    assert len(calls) == (2 if window == 21 else 0)
    torch.testing.assert_close(found, hidden_states(model, ids)[asked], rtol=1e-5, atol=1e-5)


def test_the_class_keeps_its_name_and_a_copy_is_its_own():
    model, ids = make("llama"), ids_of()
    other = copy.deepcopy(model)
    assert type(decoder_blocks(model)[0]).__name__ == "LlamaDecoderLayer"
    assert is_fused(model)
    assert not is_fused(LlamaForCausalLM(FAMILIES["llama"][1]))
    assert isinstance(decoder_blocks(other)[0], type(decoder_blocks(model)[0]))
    for parameter in other.parameters():
        parameter.data.zero_()
    assert float(result(model, ids, torch.float32)[0].abs().max()) > 0
    assert float(result(other, ids, torch.float32)[0].abs().max()) == 0


def test_a_hook_an_adapter_a_mask_and_a_cache_are_heeded(calls, monkeypatch):
    ids = ids_of()
    model = make("llama")
    seen = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda *given: seen.append(given[2].shape)
    )
    result(model, ids, torch.float32)
    assert len(seen) == 1
    assert len(calls) == 1  # the other block has none
    hook.remove()
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[1, :4] = False
    found = result(model, ids, torch.float32, attention_mask=mask)
    assert len(calls) == 1
    same = plainly(monkeypatch, model, ids, torch.float32, attention_mask=mask)
    assert torch.equal(found[0], same[0])
    with torch.no_grad():
        model.generate(ids[:1], max_new_tokens=3, do_sample=False)
    assert len(calls) == 1
    add_lora(model, LoraSettings(rank=2), seed=0)
    result(model, ids, torch.float32)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
    ],
    ids=["eager", "bf16", "double"],
)
def test_what_is_not_plain_training_in_fp32_weights_goes_to_transformers(change, calls):
    model = make("llama")
    change(model)
    with torch.no_grad():
        model(ids_of(), use_cache=False)
    assert not calls


@pytest.mark.parametrize(
    "watch",
    [
        lambda part, see: part.register_full_backward_hook(lambda *given: see(1)),
        lambda part, see: torch.nn.modules.module.register_module_forward_hook(
            lambda *given: see(1)
        ),
        lambda part, see: setattr(part, "forward", lambda x, own=part.forward: see(1) or own(x)),
    ],
    ids=["backward hook", "hook of all modules", "another forward"],
)
def test_whoever_watches_a_part_is_heeded(watch, calls):
    model, seen = make("llama"), []
    handle = watch(model.model.layers[1].mlp.up_proj, seen.append)
    try:
        result(model, ids_of(), torch.float32)
    finally:
        if handle is not None:
            handle.remove()
    assert seen
    assert len(calls) <= 1


@pytest.mark.parametrize("where", ["q_norm", "k_norm"])
def test_whoever_watches_a_norm_of_heads_is_heeded(where, calls):
    model, seen = make("qwen3"), []
    getattr(model.model.layers[1].self_attn, where).register_forward_hook(lambda *_: seen.append(1))
    result(model, ids_of(), torch.float32)
    assert seen
    assert len(calls) == 1


@pytest.mark.parametrize("where", ["call", "module", "dropout"])
def test_attention_that_is_not_causal_or_drops_goes_to_transformers(where, calls):
    model, ids = make("llama"), ids_of()
    for block in decoder_blocks(model):
        if where == "module":
            block.self_attn.is_causal = False
        if where == "dropout":
            block.self_attn.attention_dropout = 0.5
    if where == "dropout":
        model.train()
    model.model(ids, use_cache=False, **({"is_causal": False} if where == "call" else {}))
    assert not calls


def test_a_sliding_window_shorter_than_the_text_is_heeded(calls, monkeypatch):
    config = MistralConfig(**SIZES, sliding_window=8)
    monkeypatch.setitem(FAMILIES, "window", (MistralForCausalLM, config))
    model = make("window")
    result(model, ids_of(2, 6), torch.float32)
    assert len(calls) == 2
    result(model, ids_of(2, 12), torch.float32)
    assert len(calls) == 2


def test_each_text_may_have_positions_of_its_own(monkeypatch, calls):
    model, ids = make("llama"), ids_of(2, 9)
    places = torch.stack([torch.arange(9), torch.arange(40, 49)])
    hidden, grads = result(model, ids, torch.float32, position_ids=places)
    assert len(calls) == 2
    wanted, others = plainly(monkeypatch, model, ids, torch.float32, position_ids=places)
    torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)
    assert apart(grads, others) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_heeds_the_dtype_of_its_forward_alone(dtype):
    model, ids = make("llama"), ids_of()
    _, wanted = result(model, ids, dtype)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = hidden_states(model, ids)
    slope = randn(*hidden.shape, seed=5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        torch.autograd.backward(hidden, slope)
    found = dict(model.named_parameters())
    for key in wanted:  # the last norm is transformers' own, and rounds with its surroundings
        gap = (found[key].grad - wanted[key]).norm() / wanted[key].norm()
        assert float(gap) < 0.02, key


def test_what_lies_in_no_single_piece_is_read():
    block = decoder_blocks(make("llama"))[0]
    wide, turns = randn(2, 9, 96), (torch.ones(1, 9, 10), torch.zeros(1, 9, 10))
    found = block(wide[..., :48], position_embeddings=turns)
    assert torch.equal(found, block(wide[..., :48].contiguous(), position_embeddings=turns))


def test_a_model_is_pickled_and_its_blocks_are_fused_once(calls):
    model, ids = make("llama"), ids_of()
    kind = type(decoder_blocks(model)[0])
    use_fused_blocks(model)
    assert type(decoder_blocks(model)[0]) is kind
    again = pickle.loads(pickle.dumps(model))
    assert type(decoder_blocks(again)[0]) is kind
    assert torch.equal(result(again, ids, torch.float32)[0], result(model, ids, torch.float32)[0])
    assert len(calls) == 4


def test_long_texts_go_to_transformers(calls):
    model = make("llama")
    with torch.no_grad():
        hidden_states(model, ids_of(1, fused.LONGEST))
        assert len(calls) == 2
        hidden_states(model, ids_of(1, fused.LONGEST + 1))
        hidden_states(model, ids_of(1, 1))
    assert len(calls) == 2


def test_a_bias_goes_to_transformers(calls, monkeypatch):
    monkeypatch.setitem(
        FAMILIES, "biased", (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True))
    )
    result(make("biased"), ids_of(), torch.float32)
    assert not calls
