import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.models import logprobs as module
from ppomax.models.logprobs import token_logprobs

VOCAB, HIDDEN, TOKENS = 37, 11, 9


def problem(tokens=TOKENS, vocab=VOCAB, hidden=HIDDEN, scale=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=generator) * scale
    weight = torch.randn(vocab, hidden, generator=generator)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return states.to(dtype), weight.to(dtype), targets


def oracle(states, weight, targets, temperature):
    """The naive form in float64: log-probs, entropy, plain log-probs."""
    logits = states.double() @ weight.double().T
    every = torch.log_softmax(logits / temperature, 1)
    plain = torch.log_softmax(logits, 1)
    chosen = targets[:, None]
    entropy = -(every.exp() * every).sum(1)
    return every.gather(1, chosen)[:, 0], entropy, plain.gather(1, chosen)[:, 0]


def gradients(outputs, weights, inputs):
    """Of a weighted sum of log-probs and entropies."""
    total = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, inputs)


def both_gradients(states, weight, targets, temperature, on_logprobs, on_entropy):
    mine = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    found = token_logprobs(*mine, targets, temperature=temperature)
    got = gradients(found[:2], [on_logprobs, on_entropy], mine)
    exact = [states.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = gradients(oracle(*exact, targets, temperature)[:2], [on_logprobs, on_entropy], exact)
    return got, wanted


@pytest.fixture(params=["compiled", "plain"], autouse=True, scope="module")
def way(request):
    """Every test twice: with the compiled kernels, and with PyTorch's operations."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(module, "kernels_for", lambda dtype: None)
        elif module.kernels_for(torch.float32) is None:
            pytest.skip("no compiled kernels")
        yield request.param


def chunks_of(monkeypatch, elements):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(module, "PART_ELEMENTS", elements)
    monkeypatch.setattr(module, "NARROWEST", 1)


@pytest.fixture
def small_chunks(monkeypatch):
    chunks_of(monkeypatch, 4 * VOCAB)  # 4 tokens at a time: 4, 4, 1


# --- values


def test_a_log_prob_worked_by_hand():
    # logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    found = token_logprobs(torch.ones(2, 1), weight, torch.tensor([2, 0]))
    assert found.logprobs.tolist() == pytest.approx([math.log(5 / 8), math.log(1 / 8)])
    entropy = -(1 / 8 * math.log(1 / 8) + 2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8))
    assert found.entropy.tolist() == pytest.approx([entropy] * 2)
    # at temperature 1/2 the probabilities go as squares: 1/30, 4/30, 25/30
    found = token_logprobs(torch.ones(1, 1), weight, torch.tensor([1]), temperature=0.5)
    assert found.logprobs.tolist() == pytest.approx([math.log(4 / 30)])
    assert found.plain.tolist() == pytest.approx([math.log(2 / 8)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_log_probs_and_entropy_are_those_of_log_softmax(dtype, temperature, scale):
    states, weight, targets = problem(scale=scale, dtype=dtype)
    found = token_logprobs(states, weight, targets, temperature=temperature)
    wanted = oracle(states, weight, targets, temperature)
    assert all(part.dtype == torch.float32 for part in found)
    torch.testing.assert_close(found.logprobs.double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.plain.double(), wanted[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.entropy.double(), wanted[1], rtol=1e-5, atol=2e-4 if scale == 5.0 else 1e-5
    )


@pytest.mark.parametrize("temperature", [0.1 * 3 / 0.3, 1 - 1e-9])
def test_a_temperature_that_is_1_but_for_rounding_has_plain_log_probs(temperature):
    assert temperature != 1.0
    states, weight, targets = problem()
    found = token_logprobs(states, weight, targets, temperature=temperature)
    torch.testing.assert_close(found.plain, found.logprobs)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00101, 0x7FFFFFFF, -1])
def test_a_number_that_is_none_reaches_the_log_probs_of_its_token_alone(bits):
    states, weight, targets = problem()
    states[1, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    found = token_logprobs(states, weight, targets)
    for part in (found.logprobs, found.plain, found.entropy):
        assert part.isnan().nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("vocab", [1, 16, 33, 67, 130])
def test_logits_far_below_zero_lose_nothing(vocab):
    states, weight = torch.ones(3, 1), torch.linspace(-300, -250, vocab)[:, None]
    targets = torch.tensor([0, vocab // 2, vocab - 1])
    found = token_logprobs(states, weight, targets)
    wanted = weight[:, 0].double().log_softmax(0)[targets]
    torch.testing.assert_close(found.logprobs.double(), wanted, rtol=1e-5, atol=1e-4)


def test_at_temperature_one_the_plain_log_probs_are_the_log_probs_bitwise():
    found = token_logprobs(*problem())
    assert torch.equal(found.logprobs, found.plain)


def test_a_uniform_distribution_has_the_entropy_of_the_vocabulary():
    states, weight, targets = problem()
    found = token_logprobs(torch.zeros_like(states), weight, targets)
    torch.testing.assert_close(found.entropy, torch.full((TOKENS,), math.log(VOCAB)))
    torch.testing.assert_close(found.logprobs, torch.full((TOKENS,), -math.log(VOCAB)))


def test_sharp_distributions_give_finite_numbers():
    states, weight, targets = problem(scale=1000.0)
    found = token_logprobs(states, weight, targets)
    assert all(bool(torch.isfinite(part).all()) for part in found)


def test_the_entropy_is_as_exact_however_large_the_logits():
    # 300 on every logit changes no probability; fp32 holds these sums exactly
    logits = torch.randint(-40, 40, (500,), generator=torch.Generator().manual_seed(0)) / 8
    wanted = -(torch.softmax(logits.double(), 0) * torch.log_softmax(logits.double(), 0)).sum()
    found = token_logprobs(torch.ones(1, 1), logits[:, None] + 300.0, torch.tensor([0]))
    assert float(found.entropy) == pytest.approx(float(wanted), abs=1e-4)


def test_the_entropy_is_left_out_where_it_is_not_wanted():
    states, weight, targets = problem()
    inputs = [states.requires_grad_(), weight.requires_grad_()]
    whole = token_logprobs(*inputs, targets, temperature=0.7)
    found = token_logprobs(*inputs, targets, temperature=0.7, entropy=False)
    assert torch.equal(found.entropy, torch.zeros(TOKENS))
    assert torch.equal(found.logprobs, whole.logprobs)
    assert torch.equal(found.plain, whole.plain)
    first = torch.autograd.grad(whole.logprobs.sum(), inputs)
    second = torch.autograd.grad((found.logprobs + 7 * found.entropy).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_order_of_tokens_is_kept_and_inputs_are_left_alone():
    states, weight, targets = problem()
    copies = states.clone(), weight.clone(), targets.clone()
    whole = token_logprobs(states, weight, targets, temperature=0.5)
    turned = token_logprobs(states.flip(0), weight, targets.flip(0), temperature=0.5)
    for a, b in zip(whole, turned, strict=True):
        torch.testing.assert_close(a, b.flip(0), rtol=0, atol=5e-6)
    for now, before in zip((states, weight, targets), copies, strict=True):
        assert torch.equal(now, before)


# --- gradients


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("which", ["logprobs", "entropy", "both"])
def test_gradients_are_those_of_the_naive_form(temperature, which):
    states, weight, targets = problem()
    generator = torch.Generator().manual_seed(1)
    on_logprobs = torch.randn(TOKENS, generator=generator) * (which != "entropy")
    on_entropy = torch.randn(TOKENS, generator=generator) * (which != "logprobs")
    got, wanted = both_gradients(states, weight, targets, temperature, on_logprobs, on_entropy)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
        assert float(b.abs().max()) > 0.1


@pytest.mark.parametrize("place", range(3))
def test_gradients_are_the_slopes_of_finite_differences(place):
    states, weight, targets = problem(tokens=2, vocab=5, hidden=3, dtype=torch.float64)
    inputs = [states.requires_grad_(), weight.requires_grad_()]
    found = token_logprobs(*inputs, targets, temperature=0.8)
    got = torch.autograd.grad((found.logprobs + 0.3 * found.entropy).sum(), inputs)

    def value(moved):
        logprobs, entropy, _ = oracle(*moved, targets, 0.8)
        return float((logprobs + 0.3 * entropy).sum())

    for which in (0, 1):
        step = torch.zeros_like(inputs[which])
        step.view(-1)[place * 2] = 1e-5
        moved, back = [x.detach().clone() for x in inputs], [x.detach().clone() for x in inputs]
        moved[which] += step
        back[which] -= step
        slope = (value(moved) - value(back)) / 2e-5
        assert float(got[which].view(-1)[place * 2]) == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_the_plain_log_probs_carry_no_gradient():
    states, weight, targets = problem()
    found = token_logprobs(states.requires_grad_(), weight, targets, temperature=0.5)
    assert found.logprobs.requires_grad
    assert found.entropy.requires_grad
    assert not found.plain.requires_grad
    assert not token_logprobs(states, weight, targets).plain.requires_grad


def test_a_frozen_weight_gets_no_gradient_and_changes_none():
    states, weight, targets = problem()
    free = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    token_logprobs(*free, targets).logprobs.sum().backward()
    frozen = states.clone().requires_grad_()
    token_logprobs(frozen, weight, targets).logprobs.sum().backward()
    assert torch.equal(frozen.grad, free[0].grad)
    assert weight.grad is None
    alone = weight.clone().requires_grad_()
    token_logprobs(states, alone, targets).logprobs.sum().backward()
    assert torch.equal(alone.grad, free[1].grad)


def test_the_gradient_of_the_expected_log_prob_vanishes():
    # sum_a p(a) grad log p(a) = 0, for every state
    states, weight, _ = problem(tokens=1)
    logits = (states @ weight.T).expand(VOCAB, -1)
    chance = torch.softmax(logits[0], 0)
    many = states.expand(VOCAB, -1).clone().requires_grad_()
    found = token_logprobs(many, weight, torch.arange(VOCAB))
    (found.logprobs * chance).sum().backward()
    assert float(many.grad.sum(0).abs().max()) < 1e-5
    assert float(many.grad.abs().max()) > 0.01


# --- chunks


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 9])
def test_chunks_change_no_value_and_no_gradient(monkeypatch, tokens):
    states, weight, targets = problem(tokens=tokens)
    on_logprobs, on_entropy = torch.randn(2, tokens, generator=torch.Generator().manual_seed(1))
    whole = token_logprobs(states, weight, targets, temperature=0.7)
    one, wanted = both_gradients(states, weight, targets, 0.7, on_logprobs, on_entropy)
    chunks_of(monkeypatch, 4 * VOCAB)
    parts = token_logprobs(states, weight, targets, temperature=0.7)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    got, _ = both_gradients(states, weight, targets, 0.7, on_logprobs, on_entropy)
    for a, b, exact in zip(got, one, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_vocabulary_larger_than_a_chunk_goes_token_by_token(monkeypatch):
    states, weight, targets = problem()
    whole = token_logprobs(states, weight, targets)
    chunks_of(monkeypatch, VOCAB - 1)
    for a, b in zip(token_logprobs(states, weight, targets), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_entropy_gradient_of_one_chunk_alone_is_not_lost(small_chunks):
    states, weight, targets = problem()
    on_entropy = torch.zeros(TOKENS)
    on_entropy[-1] = 1.0  # the last chunk's only token
    got, wanted = both_gradients(states, weight, targets, 1.0, torch.zeros(TOKENS), on_entropy)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_no_more_than_a_chunk_of_logits_is_ever_held(small_chunks, monkeypatch):
    sizes = []
    original = torch.mm

    def watched(a, b, **rest):
        result = original(a, b, **rest)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "mm", watched)
    states, weight, targets = problem(tokens=40)
    token_logprobs(states.requires_grad_(), weight, targets).logprobs.sum().backward()
    assert max(sizes) <= 4 * VOCAB < 40 * VOCAB


# --- no targets


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_without_targets_there_are_no_log_probs_and_zero_gradients(temperature):
    states, weight, targets = problem(tokens=0)
    inputs = [states.requires_grad_(), weight.requires_grad_()]
    found = token_logprobs(*inputs, targets, temperature=temperature)
    assert [part.shape for part in found] == [(0,)] * 3
    (found.logprobs.sum() + found.entropy.sum()).backward()
    assert states.grad.shape == states.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("target", [-100, -1, VOCAB, 10**9])
def test_a_target_that_is_no_token_is_refused(target):
    states, weight, targets = problem()
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|none of the"):
        token_logprobs(states, weight, targets)


def test_backward_inside_autocast_heeds_the_dtype_of_its_forward():
    states, weight, targets = problem()
    inputs = [states.requires_grad_(), weight.requires_grad_()]
    wanted = torch.autograd.grad(token_logprobs(*inputs, targets).logprobs.sum(), inputs)
    total = token_logprobs(*inputs, targets).logprobs.sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(total, inputs)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


# --- bf16


def test_under_autocast_values_and_gradients_are_close_to_fp32():
    states, weight, targets = problem(tokens=64, scale=0.5)
    exact = oracle(states, weight, targets, 0.9)
    inputs = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(*inputs, targets, temperature=0.9)
    (found.logprobs.mean() + 0.1 * found.entropy.mean()).backward()
    ones = torch.full((64,), 1 / 64)
    _, wanted = both_gradients(states, weight, targets, 0.9, ones, 0.1 * ones)
    for got, value in zip(found, exact, strict=True):
        assert got.dtype == torch.float32
        gap = (got.detach() - value).abs()
        assert float(gap.max()) < 0.05
        assert float(gap.mean()) < 0.01
        assert float(gap.max()) > 1e-4, "the product was not in bf16"
    for tensor, gradient in zip(inputs, wanted, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert float((tensor.grad - gradient).norm() / gradient.norm()) < 0.02


def test_under_autocast_the_probabilities_still_sum_to_one():
    states, weight, _ = problem(tokens=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(states.expand(VOCAB, -1), weight, torch.arange(VOCAB))
    assert float(found.logprobs.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    entropy = -(found.logprobs.exp() * found.logprobs).sum()
    assert float(found.entropy[0]) == pytest.approx(float(entropy), abs=1e-4)


def test_autocast_gives_the_same_bits_whatever_dtype_the_weight_is_kept_in():
    states, weight, targets = problem()
    weight = weight.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        master = token_logprobs(states, weight, targets)
        frozen = token_logprobs(states, weight.bfloat16(), targets)
    for a, b in zip(master, frozen, strict=True):
        assert torch.equal(a, b)


def test_a_bf16_weight_gets_a_bf16_gradient_summed_in_fp32(small_chunks):
    states, weight, targets = problem(tokens=400, dtype=torch.bfloat16)
    inputs = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    token_logprobs(*inputs, targets).logprobs.sum().backward()
    assert [x.grad.dtype for x in inputs] == [torch.bfloat16] * 2
    _, wanted = both_gradients(states, weight, targets, 1.0, torch.ones(400), torch.zeros(400))
    for tensor, gradient in zip(inputs, wanted, strict=True):
        assert float((tensor.grad - gradient).norm() / gradient.norm()) < 0.01


# --- properties


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([0.3, 1.0, 1.7]))
def test_probabilities_of_all_tokens_sum_to_one(seed, vocab, temperature):
    states, weight, _ = problem(tokens=1, vocab=vocab, seed=seed)
    found = token_logprobs(
        states.expand(vocab, -1), weight, torch.arange(vocab), temperature=temperature
    )
    assert float(found.logprobs.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(found.plain.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(found.logprobs.max()) <= 1e-6
    assert -1e-4 <= float(found.entropy[0]) <= math.log(vocab) + 1e-5
