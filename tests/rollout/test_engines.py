import copy
import dataclasses
from itertools import chain

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ppomax.data.batching import collate, derived_seed
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.models.compiled import library
from ppomax.models.language import LanguageModel
from ppomax.models.lora import Factors, LoraSettings, add_lora, merged_copy
from ppomax.models.tiny import tiny_tokenizer
from ppomax.rollout import (
    EngineSettings,
    SamplingParams,
    build_engine,
    cache,
    graphs,
    kernels,
    native,
    sampling,
)
from ppomax.rollout.graphs import StepGraphs
from ppomax.rollout.native import NativeEngine, supports
from ppomax.rollout.product import Product, pack
from ppomax.rollout.reply import Reply, columns_after, columns_of
from ppomax.rollout.transformers_engine import TransformersEngine

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
TEXTS = ["the sea is wide and the ship is small", "rice, water, salt"] * 20
TEMPLATE = ChatTemplate(tiny_tokenizer(TEXTS, 300))
END = TEMPLATE.end_id
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "eos_token_id": END,
    "pad_token_id": 3,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
}

MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
    "llama all heads": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "llama wide heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 12}),
    "llama rope": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama yarn": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN_ROPE}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2 tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 8}),
}


def make(name, seed=0, **changes):
    """A model whose every weight matters: no norm is 1, no bias 0, replies end now and then."""
    kind, config, extra = MODELS[name]
    model = kind(config(**(SIZES | extra | changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key:
                parameter.copy_(1 + 0.3 * noise)
            elif key.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 0.3)
        model.get_output_embeddings().weight[END] *= 1.8
    return model


def prompts_of(count, seed=0, low=1, high=20):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(4, 300, (n,), generator=generator).tolist() for n in lengths]


def seeds_of(count, name="reply"):
    return [derived_seed(name, index) for index in range(count)]


def engine_of(model, kind="native", slots=64, dtype=torch.float32, template=TEMPLATE, **settings):
    settings = EngineSettings(kind=kind, slots=slots, **settings)
    return build_engine(settings, model, template, ALONE, dtype)


def teacher_forced(model, rollout, temperature=1.0):
    """The trainer's log-probs of the replies, row by row."""
    rows = [
        (prompt + reply, [False] * len(prompt) + [True] * len(reply))
        for prompt, reply in zip(rollout.prompts, rollout.responses, strict=True)
    ]
    with torch.no_grad():
        flat = LanguageModel(model)(collate(rows, 3, CPU), temperature).logprobs
    return flat.split([len(reply) for reply in rollout.responses])


def is_well_formed(rollout, params):
    for prompt, reply, logprobs, finished in zip(
        rollout.prompts, rollout.responses, rollout.logprobs, rollout.finished, strict=True
    ):
        assert prompt
        assert 1 <= len(reply) <= params.max_new_tokens
        assert len(logprobs) == len(reply)
        assert END not in reply[:-1], "nothing follows the end"
        if not params.stop:
            assert finished == (reply[-1] == END)
        assert max(logprobs) <= 1e-6


def agree(first, second, share=0.99):
    """Nearly all replies the same; log-probs the same up to where two replies part.

    Where a nucleus ends within rounding of top-p, one token more or less is in it: nearly all.
    """
    same, gaps = 0, []
    for a, b, p, q in zip(
        first.responses, second.responses, first.logprobs, second.logprobs, strict=True
    ):
        same += a == b
        common = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
        common = min(common, len(a), len(b))
        gaps += [abs(x - y) for x, y in zip(p[:common], q[:common], strict=True)]
    assert same >= share * len(first.responses)
    assert sum(gap <= 1e-4 for gap in gaps) >= 0.99 * len(gaps)
    assert max(gaps, default=0.0) < 0.05


PARAMS = SamplingParams(max_new_tokens=24)
NUCLEUS = SamplingParams(temperature=0.9, top_p=0.95, max_new_tokens=24)
PAPER = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1, max_new_tokens=24)


# --- which engine


def test_the_engine_asked_for_is_built_and_unknown_architectures_fall_back():
    assert isinstance(engine_of(make("llama")), NativeEngine)
    assert isinstance(engine_of(make("llama"), "transformers"), TransformersEngine)
    assert isinstance(engine_of(gpt2()), TransformersEngine)
    assert "gpt2" in engine_of(gpt2()).note
    assert engine_of(make("llama")).note is None
    assert engine_of(gpt2(), "transformers").note is None, "asked for"


