"""The vllm engine: its translation of settings and replies without vLLM; all of it where it is."""

import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.errors import ConfigError, ModelError
from ppomax.models.lora import LoraSettings, add_lora
from ppomax.models.tiny import tiny_model, tiny_tokenizer
from ppomax.rollout import EngineSettings, SamplingParams, build_engine, vllm_engine
from ppomax.rollout.stops import StopStrings

ALONE = World(0, 1, torch.device("cpu"))
TEMPLATE = ChatTemplate(tiny_tokenizer(["tea for two and rain"] * 4, 280))
ENDS = TEMPLATE.end_ids
HAS_VLLM = importlib.util.find_spec("vllm") is not None


class FakeLLM:
    """Keeps what it is told; answers with the tokens it was given."""

    def __init__(self, **arguments):
        self.arguments, self.weights, self.calls = arguments, [], []
        self.core = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
        torch.manual_seed(0)  # as vLLM does, and what comes next too
        torch.set_num_threads = lambda count: None

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.weights.append(dict(kwargs["weights_iterator"]))
        self.calls.append("weights")

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def generate(self, inputs, requests, use_tqdm):
        self.asked = list(zip(inputs, requests, strict=True))
        return [SimpleNamespace(outputs=[completion([7, 8, 2], "stop")]) for _ in inputs]


def completion(ids, reason):
    tables = [{token: SimpleNamespace(logprob=-token / 10)} for token in ids]
    return SimpleNamespace(token_ids=tuple(ids), logprobs=tables, finish_reason=reason)


@pytest.fixture
def fake(monkeypatch):
    library = SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **given: given)
    monkeypatch.setattr(vllm_engine, "load_vllm", lambda: library)


def engine_of(model, **settings):
    settings = EngineSettings(kind="vllm", **settings)
    return build_engine(settings, model, TEMPLATE, ALONE, torch.float32)


def small_model(**changes):
    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2} | changes
    return tiny_model(vocab_size=280, **sizes)


def test_a_reply_is_asked_for_with_the_same_meaning():
    plain = SamplingParams(temperature=0.7, max_new_tokens=50)
    asked = vllm_engine.request(plain, 2**64 + 5, 30, frozenset({9, 2}))
    assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["min_p"]) == (0.7, 1, 0, 0)
    assert asked["max_tokens"] == 30  # the prompt leaves no more
    assert asked["stop_token_ids"] == [2, 9]
    assert asked["ignore_eos"]
    assert asked["logprobs"] == 0
    assert 0 <= asked["seed"] < 2**63
    tricks = SamplingParams(top_p=0.9, top_k=40, max_new_tokens=5)
    asked = vllm_engine.request(tricks, 3, 30, frozenset({2}))
    assert (asked["top_p"], asked["top_k"], asked["max_tokens"], asked["seed"]) == (0.9, 40, 5, 3)
    assert vllm_engine.request(SamplingParams(min_p=0.1), 3, 30, ENDS)["min_p"] == 0.1


def test_what_vllm_means_otherwise_is_refused():
    with pytest.raises(ConfigError, match=r"repetition_penalty: 1\.1 weighs generated"):
        vllm_engine.check_params(SamplingParams(repetition_penalty=1.1))
    with pytest.raises(ConfigError, match=r"min_p and sampling\.top_p"):
        vllm_engine.check_params(SamplingParams(min_p=0.1, top_p=0.9))
    for fine in ({"min_p": 0.1}, {"min_p": 0.0, "top_p": 0.9}, {"top_p": 0.9, "top_k": 5}):
        vllm_engine.check_params(SamplingParams(**fine))


def test_replies_keep_their_ids_log_probs_and_ends():
    outputs = [completion([5, 6, 2], "stop"), completion([5, 6, 7], "length")]
    found = vllm_engine.read([[1], [1, 1]], outputs, SamplingParams(), StopStrings(TEMPLATE))
    assert found.responses == [[5, 6, 2], [5, 6, 7]]
    assert found.logprobs[0] == pytest.approx([-0.5, -0.6, -0.2])
    assert found.finished == [True, False]


def test_a_stop_string_cuts_the_reply_behind_the_token_that_completes_it():
    ids = TEMPLATE.tokenizer("tea for two and rain")["input_ids"]
    params = SamplingParams(stop=["two"])
    outputs = [completion(ids, "length")]
    found = vllm_engine.read([[1]], outputs, params, StopStrings(TEMPLATE))
    [reply], [logprobs] = found.responses, found.logprobs
    assert "two" in TEMPLATE.decode(reply)
    assert "two" not in TEMPLATE.decode(reply[:-1])
    assert reply == ids[: len(reply)]
    assert len(logprobs) == len(reply) < len(ids)
    assert found.finished == [True]


