import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ppomax.data.batching import collate
from ppomax.distributed import World
from ppomax.models.heads import ScalarModel
from ppomax.models.language import LanguageModel, place, values_before_targets
from ppomax.models.lora import LoraSettings, add_lora
from ppomax.models.tiny import tiny_model

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
ROWS = [
    ([5, 9, 20, 31, 7, 8], [False, False, True, True, False, True]),
    ([40, 3, 12], [False, True, True]),
    ([6, 11, 2, 2], [False, False, False, False]),
]


def small(tied=True, seed=0):
    model = tiny_model(vocab_size=64, hidden_size=32, intermediate=48, tied=tied, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # far enough from zero that attention and every layer count
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def oracle(model, rows, temperature):
    """Each row alone through plain transformers: log-probs and entropy of its targets, in order."""
    logprobs, entropies, plain = [], [], []
    for ids, mask in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        every = torch.log_softmax(logits / temperature, -1)
        for place_, target in enumerate(mask):
            if target:
                logprobs.append(every[place_ - 1, ids[place_]])
                entropies.append(-(every[place_ - 1].exp() * every[place_ - 1]).sum())
                plain.append(torch.log_softmax(logits[place_ - 1], -1)[ids[place_]])
    return torch.stack(logprobs), torch.stack(entropies), torch.stack(plain)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_the_targets_are_plain_transformers_row_by_row(tied, temperature):
    model = small(tied)
    found = LanguageModel(model)(collate(ROWS, 0, CPU), temperature, entropy=True)
    assert found.logprobs.shape == (5,)
    for got, wanted in zip(found[:3], oracle(model, ROWS, temperature), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)


def test_an_architecture_with_positions_and_biases_of_its_own_reads_the_same():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    found = LanguageModel(model)(collate(ROWS, 0, CPU), entropy=True)
    for got, wanted in zip(found[:3], oracle(model, ROWS, 1.0), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)


def test_the_pad_id_and_the_width_of_the_batch_change_nothing():
    model = LanguageModel(small())
    narrow = model(collate(ROWS, 0, CPU))
    wide = model(collate([*ROWS, ([1] * 30, [False] * 30)], 63, CPU))
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_rows_log_probs_do_not_depend_on_its_batch_mates():
    model = LanguageModel(small())
    together = model(collate(ROWS, 0, CPU)).logprobs
    alone = torch.cat([model(collate([row], 0, CPU)).logprobs for row in ROWS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_same_batch_gives_the_same_bits():
    model, batch = LanguageModel(small()), collate(ROWS, 0, CPU)
    assert all(torch.equal(a, b) for a, b in zip(model(batch)[:3], model(batch)[:3], strict=True))


def test_a_batch_without_targets_runs_and_gives_zero_gradients():
    model = LanguageModel(small())
    found = model(collate(ROWS[2:], 0, CPU))
    assert found.logprobs.shape == (0,)
    found.logprobs.sum().backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_plain_transformers(tied):
    model = small(tied)
    other = copy.deepcopy(model)
    found = LanguageModel(model)(collate(ROWS, 0, CPU), 0.8, entropy=True)
    (found.logprobs.sum() - 0.2 * found.entropy.sum()).backward()
    logprobs, entropies, _ = oracle(other, ROWS, 0.8)
    (logprobs.sum() - 0.2 * entropies.sum()).backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_recomputing_activations_changes_no_gradient():
    plain, saving = LanguageModel(small()), LanguageModel(small())
    place(plain, ALONE)
    place(saving, ALONE, checkpointing=True)
    batch = collate(ROWS, 0, CPU)
    for model in (plain, saving):
        model(batch).logprobs.sum().backward()
    assert saving.lm.is_gradient_checkpointing
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_under_autocast_log_probs_are_fp32_and_close():
    model, batch = LanguageModel(small()), collate(ROWS, 0, CPU)
    exact = model(batch).logprobs.detach()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch).logprobs.detach()
    assert rounded.dtype == torch.float32
    assert 0 < float((exact - rounded).abs().max()) < 0.2


# --- the critic


def test_values_are_those_of_the_state_in_which_each_target_was_chosen():
    model = ScalarModel.from_causal_lm(small(), 0)
    found = values_before_targets(model, collate(ROWS, 0, CPU))
    wanted = [
        float(model.values(torch.tensor([ids]))[0, at - 1].detach())
        for ids, mask in ROWS
        for at, target in enumerate(mask)
        if target
    ]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)


# --- places


def test_placing_alone_leaves_the_parameters_as_they_are():
    model = LanguageModel(add_lora(small(), LoraSettings(rank=2), 0))
    before = [p.detach().clone() for p in model.parameters()]
    place(model, ALONE)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model.lm.is_gradient_checkpointing
