"""Blocks of a backbone, and training only the upper ones."""

import copy

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from ppomax.data.batching import collate
from ppomax.errors import ConfigError
from ppomax.models.blocks import decoder_blocks, freeze_layers
from ppomax.models.heads import ScalarModel
from ppomax.models.language import LanguageModel
from ppomax.models.lora import LoraSettings, add_lora
from ppomax.models.tiny import tiny_model
from ppomax.train.optim import OptimSettings, build_optimizer

CPU = torch.device("cpu")
ROWS = [
    ([5, 9, 20, 31, 7, 8], [False, False, True, True, False, True]),
    ([40, 3, 12], [False, True, True]),
]
LAYERS = 4


def llama(tied=True):
    return tiny_model(
        vocab_size=64, hidden_size=32, intermediate=48, layers=LAYERS, tied=tied, seed=1
    )


def gpt2(tied=True):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": LAYERS, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied)).eval()


def loss_of(model):
    batch = collate(ROWS, 0, CPU)
    if isinstance(model, ScalarModel):
        return model.values(batch.input_ids).square().mean()
    return -model(batch).logprobs.mean()


def wrapped(build, kind, tied=True):
    model = build(tied)
    return LanguageModel(model) if kind == "language" else ScalarModel.from_causal_lm(model, 0)


@pytest.mark.parametrize("wrap", [lambda m: m, LanguageModel, lambda m: wrap_scalar(m)])
def test_the_blocks_are_the_repeated_layers(wrap):
    model = llama()
    layers = list(model.model.layers)
    assert decoder_blocks(wrap(model)) == layers


def test_what_feeds_the_blocks_is_frozen_with_them():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "n_layer": LAYERS, "n_head": 2}
    model = LanguageModel(BloomForCausalLM(BloomConfig(**sizes)))
    freeze_layers(model, 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(
        "word_embeddings" in name or "h.0." in name or "h.1." in name for name in trained
    )
    assert any("h.2." in name for name in trained)
    assert any("ln_f" in name for name in trained)


def wrap_scalar(model):
    return ScalarModel.from_causal_lm(model, 0)


def test_a_model_without_repeated_layers_has_no_blocks():
    assert decoder_blocks(nn.Linear(2, 2)) == []


def test_the_largest_list_is_taken_for_the_blocks():
    model = nn.Module()
    model.many = nn.ModuleList([nn.Linear(2, 2) for _ in range(5)])
    model.large = nn.ModuleList([nn.Linear(20, 20) for _ in range(2)])
    assert decoder_blocks(model) == list(model.large)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["language", "scalar"])
@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("count", [1, 3])
def test_frozen_layers_keep_their_bits_and_the_others_get_the_whole_backwards_gradient(
    count, build, kind, tied
):
    whole = wrapped(build, kind, tied)
    upper = copy.deepcopy(whole)
    freeze_layers(upper, count)
    before = {name: p.detach().clone() for name, p in upper.named_parameters()}
    for model in (whole, upper):
        loss_of(model).backward()
    own = dict(whole.named_parameters())
    trained = {name for name, p in upper.named_parameters() if p.grad is not None}
    for name in trained:
        torch.testing.assert_close(upper.get_parameter(name).grad, own[name].grad)
    build_optimizer(upper, OptimSettings(lr=1e-2)).step()
    changed = {n for n, p in upper.named_parameters() if not torch.equal(p, before[n])}
    below = [f".{i}." for i in range(count)] + ["embed", "wte", "wpe"]
    below += ["lm_head"] if kind == "scalar" else []  # no loss here reads it
    expected = {name for name in before if not any(part in name for part in below)}
    assert changed == trained == expected


@pytest.mark.parametrize("build", [llama, gpt2])
def test_nothing_below_the_first_trained_block_keeps_activations(build):
    model = wrapped(build, "language")
    freeze_layers(model, 2)
    entering = {}
    for number, block in enumerate(decoder_blocks(model)):
        block.register_forward_pre_hook(
            lambda _, inputs, number=number: entering.update({number: inputs[0].requires_grad})
        )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss_of(model)
    upper = sum(t.numel() for t in kept)
    assert entering == {0: False, 1: False, 2: False, 3: True}
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss_of(wrapped(build, "language"))
    assert upper < 0.7 * sum(t.numel() for t in kept)


def test_with_lora_only_the_blocks_above_get_adapters_and_the_exported_config_says_so(tmp_path):
    model = add_lora(llama(), LoraSettings(rank=2), 0, freeze_layers=3)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted
    assert all(name.startswith("model.layers.3.") for name in adapted)
    config = model.peft_config["default"]
    assert all(f"model.layers.{i}.mlp.up_proj" in config.exclude_modules for i in range(3))
    critic = add_lora(wrap_scalar(llama()), LoraSettings(rank=2), 0, freeze_layers=1)
    trained = [name for name, p in critic.named_parameters() if p.requires_grad]
    assert not any(".0." in name for name in trained)
    assert "score.weight" in trained
    freeze_layers(critic, 1)
    assert trained == [name for name, p in critic.named_parameters() if p.requires_grad]


def test_the_adapters_above_are_those_that_a_whole_adaptation_would_have_for_named_layers():
    settings = LoraSettings(rank=2, target_modules=["q_proj", "down_proj"])
    model = add_lora(llama(), settings, 0, freeze_layers=2)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    parts = ("self_attn.q_proj", "mlp.down_proj")
    assert adapted == {f"model.layers.{i}.{part}" for i in (2, 3) for part in parts}


def test_more_layers_than_the_model_has_are_refused():
    with pytest.raises(ConfigError, match="freeze_layers: 5 is more than the model's 4 blocks"):
        freeze_layers(llama(), 5)
    with pytest.raises(ConfigError, match="freeze_layers: 5 is more"):
        add_lora(llama(), LoraSettings(), 0, freeze_layers=5)
    with pytest.raises(ConfigError, match="leaves lora no block to adapt"):
        add_lora(llama(), LoraSettings(), 0, freeze_layers=4)
    freeze_layers(llama(), 4)
