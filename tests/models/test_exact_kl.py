"""KL over the whole vocabulary, by chunks, against its definition on whole tensors."""

import pytest
import torch
from torch.autograd import gradcheck

from ppomax.models import exact_kl, logprobs
from ppomax.models.exact_kl import TargetStates, categorical_kl, token_kl

VOCAB, HIDDEN, TOKENS = 37, 11, 9


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, TOKENS, HIDDEN, generator=generator).to(dtype)
    weights = torch.randn(2, VOCAB, HIDDEN, generator=generator).to(dtype)
    return [TargetStates(h, w) for h, w in zip(states, weights, strict=True)]


def definition(own, reference, temperature):
    """Sum of p (log p - log q) over the vocabulary, in float64."""
    log_p, log_q = (
        (s.hidden.double() @ s.weight.double().T / temperature).log_softmax(1)
        for s in (own, reference)
    )
    return (log_p.exp() * (log_p - log_q)).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_values_and_gradients_are_the_definition_s_for_any_chunk(rows, temperature, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", rows * VOCAB)
    own, reference = problem()
    own = TargetStates(*(x.clone().requires_grad_() for x in own))
    reference = TargetStates(*(x.clone().requires_grad_() for x in reference))
    weights = torch.linspace(-1, 2, TOKENS)
    found = token_kl(own, reference, temperature=temperature)
    torch.testing.assert_close(found, definition(own, reference, temperature).float())
    mine = torch.autograd.grad((found * weights).sum(), [*own], retain_graph=True)
    theirs = torch.autograd.grad((definition(own, reference, temperature) * weights).sum(), [*own])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    (found * weights).sum().backward()
    assert reference.hidden.grad is None
    assert reference.weight.grad is None


def test_it_is_zero_at_the_reference_and_never_negative():
    own, reference = problem()
    assert token_kl(own, own).abs().max() < 1e-6
    assert (token_kl(own, reference) > 0).all()
    assert len(token_kl(TargetStates(own.hidden[:0], own.weight), reference)) == 0


def test_under_autocast_it_is_close_to_fp32():
    own, reference = problem()
    with torch.autocast("cpu", torch.bfloat16):
        half = token_kl(own, reference)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, token_kl(own, reference), rtol=0.1, atol=0.1)


def test_its_gradient_is_its_derivative():
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    assert gradcheck(lambda x: categorical_kl(x, other), (logits.requires_grad_(),))


def test_the_reference_is_a_constant_of_the_divergence_too():
    logits, other = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    other.requires_grad_()
    categorical_kl(logits.requires_grad_(), other).sum().backward()
    assert logits.grad is not None
    assert other.grad is None


def test_the_temperature_is_one_unless_said():
    own, reference = problem()
    found = token_kl(own, reference)
    torch.testing.assert_close(found, definition(own, reference, 1.0).float())


@pytest.mark.parametrize(
    ("elements", "held"),
    [(VOCAB - 1, [1] * TOKENS), (4 * VOCAB, [4, 4, 1]), (100 * VOCAB, [TOKENS])],
)
def test_no_more_than_a_chunk_is_held_and_never_less_than_a_token(elements, held, monkeypatch):
    seen = []
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", elements)
    plain = exact_kl.categorical_kl
    monkeypatch.setattr(exact_kl, "categorical_kl", lambda a, b: seen.append(len(a)) or plain(a, b))
    token_kl(*problem())
    assert seen == held