def gpt2(positions=64):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, n_positions=positions, bos_token_id=0, eos_token_id=END)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_models_that_compute_otherwise_are_not_taken():
    assert all(supports(make(name)) for name in MODELS)
    assert not supports(gpt2())
    assert not supports(make("mistral", sliding_window=8))
    assert not supports(make("qwen2", use_sliding_window=True, sliding_window=8))
    assert not supports(make("llama", hidden_act="gelu"))


def test_a_model_with_biases_in_its_mlp_is_computed_with_them_or_not_taken():
    model = make("llama", mlp_bias=True)
    rollout = engine_of(model).generate(prompts_of(6), PARAMS, seeds_of(6))
    for got, wanted in zip(rollout.logprobs, teacher_forced(model, rollout), strict=True):
        torch.testing.assert_close(torch.tensor(got), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_rotary_embedding_that_changes_with_the_length_is_followed(kind):
    half = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model = make("llama", rope_parameters=rope)
    engine = engine_of(model, kind)
    rollout = engine.generate(prompts_of(6, low=20, high=30), PARAMS, seeds_of(6))
    for index, got in enumerate(rollout.logprobs):
        one = [[x[index]] for x in (rollout.prompts, rollout.responses)]
        wanted = teacher_forced(model, type(rollout)(one[0], one[1], [got], [True]))[0]
        torch.testing.assert_close(torch.tensor(got), wanted, rtol=0, atol=1e-4)


# --- the two engines and the trainer


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("params", [PARAMS, PAPER], ids=["plain", "paper"])
def test_both_engines_give_the_same_replies_for_the_same_seeds(name, params):
    model, prompts, seeds = make(name), prompts_of(20), seeds_of(20)
    ours = engine_of(model, "native").generate(prompts, params, seeds)
    theirs = engine_of(model, "transformers").generate(prompts, params, seeds)
    is_well_formed(ours, params)
    is_well_formed(theirs, params)
    agree(ours, theirs)
    assert ours.finished == theirs.finished
    assert any(ours.finished), "some replies end"
    assert not all(ours.finished), "some are cut"
    assert len({tuple(reply) for reply in ours.responses}) > 15


@pytest.mark.parametrize("kind", ["native", "transformers"])
@pytest.mark.parametrize("name", [*MODELS, "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_engines_log_probs_are_the_trainers(kind, name, temperature):
    model = gpt2() if name == "gpt2" else make(name)
    params = SamplingParams(max_new_tokens=24, temperature=temperature)
    rollout = engine_of(model, kind).generate(prompts_of(12), params, seeds_of(12))
    wanted = teacher_forced(model, rollout, temperature)
    for got, each in zip(rollout.logprobs, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(got), each, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "qwen3", "mistral"])
def test_greedy_replies_are_those_of_transformers_own_generate(kind, name):
    model, prompts = make(name), prompts_of(8)
    params = SamplingParams(temperature=0, max_new_tokens=20)
    rollout = engine_of(model, kind).generate(prompts, params, seeds_of(8))
    for prompt, reply in zip(prompts, rollout.responses, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=END,
            pad_token_id=3,
        )
        assert reply == wanted[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_nothing_is_taken_from_the_models_generation_config(kind):
    model = make("llama")
    before = engine_of(model, kind).generate(prompts_of(6), PARAMS, seeds_of(6))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.1
    model.generation_config.max_new_tokens = 2
    model.generation_config.top_k = 1
    after = engine_of(model, kind).generate(prompts_of(6), PARAMS, seeds_of(6))
    assert after.responses == before.responses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_bf16_log_probs_stay_close_to_the_trainers_under_autocast(kind):
    model = make("llama")
    rollout = engine_of(model, kind, dtype=torch.bfloat16).generate(
        prompts_of(16), PARAMS, seeds_of(16)
    )
    is_well_formed(rollout, PARAMS)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = torch.cat(teacher_forced(model, rollout))
    gap = (torch.tensor(list(chain.from_iterable(rollout.logprobs))) - wanted).abs()
    assert float(gap.mean()) < 0.05
    assert float(gap.mean()) > 1e-5, "it computed in fp32"


def test_rotary_frequencies_are_the_trainers_in_bf16_too():
    model = make("mistral", sliding_window=8)
    held = engine_of(model, "transformers", dtype=torch.bfloat16).model
    assert held.lm_head.weight.dtype == torch.bfloat16
    rotary = held.model.rotary_emb
    assert torch.equal(rotary.inv_freq, model.model.rotary_emb.inv_freq)
    assert rotary.inv_freq.dtype == torch.float32


# --- seeds


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_two_rollouts_with_different_seeds_differ_and_with_the_same_seeds_do_not(kind):
    engine, prompts = engine_of(make("llama"), kind), prompts_of(8)
    first = engine.generate(prompts, PARAMS, seeds_of(8))
    torch.rand(3)
    again = engine.generate(prompts, PARAMS, seeds_of(8))
    other = engine.generate(prompts, PARAMS, seeds_of(8, "other"))
    assert first == again
    assert all(a != b for a, b in zip(first.responses, other.responses, strict=True))


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_several_replies_to_one_prompt_differ_by_their_seeds_alone(kind):
    engine = engine_of(make("llama"), kind)
    prompt = prompts_of(1)[0]
    rollout = engine.generate([prompt] * 8, PARAMS, seeds_of(4) * 2)
    assert rollout.responses[:4] == rollout.responses[4:]
    assert len({tuple(reply) for reply in rollout.responses}) == 4


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_longer_limit_only_adds_to_a_reply(kind):
    engine, prompts, seeds = engine_of(make("llama"), kind), prompts_of(8), seeds_of(8)
    short = engine.generate(prompts, SamplingParams(max_new_tokens=5), seeds)
    long = engine.generate(prompts, SamplingParams(max_new_tokens=15), seeds)
    assert [reply[:5] for reply in long.responses] == short.responses


# --- slots and order


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "slots"), [("native", 1), ("native", 8), ("native", 17), ("transformers", 8)]
)
@pytest.mark.parametrize("params", [PARAMS, PAPER], ids=["plain", "paper"])
def test_fewer_slots_than_prompts_give_the_same_replies(kind, slots, params):
    model, prompts, seeds = make("qwen2"), prompts_of(24), seeds_of(24)
    together = engine_of(model, kind, slots=64).generate(prompts, params, seeds)
    refilled = engine_of(model, kind, slots=slots).generate(prompts, params, seeds)
    is_well_formed(refilled, params)
    agree(together, refilled)


class ReplayedEagerly(StepGraphs):
    """The fixed shapes of recorded steps, without a device that records."""

    def _record(self, span):
        if self.logits is None:
            self.logits = torch.empty_like(graphs.logits_of(self.step(self.given, span)))
        found = self._kept(self.step(self.given, span))
        flat = tree_leaves(found)

        class Replay:
            def replay(_):
                again = tree_leaves(self._kept(self.step(self.given, span)))
                for before, now in zip(flat, again, strict=True):
                    if before is not None:
                        before.copy_(now)

        return Replay(), found


@pytest.mark.slow
@pytest.mark.parametrize("slots", [5, 16, 64])
@pytest.mark.parametrize("params", [PARAMS, PAPER, NUCLEUS], ids=["plain", "paper", "nucleus"])
def test_steps_of_fixed_shape_give_the_same_replies(monkeypatch, slots, params):
    monkeypatch.setattr(graphs, "SPAN", 8)
    monkeypatch.setattr(sampling, "CANDIDATES", 16)
    model, prompts, seeds = make("llama"), prompts_of(24), seeds_of(24)
    prompts = [[7, 8, *prompt] for prompt in prompts]  # a free slot leaves what all begin with
    engine, made = engine_of(model, slots=slots, kernels=False), []  # as it is on CUDA
    before = engine.generate(prompts, params, seeds)
    plain = engine._stepper

    def stepper(slots, cache, params):
        step = plain(slots, cache, params)
        made.append(ReplayedEagerly(step, slots, cache.cos.shape[0], CPU))
        return made[-1]

    monkeypatch.setattr(engine, "_stepper", stepper)
    fixed = engine.generate(prompts, params, seeds)
    is_well_formed(fixed, params)
    agree(before, fixed)
    [steps] = made
    assert 3 <= len(steps.graphs) <= 6, "one for every span of 8 positions up to 44"


@pytest.mark.parametrize(
    ("needed", "length", "span"), [(1, 300, 64), (64, 300, 64), (65, 300, 128), (290, 300, 300)]
)
def test_a_span_holds_what_is_needed_and_no_more_than_the_cache(needed, length, span, monkeypatch):
    monkeypatch.setattr(graphs, "SPAN", 64)
    assert graphs.span_of(needed, length) == span


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 30, 100])
def test_prefilling_in_small_parts_gives_the_same_replies(monkeypatch, tokens):
    model, prompts, seeds = make("llama"), prompts_of(20), seeds_of(20)
    before = engine_of(model).generate(prompts, PARAMS, seeds)
    monkeypatch.setattr(native, "PREFILL_TOKENS", tokens)
    agree(before, engine_of(model, slots=7).generate(prompts, PARAMS, seeds))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_permutation_of_the_prompts_permutes_the_replies(kind):
    engine, prompts, seeds = engine_of(make("llama"), kind, slots=5), prompts_of(24), seeds_of(24)
    first = engine.generate(prompts, PARAMS, seeds)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    turned = engine.generate([prompts[i] for i in order], PARAMS, [seeds[i] for i in order])
    assert turned.prompts == [prompts[i] for i in order]
    picked = type(first)(*([part[i] for i in order] for part in parts_of(first)))
    agree(picked, turned)


