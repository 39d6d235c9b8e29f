"""Grouped attention against its formula, and the calls that it leaves to the library."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from ppomax.models import attention
from ppomax.models.attention import NAME, grouped_attention
from ppomax.models.load import load_policy


def by_hand(q, k, v, mask, scale):
    """One query at a time, from the definition."""
    batch, heads, length, _ = q.shape
    shared = heads // k.shape[1]
    rows = []
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // shared], v[b, h // shared]
            for t in range(length):
                weights = torch.exp(scale * keys @ q[b, h, t] + mask[b % len(mask), 0, t])
                rows.append(weights @ values / weights.sum())
    return torch.stack(rows).view(q.shape)


def drawn(seed, batch, groups, shared, length, dim, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def heads(count):
        # laid out as a model's projections are
        flat = torch.randn(batch, length, count, dim, generator=generator, dtype=torch.float64)
        return flat.to(dtype).transpose(1, 2).requires_grad_()

    return heads(groups * shared), heads(groups), heads(groups), generator


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    length=st.integers(1, 6),
    rows=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_formula(seed, batch, groups, shared, length, rows):
    q, k, v, generator = drawn(seed, batch, groups, shared, length, 4)
    unseen = torch.rand(batch if rows else 1, 1, length, length, generator=generator) < 0.5
    unseen &= ~torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(unseen.shape, dtype=q.dtype).masked_fill_(unseen, -math.inf)
    weights = torch.randn(q.shape, generator=generator, dtype=q.dtype)
    found = grouped_attention(q, k, v, mask, 0.7)
    wanted = by_hand(q, k, v, mask, 0.7)
    torch.testing.assert_close(found, wanted)
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    for one, two in zip(
        gradients, torch.autograd.grad((wanted * weights).sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_limits_equal_scores_average_and_one_visible_key_is_copied():
    q, k, v, _ = drawn(0, 2, 2, 3, 5, 4)
    none = torch.zeros(1, 1, 5, 5, dtype=q.dtype)
    average = v.mean(2, keepdim=True).repeat_interleave(3, 1).expand(q.shape)
    torch.testing.assert_close(grouped_attention(q, k, v, none, 0.0), average)
    itself = none.masked_fill(~torch.eye(5, dtype=torch.bool), -math.inf)
    copied = v.repeat_interleave(3, 1)
    torch.testing.assert_close(grouped_attention(q, k, v, itself, 0.7), copied)


class Asked:
    """How often each way was taken."""

    def __init__(self, monkeypatch):
        self.ours = self.theirs = 0
        ours, theirs = attention.grouped_attention, attention.sdpa_attention_forward

        def count_ours(*given):
            self.ours += 1
            return ours(*given)

        def count_theirs(*given, **named):
            self.theirs += 1
            return theirs(*given, **named)

        monkeypatch.setattr(attention, "grouped_attention", count_ours)
        monkeypatch.setattr(attention, "sdpa_attention_forward", count_theirs)


@pytest.fixture
def asked(monkeypatch):
    return Asked(monkeypatch)


def attend(q, k, v, mask=None, module=None, **rest):
    return attention._attend(module or torch.nn.Identity(), q, k, v, mask, **rest)[0]


def masks(batch, length):
    """No mask, and the ways a mask of the last two keys can be said."""
    seen = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    seen[..., -2:] = False
    seen[..., 0] = True
    lowest = torch.finfo(torch.float32).min
    infinite, finite = (
        torch.zeros(seen.shape).masked_fill_(~seen, low) for low in (-math.inf, lowest)
    )
    return [None, seen, infinite, finite]


@pytest.mark.parametrize("which", range(4))
def test_in_bf16_it_is_the_library_s_attention_up_to_rounding(which, asked):
    q, k, v, _ = drawn(1, 2, 3, 3, 17, 16, torch.bfloat16)
    module = torch.nn.Identity()
    module.num_key_value_groups = 3
    mask = masks(2, 17)[which]
    found = attend(q, k, v, mask, module)
    assert (asked.ours, asked.theirs) == (1, 0)
    exact = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    doubles = [part.detach().double() for part in (q, k, v)]
    wanted = attend(*doubles, exact, module)
    assert (asked.ours, asked.theirs) == (1, 1)
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.01)


def test_autocast_decides_where_the_heads_are_fp32(asked):
    parts = drawn(1, 2, 3, 1, 17, 16, torch.float32)[:3]
    attend(*parts)
    assert (asked.ours, asked.theirs) == (0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*parts)
    assert (asked.ours, asked.theirs) == (1, 1)
    assert found.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        attend(*parts)
    assert (asked.ours, asked.theirs) == (1, 2)


def test_what_it_is_not_made_for_goes_to_the_library(asked, monkeypatch):
    q, k, v, _ = drawn(1, 2, 3, 1, 17, 16, torch.bfloat16)
    both_ways = torch.nn.Identity()
    both_ways.is_causal = False
    attend(q, k, v, module=both_ways)
    attend(q, k, v, is_causal=False)
    attend(q, k, v, dropout=0.5)
    attend(q, k, v, position_bias=torch.zeros(1, 3, 17, 17, dtype=q.dtype))
    attend(q[:, :, -1:], k, v)  # one token more, after those in the cache
    attend(q, k, v, torch.zeros(2, 3, 17, 17, dtype=q.dtype))  # each head its own mask
    monkeypatch.setattr(attention, "LONGEST", 16)
    attend(q, k, v)
    assert (asked.ours, asked.theirs) == (0, 7)
    attend(q[:, :, :16], k[:, :, :16], v[:, :, :16])
    assert (asked.ours, asked.theirs) == (1, 7)


def test_a_loaded_model_attends_so_and_its_export_does_not_say_it(tmp_path, asked):
    model = load_policy("tiny")
    assert model.config._attn_implementation == NAME
    ids = torch.arange(20).view(2, 10)
    asked.ours = asked.theirs = 0
    with torch.no_grad():
        plain = model(ids).logits
        assert asked.ours == 0
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(ids).logits
    assert asked.ours == asked.theirs == model.config.num_hidden_layers
    torch.testing.assert_close(rounded.float(), plain, rtol=0.05, atol=0.1)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, plain)