def test_the_engine_has_room_for_its_slots_and_for_the_longest_reply():
    config = small_model(max_positions=512).config
    given = vllm_engine.engine_arguments(
        config, EngineSettings(kind="vllm", slots=4), "x", ALONE, torch.bfloat16
    )
    per_token = 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, dimension, bytes
    assert vllm_engine.cache_bytes(config, torch.bfloat16) == per_token
    assert given["kv_cache_memory_bytes"] == (4 * 1024 + 4 * 128) * per_token
    assert (given["dtype"], given["max_num_seqs"], given["max_model_len"]) == ("bfloat16", 4, 512)
    config.max_position_embeddings = 10**6
    given = vllm_engine.engine_arguments(
        config, EngineSettings(kind="vllm", slots=1), "x", ALONE, torch.float32
    )
    assert given["max_model_len"] == vllm_engine.LONGEST
    assert given["kv_cache_memory_bytes"] >= vllm_engine.LONGEST * per_token * 2


def test_weights_are_handed_over_in_this_process_and_again_after_an_update(fake):
    model = small_model()
    engine = engine_of(model)
    assert engine.llm.core == "0"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    assert engine.llm.arguments["load_format"] == "dummy"
    with torch.no_grad():
        model.model.norm.weight.fill_(3.0)
    engine.sync(model)
    assert engine.llm.calls == ["weights", "reset"] * 2
    assert set(engine.llm.weights[0]) >= {"model.norm.weight", "model.layers.1.mlp.up_proj.weight"}
    assert engine.llm.weights[1]["model.norm.weight"].eq(3.0).all()


def test_the_process_stays_as_it_was(fake):
    set_threads, threads, state = (
        torch.set_num_threads,
        torch.get_num_threads(),
        torch.get_rng_state(),
    )
    engine_of(small_model())
    assert torch.set_num_threads is set_threads
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_every_prompt_is_asked_with_its_own_seed(fake):
    engine = engine_of(small_model())
    prompts = [[5, 6], [7], [8, 9, 10]]
    found = engine.generate(prompts, SamplingParams(max_new_tokens=600), [11, 12, 13])
    assert [given["prompt_token_ids"] for given, _ in engine.llm.asked] == prompts
    assert [given["seed"] for _, given in engine.llm.asked] == [11, 12, 13]
    assert [given["max_tokens"] for _, given in engine.llm.asked] == [510, 511, 509]
    assert found.prompts == prompts
    assert engine.generate([], SamplingParams(), []).responses == []
    with pytest.raises(ModelError, match="512"):
        engine.generate([[1] * 512], SamplingParams(), [1])


def test_several_ranks_are_refused():
    world = World(0, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match="there are 2; take native"):
        build_engine(EngineSettings(kind="vllm"), small_model(), TEMPLATE, world, torch.float32)


def test_its_absence_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'ppomax\[vllm\]'"):
        engine_of(small_model())


@pytest.mark.slow
@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")
def test_the_real_engine_draws_from_the_policy_and_follows_its_updates():
    model = small_model(max_positions=128, hidden_size=128)  # vLLM's kernels want heads of 32
    engine = engine_of(model, slots=4)
    own = build_engine(EngineSettings(), model, TEMPLATE, ALONE, torch.float32)
    prompts = [[5, 6, 7], [8, 9], [20, 21, 22, 23], [30]] * 2
    greedy = SamplingParams(temperature=0, max_new_tokens=12)
    seeds = list(range(len(prompts)))

    def agree():
        theirs, ours = (some.generate(prompts, greedy, seeds) for some in (engine, own))
        assert theirs.responses == ours.responses
        assert theirs.finished == ours.finished
        for one, other in zip(theirs.logprobs, ours.logprobs, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
        return theirs.responses

    before = agree()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    for some in (engine, own):
        some.sync(model)
    assert agree() != before
    plain = SamplingParams(temperature=0.8, max_new_tokens=12)
    first, again = (engine.generate(prompts, plain, seeds) for _ in range(2))
    other = engine.generate(prompts, plain, [seed + 100 for seed in seeds])
    assert first.responses == again.responses != other.responses
    for prompt, reply, found in zip(prompts, first.responses, first.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        exact = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).squeeze(1)
        assert found == pytest.approx(exact.tolist(), abs=1e-4)


@pytest.mark.slow
def test_adapters_in_bfloat16_are_refused_before_anything_is_loaded():
    model = add_lora(small_model(), LoraSettings(rank=2), 0)
    settings = EngineSettings(kind="vllm")
    with pytest.raises(ConfigError, match="adapters merged into bfloat16"):
        build_engine(settings, model, TEMPLATE, ALONE, torch.bfloat16)


@pytest.mark.parametrize(("dtype", "told"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_transformers_engine_says_what_bfloat16_does_to_adapters(dtype, told):
    model = add_lora(small_model(), LoraSettings(rank=2), 0)
    engine = build_engine(EngineSettings(kind="transformers"), model, TEMPLATE, ALONE, dtype)
    assert (engine.note is not None and "adapters" in engine.note) == told