def parts_of(rollout):
    return rollout.prompts, rollout.responses, rollout.logprobs, rollout.finished


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_reply_does_not_depend_on_its_batch_mates(kind):
    engine, prompts, seeds = engine_of(make("llama"), kind), prompts_of(12), seeds_of(12)
    together = engine.generate(prompts, PARAMS, seeds)
    alone = [engine.generate([p], PARAMS, [s]) for p, s in zip(prompts, seeds, strict=True)]
    parts = zip(*map(parts_of, alone), strict=True)
    joined = type(together)(*(list(chain.from_iterable(part)) for part in parts))
    agree(together, joined)


def endless():
    """A template whose replies never end, so that every step has the same shape."""
    template = ChatTemplate(tiny_tokenizer(TEXTS, 300))
    template.end_ids = frozenset()
    return template


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_in_the_same_slot_and_shape_a_reply_is_bitwise_the_same_beside_any_others(name):
    engine = engine_of(make(name), slots=5, template=endless())
    first, others = prompts_of(15), prompts_of(15, seed=1)
    mixed = [
        a if i % 4 == 0 else (b * 20)[: len(a)]
        for i, (a, b) in enumerate(zip(first, others, strict=True))
    ]
    assert len(set(map(tuple, first + mixed))) > 22
    found = engine.generate(first, PARAMS, seeds_of(15))
    beside = engine.generate(mixed, PARAMS, seeds_of(15))
    for index in range(0, 15, 4):
        assert found.responses[index] == beside.responses[index]
        assert found.logprobs[index] == beside.logprobs[index]
    assert found.responses[1] != beside.responses[1]


