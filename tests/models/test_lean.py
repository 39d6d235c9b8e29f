"""Norm and gated MLP against their formulas, and against the library's that they stand for."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ppomax.models import fused
from ppomax.models.heads import hidden_states
from ppomax.models.lean import (
    GatedMLP,
    Norm,
    is_lean,
    rms_norm,
    swiglu,
    use_lean_blocks,
    use_mixed_norms,
)
from ppomax.models.load import load_policy, load_value_model


def drawn(seed, rows, width):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, width, generator=generator) * 3
    weight = torch.rand(width, generator=generator) + 0.5
    gradient = torch.randn(x.shape, generator=generator).to(torch.bfloat16)
    return x.requires_grad_(), weight.requires_grad_(), gradient


def by_hand(x, weight, eps):
    """One token at a time, from the definition, in float64."""
    rows = [
        weight * row / torch.sqrt((row * row).sum() / len(row) + eps)
        for row in x.reshape(-1, x.shape[-1])
    ]
    return torch.stack(rows).view(x.shape)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 4),
    width=st.integers(1, 9),
    eps=st.sampled_from([1e-6, 1e-2, 1.0]),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_s_values_and_gradients_are_those_of_the_formula(dtype, seed, rows, width, eps):
    x, weight, gradient = drawn(seed, rows, width)
    found = rms_norm(x, weight, eps, dtype)
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wanted = by_hand(*exact, eps)
    assert found.dtype == dtype
    rounding = 0.51 if dtype == torch.bfloat16 else 4.0  # half a unit: rounded once, at the end
    rtol = rounding * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=1e-6)
    gradients = torch.autograd.grad(found, (x, weight), gradient.to(dtype))
    for one, two in zip(
        gradients, torch.autograd.grad(wanted, exact, gradient.double()), strict=True
    ):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-5)


def test_limits_length_does_not_matter_and_no_gradient_goes_along_the_vector():
    x, weight, gradient = drawn(0, 3, 8)
    fp32 = torch.float32
    assert torch.equal(rms_norm(4 * x, weight, 0.0, fp32), rms_norm(x, weight, 0.0, fp32))
    [found] = torch.autograd.grad(rms_norm(x, weight, 0.0, fp32), x, gradient.float())
    along = (found * x).sum(-1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-5)
    flat = rms_norm(torch.full((1, 1, 8), -4.0), weight.detach(), 0.0, fp32)
    assert torch.equal(flat[0, 0], -weight.detach())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), rows=st.integers(1, 4), width=st.integers(1, 9))
def test_the_gate_s_values_and_gradients_are_those_of_the_formula(seed, rows, width):
    gate, _, gradient = drawn(seed, rows, width)
    up = drawn(seed + 1, rows, width)[0]
    found = swiglu(gate, up)
    exact = [one.detach().double().requires_grad_() for one in (gate, up)]
    wanted = exact[0] / (1 + (-exact[0]).exp()) * exact[1]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(found, (gate, up), gradient.float())
    for one, two in zip(
        gradients, torch.autograd.grad(wanted, exact, gradient.double()), strict=True
    ):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)


def test_limits_an_open_gate_is_a_product_and_a_shut_one_lets_nothing_through():
    up = torch.arange(-3.0, 4.0)
    assert torch.equal(swiglu(torch.full_like(up, 100.0), up), 100 * up)
    assert torch.equal(swiglu(torch.full_like(up, -200.0), up), torch.zeros_like(up))


def test_a_frozen_weight_gets_no_gradient_and_its_input_does():
    x, weight, gradient = drawn(0, 3, 8)
    rms_norm(x, weight.requires_grad_(False), 1e-6, torch.bfloat16).backward(gradient)
    assert weight.grad is None
    assert x.grad is not None


def found_in(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A loaded model, and its export as plain `transformers` reads it, attention alike."""
    folder = tmp_path_factory.mktemp("model")
    model = load_policy("tiny")
    generator = torch.Generator().manual_seed(0)
    for norm in found_in(model, Norm):  # as trained ones are: not all 1
        norm.weight.data = torch.rand(norm.weight.shape, generator=generator) + 0.5
    model.save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.set_attn_implementation(model.config._attn_implementation)
    return model, plain


def run(model, ids, **named):
    """Last hidden states, and the bytes that autograd kept for backward."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, **named):
        return hidden_states(model, ids), sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_has_them_and_computes_the_library_s_bits(pair, dtype, monkeypatch):
    monkeypatch.setattr(fused, "kernels_for", lambda dtype: None)
    model, plain = (copy.deepcopy(one).to(dtype) for one in pair)
    assert len(found_in(model, Norm)) == 2 * model.config.num_hidden_layers
    assert len(found_in(model, GatedMLP)) == model.config.num_hidden_layers
    assert (is_lean(model), is_lean(plain)) == (True, False)
    assert model.state_dict().keys() == plain.state_dict().keys()
    ids = torch.arange(60).view(2, 30)
    for autocast in (True, False):
        (found, kept), (wanted, more) = (run(one, ids, enabled=autocast) for one in (model, plain))
        assert torch.equal(found, wanted)
        if autocast or dtype == torch.float32:
            assert kept < 0.8 * more


def test_gradients_of_a_model_are_no_further_from_float32_than_the_library_s(pair):
    ids = torch.randint(5, 200, (4, 40), generator=torch.Generator().manual_seed(0))

    def gradient(model, **named):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, **named):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()

    model, plain = pair
    exact = gradient(plain, enabled=False)
    ours, theirs = ((gradient(one) - exact).norm() for one in (model, plain))
    assert 0 < theirs < 0.1 * exact.norm()
    assert ours < 1.2 * theirs


def test_a_reward_model_has_them_and_what_is_not_known_keeps_its_own():
    assert is_lean(load_value_model("tiny", init_from_lm=True).backbone)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
    config = Qwen3Config(vocab_size=64, intermediate_size=64, num_key_value_heads=1, **sizes)
    model = Qwen3ForCausalLM(config)
    block = model.model.layers[0]
    for part in (block, block.input_layernorm):  # a block, or a norm, from elsewhere
        own = type(part)
        part.__class__ = type("Other" + own.__name__, (own,), {})
        use_lean_blocks(model)
        part.__class__ = own
        assert not isinstance(block.input_layernorm, Norm)
    model = Qwen3ForCausalLM(config)
    model.config = PreTrainedConfig()  # a composite one keeps the activation elsewhere
    use_lean_blocks(model)
    assert not is_lean(model)
    model = Qwen3ForCausalLM(config)
    use_lean_blocks(model)
    assert len(found_in(model, Norm)) == 2  # those of queries and keys are no linear layer's


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYER_NORMS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SMALL, intermediate_size=48)),
}


@pytest.mark.parametrize("family", LAYER_NORMS)
def test_frozen_models_with_layer_norms_read_as_their_masters_do_under_autocast(family):
    torch.manual_seed(0)
    masters = LAYER_NORMS[family]().eval()
    with torch.no_grad():
        for parameter in masters.parameters():
            parameter.copy_(parameter.bfloat16())
    frozen = copy.deepcopy(masters).bfloat16()
    ids = torch.randint(0, 64, (2, 9))
    found = []
    for model in (masters, frozen):
        use_mixed_norms(model)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(hidden_states(model, ids).float())
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)
    with torch.no_grad():
        frozen(input_ids=ids)  # and as an engine reads it, all in bf16
