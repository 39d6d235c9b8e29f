"""Grouped attention against its formula, and the calls that it leaves to the library."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.models import attention
from ppomax.models.attention import NAME, grouped_attention, use_grouped_attention
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.rollout import EngineSettings, SamplingParams, build_engine


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


def test_no_mask_is_the_causal_one():
    q, k, v, _ = drawn(0, 2, 2, 3, 5, 4)
    later = torch.ones(1, 1, 5, 5, dtype=torch.bool).triu(1)
    mask = torch.zeros(later.shape, dtype=q.dtype).masked_fill_(later, -math.inf)
    torch.testing.assert_close(
        grouped_attention(q, k, v, None, 0.7), grouped_attention(q, k, v, mask, 0.7)
    )


def masks(batch, length):
    """No mask, and the ways to say that the first row is padded on the left and its end unseen."""
    seen = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    seen[0, ..., -2:] = False
    seen[0, ..., :3] = False  # what stands there sees nothing
    lowest = torch.finfo(torch.float32).min
    infinite, finite = (
        torch.zeros(seen.shape).masked_fill_(~seen, low) for low in (-math.inf, lowest)
    )
    return [None, seen, infinite, finite]


@pytest.mark.parametrize("scaling", [None, 0.6])
@pytest.mark.parametrize("which", range(4))
def test_in_bf16_it_is_the_library_s_attention_up_to_rounding(which, scaling, asked):
    q, k, v, _ = drawn(1, 2, 3, 3, 17, 16, torch.bfloat16)
    module = torch.nn.Identity()
    module.num_key_value_groups = 3
    mask = masks(2, 17)[which]
    found = attend(q, k, v, mask, module, scaling=scaling)
    assert (asked.ours, asked.theirs) == (1, 0)
    assert found.isfinite().all()
    exact = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    doubles = [part.detach().double() for part in (q, k, v)]
    wanted = attend(*doubles, exact, module, scaling=scaling)
    assert (asked.ours, asked.theirs) == (1, 1)
    heeded = slice(None) if which == 0 else slice(3, None)  # behind the padding
    found, wanted = found[:, heeded].double(), wanted[:, heeded]
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


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
    with monkeypatch.context() as patch:
        patch.setattr(attention, "MOST_SCORES", 2 * 3 * 17**2 - 1)
        attend(q, k, v)
    monkeypatch.setattr(attention, "LONGEST", 16)
    attend(q, k, v)
    assert (asked.ours, asked.theirs) == (0, 8)
    attend(q[:, :, :16], k[:, :, :16], v[:, :, :16])
    assert (asked.ours, asked.theirs) == (1, 8)


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
    torch.testing.assert_close(rounded.float(), plain, rtol=0.01, atol=0.01)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, plain)


def test_an_architecture_that_was_not_tried_and_a_name_that_was_given_are_left_alone():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
    config = Qwen2Config(vocab_size=64, intermediate_size=64, num_key_value_heads=1, **sizes)
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation("sdpa")
    use_grouped_attention(model)
    assert model.config._attn_implementation == "sdpa"
    asked_for = load_policy("tiny", attn_implementation="sdpa")
    assert asked_for.config._attn_implementation == "sdpa"


def test_the_transformers_engine_pads_on_the_left_in_bf16():
    model, template = load_policy("tiny"), ChatTemplate(load_tokenizer("tiny"))
    world = World(0, 1, torch.device("cpu"))
    settings = EngineSettings(kind="transformers")
    engine = build_engine(settings, model, template, world, torch.bfloat16)
    prompts = [list(range(9, 20)), list(range(30, 36))]
    params = SamplingParams(max_new_tokens=5)
    together = engine.generate(prompts, params, [1, 2])
    alone = engine.generate(prompts[1:], params, [2])
    assert all(math.isfinite(number) for row in together.logprobs for number in row)
    if together.responses[1][0] == alone.responses[0][0]:  # where rounding does not flip the draw
        assert together.logprobs[1][0] == pytest.approx(alone.logprobs[0][0], abs=0.05)
