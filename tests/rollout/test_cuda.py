"""The native engine and whole runs on a CUDA device: `pytest -m gpu`."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ppomax.data.batching import collate, derived_seed
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.models.language import LanguageModel
from ppomax.models.tiny import tiny_tokenizer
from ppomax.rollout import EngineSettings, SamplingParams, build_engine
from ppomax.rollout.sampling import sample
from ppomax.train.ppo import train_ppo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CUDA = torch.device("cuda")
ALONE = World(0, 1, CUDA)
TEMPLATE = ChatTemplate(tiny_tokenizer(["the sea is wide", "rice, water, salt"] * 20, 300))
END = TEMPLATE.end_id


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=END,
        pad_token_id=3,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if "norm" in name else 0.05))
        made.get_output_embeddings().weight[END] *= 1.5
    return made.to(CUDA)


def prompts_of(count):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 90, (count,), generator=generator).tolist()
    return [torch.randint(4, 4000, (n,), generator=generator).tolist() for n in lengths]


def answers(model, params, *, dtype=torch.float32, slots=16, graphs=True, count=40):
    engine = build_engine(
        EngineSettings(slots=slots, cuda_graphs=graphs), model, TEMPLATE, ALONE, dtype
    )
    seeds = [derived_seed("reply", index) for index in range(count)]
    return engine.generate(prompts_of(count), params, seeds)


@torch.no_grad()
def teacher_forced(model, rollout, dtype=torch.float32):
    gaps = []
    for prompt, reply, got in zip(
        rollout.prompts, rollout.responses, rollout.logprobs, strict=True
    ):
        row = (prompt + reply, [False] * len(prompt) + [True] * len(reply))
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            wanted = LanguageModel(model)(collate([row], 3, CUDA)).logprobs
        gaps += (wanted.cpu() - torch.tensor(got)).abs().tolist()
    return gaps


@pytest.mark.parametrize("graphs", [True, False])
def test_log_probs_are_the_trainers(model, graphs):
    rollout = answers(model, SamplingParams(max_new_tokens=150), graphs=graphs)
    assert any(rollout.finished)
    assert max(map(len, rollout.responses)) > 128, "a span of its own and more"
    assert max(teacher_forced(model, rollout)) < 1e-4


def test_log_probs_in_bf16_are_near_the_trainers(model):
    params = SamplingParams(max_new_tokens=100)
    rollout = answers(model, params, dtype=torch.bfloat16)
    gaps = teacher_forced(model, rollout, torch.bfloat16)
    assert sum(gaps) / len(gaps) < 0.05


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=64),
        SamplingParams(max_new_tokens=64, temperature=0.8, top_p=0.95),
        SamplingParams(max_new_tokens=64, temperature=0.8, top_p=0.9, repetition_penalty=1.1),
    ],
    ids=["plain", "nucleus", "paper"],
)
def test_replies_are_the_same_with_and_without_graphs_and_with_other_slots(model, params):
    first = answers(model, params)
    for other in (answers(model, params, graphs=False), answers(model, params, slots=64)):
        pairs = list(zip(first.responses, other.responses, strict=True))
        assert sum(a == b for a, b in pairs) >= 38, "all but a boundary case or two of 40"


def test_greedy_replies_are_those_of_transformers(model):
    ours = answers(model, SamplingParams(temperature=0, max_new_tokens=40), count=12)
    for prompt, reply in zip(ours.prompts, ours.responses, strict=True):
        given = torch.tensor([prompt], device=CUDA)
        wanted = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=40
        )
        assert reply == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9), SamplingParams(top_k=9)],
)
def test_draws_from_the_same_logits_are_those_of_the_processor(params):
    logits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 3
    seeds, steps = torch.arange(64) * 7919, torch.arange(64)
    here = sample(logits, seeds, steps, params)
    there = sample(logits.to(CUDA), seeds.to(CUDA), steps.to(CUDA), params)
    assert torch.equal(here.tokens, there.tokens.cpu())
    torch.testing.assert_close(here.logprobs, there.logprobs.cpu(), rtol=0, atol=1e-4)


CHANGES = {"deterministic": True, "device": "cuda", "iterations": 3}


def rows_of(out):
    """The metrics of each iteration, what time and memory say left out."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = {row["step"]: row for row in map(json.loads, lines)}
    return [
        {
            key: value
            for key, value in row.items()
            if not key.startswith(("time", "memory", "throughput"))
        }
        for row in found.values()
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_is_one_and_the_same_run_twice_is_the_same(small, tmp_path, dtype):
    runs = []
    for name in ("a", "b"):
        train_ppo(small("ppo", tmp_path / name, CHANGES | {"dtype": dtype}))
        runs.append(rows_of(tmp_path / name))
    assert runs[0] == runs[1]
    assert [row["policy/first_ratio_error"] for row in runs[0]] == [0, 0, 0]
