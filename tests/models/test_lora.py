import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ppomax.config import parse
from ppomax.errors import ConfigError, ModelError
from ppomax.models.heads import ScalarModel, hidden_states, output_weight
from ppomax.models.lora import (
    LoraSettings,
    adapters_off,
    add_lora,
    effective_state_dict,
    has_lora,
    merged_copy,
)
from ppomax.models.tiny import tiny_model

IDS = torch.tensor([[5, 9, 20, 31, 7, 8], [40, 3, 12, 6, 90, 11]])


def model(seed=0, **kwargs):
    return tiny_model(vocab_size=96, hidden_size=32, intermediate=48, seed=seed, **kwargs)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def stirred(adapted, std=0.05):
    """Adapters as after training: B is no longer zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=std, generator=generator)
    return adapted


@pytest.mark.parametrize("build", [model, gpt2])
def test_with_adapters_off_the_model_is_its_base_bitwise(build):
    plain = build()
    before = plain(IDS).logits
    adapted = stirred(add_lora(plain, LoraSettings(rank=4), seed=0))
    assert not torch.equal(adapted(IDS).logits, before)
    with adapters_off(adapted):
        assert torch.equal(adapted(IDS).logits, before)
    assert not torch.equal(adapted(IDS).logits, before)


def test_fresh_adapters_change_nothing():
    plain = model()
    before = plain(IDS).logits
    assert torch.equal(add_lora(plain, LoraSettings(rank=4), seed=0)(IDS).logits, before)


def test_adapters_off_leaves_requires_grad_alone_and_nests():
    adapted = stirred(add_lora(model(), LoraSettings(rank=4), seed=0))
    wanted = {name: p.requires_grad for name, p in adapted.named_parameters()}
    with adapters_off(adapted):
        off = adapted(IDS).logits
        with adapters_off(adapted):
            pass
        assert torch.equal(adapted(IDS).logits, off)
        assert {name: p.requires_grad for name, p in adapted.named_parameters()} == wanted
    assert not torch.equal(adapted(IDS).logits, off)


def test_adapters_come_back_on_after_an_error():
    adapted = stirred(add_lora(model(), LoraSettings(rank=4), seed=0))
    on = adapted(IDS).logits
    with pytest.raises(RuntimeError), adapters_off(adapted):
        raise RuntimeError
    assert torch.equal(adapted(IDS).logits, on)


@pytest.mark.parametrize("build", [model, gpt2])
def test_merged_weights_give_the_adapted_logits(build):
    adapted = stirred(add_lora(build(), LoraSettings(rank=4, alpha=6.0), seed=0))
    on = adapted(IDS).logits
    fresh = build()
    fresh.load_state_dict(effective_state_dict(adapted))
    assert (fresh(IDS).logits - on).abs().max() < 1e-4
    merged = merged_copy(adapted)
    assert not has_lora(merged)
    assert (merged(IDS).logits - on).abs().max() < 1e-4
    assert torch.equal(adapted(IDS).logits, on), "the model itself was changed"


def test_an_effective_weight_is_w_plus_alpha_over_rank_times_b_a():
    adapted = stirred(add_lora(model(), LoraSettings(rank=3, alpha=7.0), seed=0))
    layer = adapted.model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight.detach().clone().double()
    for r in range(3):
        expected += (7.0 / 3) * torch.outer(b[:, r].detach().double(), a[r].detach().double())
    got = effective_state_dict(adapted)["model.layers.1.mlp.up_proj.weight"]
    assert (got - expected).abs().max() < 1e-6


def test_effective_names_are_those_of_the_plain_model():
    plain, adapted = model(tied=False), add_lora(model(tied=False), LoraSettings(rank=2), seed=0)
    assert effective_state_dict(adapted).keys() == plain.state_dict().keys()
    untouched = effective_state_dict(plain)
    assert all(untouched[name].data_ptr() == t.data_ptr() for name, t in plain.state_dict().items())


def test_a_gathered_state_dict_can_stand_in_for_sharded_weights():
    adapted = stirred(add_lora(model(), LoraSettings(rank=2), seed=0))
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    expected = {name: tensor.clone() for name, tensor in effective_state_dict(adapted).items()}
    for parameter in adapted.parameters():
        parameter.data.zero_()
    got = effective_state_dict(adapted, state)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_only_adapters_train_and_in_fp32_on_a_bf16_base():
    adapted = add_lora(model().to(torch.bfloat16), LoraSettings(rank=4), seed=0)
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
    assert "lm_head" not in str([n for n, p in adapted.named_parameters() if p.requires_grad])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as every stage runs a bf16 base
        logits = adapted(IDS).logits
    logits.float().sum().backward()
    weights = effective_state_dict(adapted)
    assert weights["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


def test_the_seed_decides_the_adapters_and_global_random_state_is_kept():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = add_lora(model(), LoraSettings(rank=4), seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = (add_lora(model(), LoraSettings(rank=4), seed=seed) for seed in (1, 2))
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_a_scalar_models_backbone_is_adapted_and_its_score_still_trains():
    scalar = ScalarModel.from_causal_lm(model(tied=False), seed=0)
    before = scalar.values(IDS)
    stirred(add_lora(scalar, LoraSettings(rank=4), seed=0))
    trained = {name for name, p in scalar.named_parameters() if p.requires_grad}
    assert "score.weight" in trained
    assert not any(name.startswith("lm_head") for name in trained)
    assert all(".lora_" in name or name == "score.weight" for name in trained)
    on = scalar.values(IDS)
    with adapters_off(scalar):
        assert torch.equal(scalar.values(IDS), before)
    assert (merged_copy(scalar).values(IDS) - on).abs().max() < 1e-4


def test_hidden_states_look_through_adapters_and_peft_wrappers():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model(), LoraConfig(r=2, target_modules="all-linear"))
    stirred(wrapped)
    logits = hidden_states(wrapped, IDS) @ output_weight(wrapped).T
    assert torch.allclose(logits, wrapped(IDS).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "found"),
    [(["q_projj"], "q_proj"), (["lm_head"], "backbone"), (["mlp"], "not a linear layer")],
)
def test_target_modules_that_cannot_be_adapted_are_refused(targets, found):
    with pytest.raises(ModelError, match=found):
        add_lora(model(), LoraSettings(target_modules=targets), seed=0)


def test_named_targets_alone_are_adapted():
    adapted = add_lora(model(), LoraSettings(rank=2, target_modules=["q_proj", "v_proj"]), seed=0)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in trained)


def test_adapters_are_added_once():
    with pytest.raises(ModelError, match="already"):
        add_lora(add_lora(model(), LoraSettings(), seed=0), LoraSettings(), seed=0)


def test_dropout_in_adapters_is_refused():
    with pytest.raises(ConfigError, match="dropout must be 0"):
        parse(LoraSettings, {"dropout": 0.1})
