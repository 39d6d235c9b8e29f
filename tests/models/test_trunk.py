"""A trunk changes what is computed again and nothing else."""

import copy
import dataclasses
import gc
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from ppomax.data.batching import collate
from ppomax.models import trunk as trunk_module
from ppomax.models.attention import use_grouped_attention
from ppomax.models.blocks import decoder_blocks, freeze_layers
from ppomax.models.fused import use_fused_blocks
from ppomax.models.heads import ScalarModel
from ppomax.models.kernels import kernels_for
from ppomax.models.language import LanguageModel, values_of_replies
from ppomax.models.lean import use_lean_blocks
from ppomax.models.lora import LoraSettings, add_lora
from ppomax.models.tiny import tiny_model
from ppomax.models.trunk import Trunks, common_depth

CPU = torch.device("cpu")
ROWS = [
    ([5, 9, 20, 31, 7, 8], [False, False, True, True, False, True]),
    ([40, 3, 12], [False, True, True]),
]
OTHER = [([6, 9, 20], [False, True, True])]
LAYERS, FROZEN = 4, 3


def llama():
    return tiny_model(vocab_size=64, hidden_size=32, intermediate=48, layers=LAYERS, seed=1)


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": LAYERS, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def roles(build=llama):
    """Policy, critic and reference from one base, as PPO has them."""
    base = build()
    policy = LanguageModel(copy.deepcopy(base))
    critic = ScalarModel.from_causal_lm(copy.deepcopy(base), 0)
    reference = LanguageModel(base).requires_grad_(False)
    for model in (policy, critic):
        freeze_layers(model, FROZEN)
    with torch.no_grad():  # what they were trained to apart from the trunk
        for block in decoder_blocks(critic)[FROZEN:]:
            for weight in block.parameters():
                weight.mul_(1.1)
    return policy, critic, reference


def share_trunks(models, count):
    trunks = Trunks(count)
    for model in models:
        trunks.add(model)
    return trunks.each


def read(model, rows=ROWS):
    batch = collate(rows, 0, CPU)
    if isinstance(model, ScalarModel):
        return model.values(batch.input_ids)[batch.targets]
    return model(batch).logprobs


def gradients(model):
    read(model).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture
def passes():
    """Counts the blocks' own forwards of a model that has yet to get a trunk."""

    def count(model):
        seen = []
        for block in decoder_blocks(model)[:FROZEN]:
            inner = next(m for m in block.modules() if isinstance(m, nn.Module) and m is not block)
            inner.register_forward_hook(lambda *_: seen.append(1))
        return seen

    return count


@pytest.mark.parametrize("build", [llama, gpt2])
def test_scores_and_gradients_are_the_same_to_the_bit(build):
    plain = [(read(model), gradients(model)) for model in roles(build)[:2]]
    models = roles(build)
    trunks = share_trunks(models, FROZEN)
    assert len(trunks) == 1
    for _ in range(2):  # computed, then remembered
        with torch.no_grad():
            assert torch.equal(read(models[0]), plain[0][0])
        for model, (values, grads) in zip(models[:2], plain, strict=True):
            assert torch.equal(read(model), values)
            again = gradients(model)
            assert set(again) == set(grads)
            assert all(torch.equal(again[name], grads[name]) for name in grads)
    assert torch.equal(read(models[2]), read(roles(build)[2]))


def fused_llama():
    model = llama()
    model.set_attn_implementation("sdpa")
    use_grouped_attention(model)
    use_lean_blocks(model)
    use_fused_blocks(model)
    return model.eval()


@pytest.mark.skipif(kernels_for(torch.float32) is None, reason="no C++ compiler")
def test_batches_read_as_prefixes_are_remembered_by_their_lengths_and_apart_from_others():
    shared = [([5, 9, *row], [False, False, *marks]) for row, marks in ROWS]
    shorter = [(shared[0][0][:-1], shared[0][1][:-1]), shared[1]]  # the same ids, if padded with 8

    def readings(models):
        for rows in (shared, shorter, shared):
            batch = collate(rows, 8, CPU)
            for model in models:
                if isinstance(model, ScalarModel):
                    yield model.values(batch.input_ids)
                    yield from values_of_replies(model, batch)
                else:
                    yield model(batch).logprobs

    plain = list(readings(roles(fused_llama)))
    models = roles(fused_llama)
    (trunk,) = share_trunks(models, FROZEN)
    for one, two in zip(readings(models), plain, strict=True):
        assert torch.equal(one, two)
    assert len(trunk) == 4  # as prefixes and token by token
    batch = collate(shared, 8, CPU)
    short = collate(shorter, 8, CPU)
    same = dataclasses.replace(short, input_ids=batch.input_ids, targets=batch.targets)
    same.targets[0, 5:] = False
    models[0](same)
    assert len(trunk) == 5  # the ids of one that is known, in texts of other lengths