@pytest.mark.slow
def test_in_any_company_64_tokens_are_the_same_but_where_two_tokens_tie(monkeypatch):
    monkeypatch.setattr(sampling, "CANDIDATES", 300)  # all of them, so that the best two are known
    model = make("llama")
    prompts, seeds = prompts_of(400), seeds_of(400)
    params = SamplingParams(max_new_tokens=64)
    found = engine_of(model, slots=64).generate(prompts, params, seeds)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()
    turned = engine_of(model, slots=9).generate(
        [prompts[i] for i in order], params, [seeds[i] for i in order]
    )
    same = 0
    for place, index in enumerate(order):
        one, other = found.responses[index], turned.responses[place]
        same += one == other
        pairs = zip(one, other, strict=False)
        common = next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(one), len(other)))
        p, q = found.logprobs[index][:common], turned.logprobs[place][:common]
        assert all(abs(x - y) <= 1e-4 for x, y in zip(p, q, strict=True))
        if one != other:
            assert margin(model, prompts[index] + one[:common], seeds[index], common) < 1e-4
    assert same >= 0.995 * 400
    assert sum(map(len, found.responses)) > 400 * 20


def margin(model, ids, seed, step):
    """How far the best perturbed logit of the next token is above the second."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    every = torch.arange(len(logits))[None]
    noise = sampling.gumbel(torch.tensor([seed]), torch.tensor([step]), every)[0]
    best, second = (logits + noise).topk(2).values.tolist()
    return best - second


# --- shared prompts


@pytest.mark.slow
@pytest.mark.parametrize("slots", [8, 64])
@pytest.mark.parametrize("params", [PARAMS, PAPER], ids=["plain", "paper"])
def test_replies_to_one_prompt_are_those_of_prompts_computed_one_by_one(slots, params):
    model, few = make("qwen3"), prompts_of(6)
    prompts = [few[i % 6] for i in range(20)] + [few[0]] * 4
    alone = engine_of(model, slots=2).generate(prompts, params, seeds_of(24))
    shared = engine_of(model, slots=slots).generate(prompts, params, seeds_of(24))
    agree(alone, shared)
    assert len({tuple(reply) for reply in shared.responses}) > 20


@pytest.mark.parametrize("compiled", [False, True])
def test_a_prompt_shared_by_replies_that_start_together_is_computed_once(monkeypatch, compiled):
    counted = []
    multiplied, read = Product.__call__, kernels.Kernels.read

    def count(self, x):
        counted.append(len(x))
        return multiplied(self, x)

    def count_all(self, layers, stream, *more):
        counted.extend([len(stream)] * 4 * len(layers))
        read(self, layers, stream, *more)

    monkeypatch.setattr(Product, "__call__", count)
    monkeypatch.setattr(kernels.Kernels, "read", count_all)
    few = prompts_of(4, low=5)
    params = SamplingParams(max_new_tokens=2)
    engine = engine_of(make("llama"), kernels=compiled)
    engine.generate([few[i % 4] for i in range(12)], params, seeds_of(12))
    assert counted[:8] == [sum(map(len, few))] * 8, "no padding, no second copy"
    assert set(counted[8:]) <= {*range(1, 13)}
    counted.clear()
    engine.generate([[5, 6, 7, *few[i % 4]] for i in range(12)], params, seeds_of(12))
    assert counted[:16] == [3] * 8 + [sum(map(len, few))] * 8, "nor the beginning of all"


@pytest.mark.parametrize(
    ("prompts", "opening"),
    [
        ([[1, 2, 3, 4], [1, 9, 9], [1, 2, 3, 5]], [1]),
        ([[1, 2, 3, 4], [1, 2, 7], [1, 2, 3, 5]], [1, 2]),
        ([[1, 2, 3], [1, 2]], [1]),
        ([[4, 5, 6], [4, 5, 6]], [4, 5]),
        ([[4, 5, 6]], [4, 5]),
        ([[7], [7, 8]], []),
        ([[7, 8], [8, 7]], []),
    ],
)
def test_an_opening_is_what_every_prompt_begins_with_and_goes_on_from(prompts, opening):
    assert cache.opening_of(prompts) == opening


@pytest.mark.parametrize("slots", [3, 64])
@pytest.mark.parametrize(("compiled", "name"), [(True, "llama"), (True, "qwen3"), (False, "qwen3")])
def test_what_all_prompts_begin_with_changes_nothing(slots, compiled, name):
    model, opening = make(name), prompts_of(1, seed=1, low=9)[0]
    prompts = [opening + prompt for prompt in prompts_of(20)]
    prompts[3], prompts[4] = opening[:-1], opening  # one ends where the others go on
    engine, seeds = engine_of(model, slots=slots, kernels=compiled), seeds_of(20)
    found = engine.generate(prompts, PARAMS, seeds)
    for got, wanted in zip(found.logprobs, teacher_forced(model, found), strict=True):
        torch.testing.assert_close(torch.tensor(got), wanted, rtol=0, atol=1e-4)
    with_another = engine.generate([*prompts, [4]], PARAMS, [*seeds, 1])
    fields = dataclasses.asdict(with_another)
    alone = type(found)(**{name: each[:20] for name, each in fields.items()})
    if compiled:
        assert found == alone
    else:
        agree(found, alone, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_the_prompts_are_given_back_untouched(kind):
    prompts = prompts_of(6)
    before = copy.deepcopy(prompts)
    rollout = engine_of(make("llama"), kind, slots=2).generate(prompts, PARAMS, seeds_of(6))
    assert prompts == before == rollout.prompts


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_no_prompts_give_no_replies(kind):
    rollout = engine_of(make("llama"), kind).generate([], PARAMS, [])
    assert parts_of(rollout) == ([], [], [], [])


# --- ends


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_reply_that_ends_holds_the_end_once_and_last(kind):
    rollout = engine_of(make("llama"), kind, slots=9).generate(
        prompts_of(40), SamplingParams(max_new_tokens=40), seeds_of(40)
    )
    ended = [reply for reply, done in zip(rollout.responses, rollout.finished, strict=True) if done]
    assert len(ended) > 5
    assert all(reply.count(END) == 1 and reply[-1] == END for reply in ended)
    cut = [r for r, done in zip(rollout.responses, rollout.finished, strict=True) if not done]
    assert all(END not in reply and len(reply) == 40 for reply in cut)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_an_end_on_the_very_last_token_still_counts_as_finished(kind):
    engine, prompts, seeds = engine_of(make("llama"), kind), prompts_of(40), seeds_of(40)
    rollout = engine.generate(prompts, PARAMS, seeds)
    index = next(i for i, done in enumerate(rollout.finished) if done)
    limit = len(rollout.responses[index])
    exact = engine.generate(prompts, SamplingParams(max_new_tokens=limit), seeds)
    assert exact.finished[index]
    assert exact.responses[index] == rollout.responses[index]


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_one_token_is_a_reply(kind):
    params = SamplingParams(max_new_tokens=1)
    rollout = engine_of(make("llama"), kind, slots=3).generate(prompts_of(10), params, seeds_of(10))
    assert [len(reply) for reply in rollout.responses] == [1] * 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_stop_string_ends_a_reply_where_it_is_complete(kind):
    engine, prompts, seeds = engine_of(make("llama"), kind, slots=5), prompts_of(16), seeds_of(16)
    free = engine.generate(prompts, PARAMS, seeds)
    texts = [TEMPLATE.decode(reply) for reply in free.responses]
    stop = next(text[4:6] for text in texts if text[4:6].isascii() and len(text) > 8)
    params = SamplingParams(max_new_tokens=24, stop=["never said", stop])
    found = engine.generate(prompts, params, seeds)
    stopped = 0
    for before, after, done in zip(free.responses, found.responses, found.finished, strict=True):
        assert before[: len(after)] == after
        if stop in TEMPLATE.decode(before):
            stopped += 1
            assert done
            assert stop in TEMPLATE.decode(after)
            assert stop not in TEMPLATE.decode(after[:-1])
        else:
            assert after == before
    assert stopped


# --- positions


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_reply_stops_where_the_models_positions_end(kind):
    model = make("llama", max_position_embeddings=32)
    prompts = [*prompts_of(6, high=10), list(range(4, 4 + 28)), list(range(4, 4 + 31))]
    params = SamplingParams(max_new_tokens=64)
    rollout = engine_of(model, kind, slots=3).generate(prompts, params, seeds_of(8))
    is_well_formed(rollout, params)
    for prompt, reply, done in zip(prompts, rollout.responses, rollout.finished, strict=True):
        assert len(prompt) + len(reply) <= 32
        assert done or len(prompt) + len(reply) == 32


def test_a_model_with_learned_positions_is_not_run_past_them():
    model = gpt2(positions=24)
    rollout = engine_of(model).generate(
        prompts_of(4, low=10, high=20), SamplingParams(max_new_tokens=40), seeds_of(4)
    )
    for prompt, reply in zip(rollout.prompts, rollout.responses, strict=True):
        assert len(prompt) + len(reply) <= 24


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_prompt_that_leaves_no_position_is_refused_in_one_line(kind):
    from ppomax.errors import PpomaxError

    model = make("llama", max_position_embeddings=16)
    with pytest.raises(PpomaxError, match="16"):
        engine_of(model, kind).generate([[5] * 20], PARAMS, seeds_of(1))


# --- weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "qwen3"])
def test_sync_takes_over_every_changed_weight(kind, name):
    model = make(name)
    engine = engine_of(model, kind)
    other = make(name, seed=1)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
            parameter.copy_(value)
    engine.sync(model)
    found = engine.generate(prompts_of(6), PARAMS, seeds_of(6))
    fresh = engine_of(other, kind).generate(prompts_of(6), PARAMS, seeds_of(6))
    assert found.responses == fresh.responses
    assert found.logprobs == fresh.logprobs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_each_single_weight_counts(kind):
    model, prompts, seeds = make("qwen3"), prompts_of(3), seeds_of(3)
    few = SamplingParams(max_new_tokens=3)
    engine = engine_of(model, kind)
    before = engine.generate(prompts, few, seeds)
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.7)
        engine.sync(model)
        after = engine.generate(prompts, few, seeds)
        assert after.logprobs != before.logprobs, name
        with torch.no_grad():
            parameter.copy_(kept)
    engine.sync(model)
    assert engine.generate(prompts, few, seeds) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen3"])
def test_an_engines_weights_do_not_change_until_it_is_synced(kind, name):
    model = make(name)
    engine = engine_of(model, kind)
    before = engine.generate(prompts_of(4), PARAMS, seeds_of(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert engine.generate(prompts_of(4), PARAMS, seeds_of(4)) == before


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_generating_changes_neither_the_model_nor_its_mode_nor_its_gradients(kind):
    model = make("llama").train()
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    values = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    engine_of(model, kind, dtype=torch.bfloat16).generate(prompts_of(3), PARAMS, seeds_of(3))
    assert model.training
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_building_an_engine_leaves_the_global_random_state_alone(kind):
    model = make("llama")
    before = torch.random.get_rng_state()
    engine_of(model, kind)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "transformers"])
@pytest.mark.parametrize("name", ["llama", "qwen2 tied"])
def test_adapters_are_merged_into_the_engines_weights(kind, name):
    model = add_lora(make(name), LoraSettings(rank=3, alpha=6.0), seed=0)
    engine = engine_of(model, kind)
    plain = engine_of(make(name), kind).generate(prompts_of(6), PARAMS, seeds_of(6))
    agree(engine.generate(prompts_of(6), PARAMS, seeds_of(6)), plain)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    engine.sync(model)
    adapted = engine.generate(prompts_of(6), PARAMS, seeds_of(6))
    assert adapted.responses != plain.responses
    for got, wanted in zip(adapted.logprobs, teacher_forced(model, adapted), strict=True):
        torch.testing.assert_close(torch.tensor(got), wanted, rtol=0, atol=1e-4)
    merged = engine_of(merged_copy(model), kind).generate(prompts_of(6), PARAMS, seeds_of(6))
    agree(adapted, merged)


@pytest.mark.slow
def test_in_bf16_the_native_engine_keeps_a_young_update_that_merging_would_round_away():
    base = make("llama").to(torch.bfloat16)
    model = add_lora(copy.deepcopy(base), LoraSettings(rank=3, alpha=3.0), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 4e-3)
    gaps = []
    for engine, trainer in ((base, base), (model, model), (merged_copy(model), model)):
        rollout = engine_of(engine, dtype=torch.bfloat16).generate(
            prompts_of(24), PARAMS, seeds_of(24)
        )
        with torch.autocast("cpu", torch.bfloat16):
            wanted = torch.cat(teacher_forced(trainer, rollout))
        found = torch.tensor(list(chain.from_iterable(rollout.logprobs)))
        gaps.append(float((found - wanted).abs().mean()))
    rounding, beside, merged = gaps
    assert beside < 1.15 * rounding
    assert merged > 1.3 * rounding


def test_a_packed_product_is_its_layers_side_by_side_with_their_updates():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    sizes = {"a": 4, "b": 6, "c": 2}
    state = {f"{name}.weight": draw(size, 5) for name, size in sizes.items()}
    state |= {f"{name}.bias": draw(size) for name, size in sizes.items()}
    factors = {name: Factors(draw(3, 5), draw(sizes[name], 3), False) for name in "ac"}
    product = pack([*sizes], state, factors, torch.device("cpu"), torch.float32)
    x = draw(2, 7, 5)
    parts = []
    for name in sizes:
        weight = state[f"{name}.weight"]
        if name in factors:
            weight = weight + factors[name].up @ factors[name].down
        parts.append(x @ weight.T + state[f"{name}.bias"])
    torch.testing.assert_close(product(x), torch.cat(parts, -1))
    plain = pack(["b"], state, factors, torch.device("cpu"), torch.float32)
    assert plain.down is None


# --- compiled kernels and PyTorch's operations


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_each_reply_is_told_once_and_as_the_rollout_has_it(kind):
    told = []
    engine = engine_of(make("llama"), kind, slots=5)
    prompts = prompts_of(24)
    found = engine.generate(
        prompts,
        SamplingParams(max_new_tokens=24),
        seeds_of(24),
        lambda row, ids, finished: told.append((row, list(ids), finished)),
    )
    whole = zip(range(24), found.responses, found.finished, strict=True)
    assert sorted(told) == list(whole)
    assert len(set(found.finished)) == 2  # some ended by themselves, some were cut
    if kind == "native":  # those that wait for a slot are told behind those that had one
        assert [row for row, _, _ in told] != sorted(row for row, _, _ in told)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_compiled_kernels_a_reply_is_the_same_to_the_bit_in_any_company(name, dtype):
    found = library(kernels.SOURCE)
    if isinstance(found, str) or not kernels.Kernels(found, dtype).panel:
        pytest.skip("no compiled products here")
    prompts, seeds = prompts_of(60), seeds_of(60)
    prompts[40:] = prompts[:20]  # some share one
    model, params = make(name), SamplingParams(max_new_tokens=40)
    expected = engine_of(model, slots=64, dtype=dtype).generate(prompts, params, seeds)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    for slots in (1, 7, 64):
        turned = engine_of(model, slots=slots, dtype=dtype).generate(
            [prompts[i] for i in order], params, [seeds[i] for i in order]
        )
        assert turned.responses == [expected.responses[i] for i in order]
        assert turned.logprobs == [expected.logprobs[i] for i in order]


@pytest.mark.parametrize("name", ["llama biases", "llama wide heads", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_blocks_in_one_call_are_the_blocks_one_by_one_to_the_bit(monkeypatch, name, dtype):
    engine = engine_of(make(name), slots=33, dtype=dtype)
    if engine.kernels is None or not engine.kernels.panel:
        pytest.skip("no compiled products here")
    assert engine._cache(2, 8, []).addresses is not None

    def replies():
        return engine.generate(prompts_of(40), PARAMS, seeds_of(40))

    together, before = replies(), torch.get_num_threads()
    try:
        for threads in (2, 3, 8):  # each has rows of its own, but where these are few
            torch.set_num_threads(threads)
            assert replies() == together
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(cache, "_addresses", lambda *_: None)
    assert replies() == together


@pytest.mark.parametrize("name", MODELS)
def test_compiled_kernels_say_what_pytorchs_operations_say(name):
    if isinstance(library(kernels.SOURCE), str):
        pytest.skip(library(kernels.SOURCE))
    model, prompts, seeds = make(name), prompts_of(20), seeds_of(20)
    params = SamplingParams(max_new_tokens=24)
    with_them = engine_of(model, slots=7)
    plain = engine_of(model, slots=7, kernels=False)
    assert with_them.kernels is not None
    assert plain.kernels is None
    assert plain.note is None
    expected, found = (engine.generate(prompts, params, seeds) for engine in (plain, with_them))
    assert found.responses == expected.responses
    assert found.finished == expected.finished
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_without_a_compiler_the_engine_says_so_and_answers(no_compiler):
    engine = engine_of(make("llama"))
    assert "no C++ compiler" in engine.note
    rollout = engine.generate(prompts_of(3), SamplingParams(max_new_tokens=4), seeds_of(3))
    assert all(rollout.responses)


# --- settings


def test_engine_settings_refuse_what_means_nothing():
    from pydantic import ValidationError

    for wrong in ({"slots": 0}, {"kind": "other"}, {"slot": 3}):
        with pytest.raises(ValidationError):
            EngineSettings(**wrong)


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_seed_too_few_or_too_many_is_an_error(kind):
    engine = engine_of(make("llama"), kind)
    for count in (2, 4):
        with pytest.raises(ValueError, match=r"zip|seeds"):
            engine.generate(prompts_of(3), PARAMS, seeds_of(count))


def test_what_a_step_needs_to_know_of_replies_is_what_they_hold():
    replies = [Reply(i, [5] * (i + 2), 70 + i, 0, 9, [3] * i, []) for i in range(3)]
    columns = columns_of(replies)
    assert columns.tolist() == [[5, 3, 3], [1, 3, 5], [70, 71, 72], [0, 1, 2]]
    for reply, token in zip(replies, (7, 8, 9), strict=True):
        reply.ids.append(token)
    assert torch.equal(columns_after(columns, torch.tensor([7, 8, 9])), columns_of(replies))