def test_a_batch_passes_the_trunk_once_whoever_reads_it(passes):
    models = roles()
    seen = passes(models[0])
    (trunk,) = share_trunks(models, FROZEN)
    seen.clear()
    for model in models:
        read(model)
    assert (len(seen), len(trunk)) == (FROZEN, 1)
    read(models[1], OTHER)
    assert (len(seen), len(trunk)) == (2 * FROZEN, 2)
    trunk.forget()
    assert len(trunk) == 0
    read(models[2])
    assert len(seen) == 3 * FROZEN


def test_bf16_compute_and_fp32_are_remembered_apart():
    models = roles()
    plain = read(models[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = read(models[0])
    assert not torch.equal(plain, rounded)
    share_trunks(models, FROZEN)
    assert torch.equal(read(models[0]), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(read(models[0]), rounded)


def test_the_weights_below_are_held_once_and_a_tied_head_stays_tied():
    policy, critic, reference = roles()
    before = sum(p.numel() for m in (policy, critic, reference) for p in m.parameters())
    share_trunks((policy, critic, reference), FROZEN)
    held = {id(p): p.numel() for m in (policy, critic, reference) for p in m.parameters()}
    block = sum(p.numel() for p in decoder_blocks(policy)[0].parameters())
    embedding = policy.lm.get_input_embeddings().weight
    assert before - sum(held.values()) == 2 * (FROZEN * block + embedding.numel())
    for model in (policy.lm, reference.lm):
        assert model.get_output_embeddings().weight is embedding
        assert model.get_input_embeddings().weight is embedding
    above = [p for p in policy.parameters() if p.requires_grad]
    assert above
    assert not {id(p) for p in above} & {id(p) for p in reference.parameters()}


def test_names_of_weights_stay_what_they_were():
    models = roles()
    names = [sorted(model.state_dict()) for model in models]
    share_trunks(models, FROZEN)
    assert [sorted(model.state_dict()) for model in models] == names


def other_weight(model):
    with torch.no_grad():
        next(decoder_blocks(model)[FROZEN - 1].parameters()).view(-1)[0] += 1e-6


def other_embedding(model):
    backbone = model.backbone if isinstance(model, ScalarModel) else model.lm
    with torch.no_grad():
        backbone.get_input_embeddings().weight[7, 0] += 1e-6


def other_dtype(model):
    model.to(torch.bfloat16)


def other_positions(model):
    model.backbone.rotary_emb.inv_freq.mul_(0.5)


@pytest.mark.parametrize("change", [other_weight, other_embedding, other_dtype, other_positions])
def test_a_model_that_reads_otherwise_keeps_its_own_blocks(change):
    policy, critic, reference = roles()
    change(critic)
    with torch.no_grad():
        plain = read(critic)
    trunks = share_trunks((policy, critic, reference), FROZEN)
    assert len(trunks) == 2  # the critic's own, for its update after its scoring
    read(policy)
    with torch.no_grad():
        assert torch.equal(read(critic), plain)
    assert decoder_blocks(critic)[0] is not decoder_blocks(policy)[0]
    assert decoder_blocks(reference)[0] is decoder_blocks(policy)[0]


def test_a_frozen_model_alone_has_nothing_to_remember():
    policy, _, reference = roles()
    other_weight(reference)
    _, own = share_trunks((policy, reference), FROZEN)
    read(reference)
    assert len(own) == 0
    assert share_trunks((policy, reference), 0) == []


def test_no_more_is_remembered_than_the_bound(monkeypatch):
    models = roles()
    monkeypatch.setattr(trunk_module, "REMEMBERED_BYTES", 2 * 6 * 32 * 4)  # the first batch's
    (trunk,) = share_trunks(models, FROZEN)
    plain = read(roles()[0], OTHER)
    read(models[0])
    for _ in range(2):
        assert torch.equal(read(models[0], OTHER), plain)
    assert len(trunk) == 1
    trunk.forget()
    read(models[0], OTHER)
    assert len(trunk) == 1


def test_a_model_in_a_trunk_is_not_copied():
    policy, critic, _ = roles()
    share_trunks((policy, critic), FROZEN)
    with pytest.raises(TypeError, match="shares a trunk"):
        copy.deepcopy(critic)


def test_depth_in_common_is_counted_from_below():
    policy, critic, reference = roles()
    assert common_depth(policy, reference) == LAYERS
    assert common_depth(policy, critic) == FROZEN
    other_weight(critic)
    assert common_depth(policy, critic) == FROZEN - 1
    other_positions(critic)
    assert common_depth(policy, critic) == 0
    other_embedding(policy)
    assert common_depth(policy, reference) == 0


def longer_window(model):
    model.backbone.config.sliding_window = 128


def test_configs_that_differ_or_too_few_blocks_keep_a_model_apart():
    policy, critic, reference = roles()
    policy.lm.config.sliding_window = reference.lm.config.sliding_window = None
    longer_window(critic)
    assert len(share_trunks((policy, critic, reference), FROZEN)) == 2
    small = [LanguageModel(llama()).requires_grad_(False) for _ in range(2)]
    assert share_trunks(small, LAYERS + 1) == []
    for model in small:
        model.lm.config.num_kv_shared_layers = 2
    assert share_trunks(small, FROZEN) == []
    assert common_depth(*small) == 0


def test_a_mask_of_its_own_is_read_past_what_is_remembered():
    policy, critic, _ = roles()
    batch = collate(ROWS, 0, CPU)
    places = torch.arange(batch.input_ids.shape[1])[None].expand_as(batch.input_ids)
    alone = torch.full((1, 1, places.shape[1], places.shape[1]), torch.finfo(torch.float32).min)
    alone = alone.triu(1) + alone.tril(-1)  # every token sees itself only
    asked = [{"attention_mask": alone.expand(len(ROWS), -1, -1, -1)}, {"position_ids": places + 5}]
    plain = [critic(batch.input_ids, **more).values for more in asked]
    share_trunks((policy, critic), FROZEN)
    whole = read(critic)
    for more, expected in zip(asked, plain, strict=True):
        assert torch.equal(critic(batch.input_ids, **more).values, expected)
    assert not torch.equal(plain[0][batch.targets], whole)


def test_adapters_above_leave_the_trunk_alone():
    base = llama()
    policy = LanguageModel(copy.deepcopy(base))
    add_lora(policy.lm, LoraSettings(rank=2), 0, freeze_layers=FROZEN)
    critic = ScalarModel.from_causal_lm(base, 0)
    add_lora(critic, LoraSettings(rank=2), 1, freeze_layers=FROZEN)
    for model in (policy, critic):
        freeze_layers(model, FROZEN)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(generator=torch.Generator().manual_seed(0))
    plain = [read(model) for model in (policy, critic)]
    (trunk,) = share_trunks((policy, critic), FROZEN)
    assert all(map(torch.equal, plain, [read(model) for model in (policy, critic)]))
    assert len(trunk) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_a_model_that_drops_its_trunk_lets_its_file_go(tmp_path):
    for name in ("owner", "joins"):
        llama().save_pretrained(tmp_path / name)

    def load(name):
        model = type(llama()).from_pretrained(tmp_path / name, attn_implementation="sdpa")
        model = LanguageModel(model)
        freeze_layers(model, FROZEN)
        return model

    def mapped(name):
        return str(tmp_path / name) in Path("/proc/self/maps").read_text(encoding="utf-8")

    owner, joins = load("owner"), load("joins")
    if not mapped("joins"):
        pytest.skip("this version of transformers maps no files")
    before = read(joins).detach()  # its graph holds weights
    [_] = share_trunks([owner, joins], FROZEN)
    gc.collect()
    assert mapped("owner")
    assert not mapped("joins")
    assert torch.equal(read(joins), before)
