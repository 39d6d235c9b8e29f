"""Two processes over gloo, run once: this file is also the program each of them runs."""

import math
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from ppomax import checkpoint, distributed
from ppomax.data.batching import collate
from ppomax.data.template import ChatTemplate
from ppomax.distributed import (
    World,
    agree,
    all_max,
    all_sum,
    barrier,
    clip_gradients,
    copy_full,
    full,
    full_state,
    gather,
    is_sharded,
    loss_scale,
    rank_in_environment,
    shard,
    sum_gradients,
    sum_tensor,
    wait_for_main,
    world,
)
from ppomax.errors import ConfigError
from ppomax.metrics import MetricSums
from ppomax.models.heads import ScalarModel
from ppomax.models.language import LanguageModel, place
from ppomax.models.lora import LoraSettings, adapters_off, add_lora
from ppomax.models.tiny import tiny_model, tiny_tokenizer
from ppomax.rollout import EngineSettings, SamplingParams, build_engine

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
RANKS = 2
GENERATOR = torch.Generator().manual_seed(0)
ROWS = [
    ([int(x) for x in torch.randint(4, 300, (n,), generator=GENERATOR)], [False] + [True] * (n - 1))
    for n in (24, 5, 18, 3, 12, 6)  # rank 0 gets 54 tokens, rank 1 gets 14
]
TARGETS = sum(sum(mask) for _, mask in ROWS)


def small(tied=True, seed=0):
    """Every weight matters, and the last block is not the size of the others' shards."""
    model = tiny_model(
        vocab_size=301, hidden_size=20, heads=2, kv_heads=1, intermediate=37, tied=tied, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


def with_adapters():
    model = add_lora(small(), LoraSettings(rank=2, alpha=4.0), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


BUILD = {
    "tied": lambda: LanguageModel(small()),
    "untied": lambda: LanguageModel(small(tied=False)),
    "adapters": lambda: LanguageModel(with_adapters()),
}


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(model, here, rows):
    """Of the mean NLL over all ranks' targets, before any clip."""
    loss = -model(collate(rows, 3, CPU)).logprobs.sum() / TARGETS
    (loss * loss_scale(model, here)).backward()
    sum_gradients(model, here)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return {name: full(parameter.grad).clone() for name, parameter in named}, float(loss.detach())


def optimizer_of(model):
    return torch.optim.AdamW(trainable(model), lr=1e-3, eps=1e-6, weight_decay=0.1, fused=True)


def step(model, optimizer, here, rows, clip=None):
    gradients(model, here, rows)
    norm = clip_gradients(trainable(model), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# --- what each of the two processes does


def wait_longer_than_a_collective():
    """Rank 0 works alone for longer than the group waits; seconds until this rank goes on."""
    distributed.LOOK_EVERY = 0.05
    began = time.monotonic()
    with world("cpu") as here:
        _set_pg_timeout(timedelta(seconds=3))
        if here.is_main:
            time.sleep(4)
        wait_for_main(here)
        return time.monotonic() - began


def run_rank(folder):
    """Do everything once and write what came out; the tests look at it."""
    with world("cpu") as here:
        result = {
            "here": (here.rank, here.size, here.is_main, here.device.type),
            "share": here.share([10, 11, 12, 13, 14]),
            **collectives(here),
            **replicated(here),
        }
        for name in BUILD:
            result[name] = sharded(name, here, folder)
        result["critic"] = critic(here)
    assert not torch.distributed.is_initialized(), "the group was left"
    result["waited"] = wait_longer_than_a_collective()
    result["again"] = []
    for _ in range(3):  # a group joined after another one was left meets its own members
        with world("cpu") as here:
            result["again"].append(float(sum_tensor(torch.ones(1), here)))
    torch.save(result, folder / f"rank{result['here'][0]}.pt")


def collectives(here):
    one = float(here.rank == 1)
    sums = MetricSums()
    sums.add("mean", 6.0 * here.rank + 1, 3 * here.rank + 1)  # 1 / 1 and 7 / 4
    sums.add("none", 0.0, 0)
    sums.maximum("max", float(-5 - here.rank))
    bits = torch.tensor([1 / 3, 2.5e-38, -0.1]) if here.rank == 0 else torch.zeros(3)
    result = {
        "sum": all_sum({"b": 1.0 + here.rank, "a": 0.1, "tiny": 2.0**-40 if one else 1.0}, here),
        "max": all_max({"x": -1.0 - here.rank, "y": math.inf * one if one else 0.0}, here),
        "nan": all_max({"first": 1.0 if one else math.nan, "last": math.nan if one else 1.0}, here),
        "empty": all_sum({}, here),
        "agree": (agree(here.rank == 1, here), agree(True, here), agree(False, here)),
        "gather": gather({"rank": here.rank, "text": "é" * here.rank}, here),
        "sum_tensor": sum_tensor(torch.tensor([1.0, 10.0]) * (here.rank + 1), here),
        "sum_bits": sum_tensor(bits, here),
        "sum_long": sum_tensor(torch.tensor([2**40 + here.rank]), here),
        "metrics": sums.merged(here),
    }
    barrier(here)
    return result


def replicated(here):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    model["c"].requires_grad_(False)
    x = torch.tensor([[1.0, 2.0]]) * (here.rank + 1)
    loss = model["a"](x).sum() + (model["b"](x).sum() if here.rank == 1 else 0.0)
    (loss * loss_scale(model, here)).backward()
    sum_gradients(model, here)
    return {
        "replicated": {n: p.grad for n, p in model.named_parameters() if p.requires_grad},
        "frozen": all(p.grad is None for p in model["c"].parameters()),
        "replicated_scale": loss_scale(model, here),
        "replicated_norm": clip_gradients(trainable(model), None),
    }


def sharded(name, here, folder):
    rows = here.share(ROWS)
    model = BUILD[name]()
    place(model, here)
    result = {"sharded": is_sharded(model), "scale": loss_scale(model, here)}
    with torch.no_grad():
        found = model(collate(rows, 3, CPU), 0.7)
    result["logprobs"] = [part.clone() for part in found[:3]]
    if name == "adapters":
        with torch.no_grad(), adapters_off(model):
            result["off"] = model(collate(rows, 3, CPU)).logprobs.clone()
    result["gradients"], result["loss"] = gradients(model, here, rows)
    result["norm"] = clip_gradients(trainable(model), None)
    result["clip norm"] = clip_gradients(trainable(model), 0.05)
    result["clipped"] = {
        n: full(p.grad).clone() for n, p in model.named_parameters() if p.requires_grad
    }
    optimizer = optimizer_of(model)
    optimizer.zero_grad(set_to_none=True)
    step(model, optimizer, here, rows)

    root = folder / name
    groups = {
        "policy": checkpoint.model_tensors(model),
        "policy_optimizer": checkpoint.optimizer_tensors(model, optimizer),
    }
    if here.is_main:
        checkpoint.save(root, 1, groups, {"step": 1})
    barrier(here)
    result["after one"] = {k: v.clone() for k, v in full_state(model).items()}

    again = BUILD[name]()
    with torch.no_grad():
        for parameter in trainable(again):
            parameter.add_(0.1)
    place(again, here)
    saved = checkpoint.latest(root)
    checkpoint.load_model_tensors(again, saved.tensors("policy"))
    optimizer_again = optimizer_of(again)
    checkpoint.load_optimizer_tensors(again, optimizer_again, saved.tensors("policy_optimizer"))
    step(model, optimizer, here, rows, clip=0.05)
    step(again, optimizer_again, here, rows, clip=0.05)
    result["after two"] = {k: v.clone() for k, v in full_state(model).items()}
    result["resumed"] = {k: v.clone() for k, v in full_state(again).items()}

    template = ChatTemplate(tiny_tokenizer(["the sea is wide"] * 20, 300))
    engine = build_engine(EngineSettings(), model.lm, template, here, torch.float32)
    prompts, seeds = [ids[:6] for ids, _ in ROWS], list(range(len(ROWS)))
    rollout = engine.generate(prompts, SamplingParams(max_new_tokens=8), seeds)
    result["rollout"] = (rollout.responses, rollout.logprobs)

    target = next(p for p in model.parameters() if p.requires_grad)
    source = torch.arange(target.numel(), dtype=torch.float64).view(target.shape)
    copy_full(target, source)
    result["copied"] = torch.equal(full(target.detach()).double(), source)
    try:
        checkpoint.load_model_tensors(
            model, {n: torch.zeros(1) for n, p in model.named_parameters() if p.requires_grad}
        )
    except checkpoint.CheckpointError as error:
        result["misfit"] = str(error)
    return result


def critic(here):
    model = ScalarModel.from_causal_lm(small(), 0)
    model.lm_head = None
    place(model, here)
    values = model(collate(here.share(ROWS), 3, CPU).input_ids).values
    (values.square().sum() * loss_scale(model, here)).backward()
    return {
        "values": values.detach().clone(),
        "gradients": {n: full(p.grad).clone() for n, p in model.named_parameters()},
    }


# --- starting them


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(RANKS):
        log = (folder / f"rank{rank}.log").open("w")
        env = {**os.environ, **common, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        command = [sys.executable, __file__, str(folder)]
        processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    deadline = time.monotonic() + 180
    try:
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() not in (None, 0) for process in processes)
            assert not failed, logs(folder)
            assert time.monotonic() < deadline, f"the ranks hang\n{logs(folder)}"
            time.sleep(0.1)
        assert all(process.returncode == 0 for process in processes), logs(folder)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]
    return SimpleNamespace(folder=folder, found=found)


def logs(folder):
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))


NAMES = pytest.mark.parametrize("name", list(BUILD))


def close(found, wanted, rtol=1e-4, atol=1e-6):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=name)


# --- collectives


@pytest.mark.slow
def test_ranks_that_left_a_group_meet_again(ranks):
    assert [r["again"] for r in ranks.found] == [[2.0] * 3] * RANKS


@pytest.mark.slow
def test_ranks_wait_for_what_rank_0_does_alone_longer_than_for_a_collective(ranks):
    """Mutant: a barrier in the place of `wait_for_main` ends rank 1 after three seconds."""
    assert all(r["waited"] >= 4 for r in ranks.found)


@pytest.mark.slow
def test_each_rank_knows_who_it_is(ranks):
    assert [r["here"] for r in ranks.found] == [(0, 2, True, "cpu"), (1, 2, False, "cpu")]
    assert [r["share"] for r in ranks.found] == [[10, 12, 14], [11, 13]]


@pytest.mark.slow
def test_sums_are_over_all_ranks_in_float64_and_the_same_on_each(ranks):
    for r in ranks.found:
        assert r["sum"] == {"b": 3.0, "a": 0.2, "tiny": 1.0 + 2.0**-40}
        assert r["max"] == {"x": -1.0, "y": math.inf}
        assert all(math.isnan(value) for value in r["nan"].values())
        assert r["empty"] == {}


@pytest.mark.slow
def test_ranks_agree_when_any_of_them_says_so(ranks):
    assert [r["agree"] for r in ranks.found] == [(True, True, False)] * 2


@pytest.mark.slow
def test_gathered_objects_stand_in_rank_order_on_every_rank(ranks):
    wanted = [{"rank": 0, "text": ""}, {"rank": 1, "text": "é"}]
    assert [r["gather"] for r in ranks.found] == [wanted] * 2


@pytest.mark.slow
def test_tensors_are_summed_and_beside_zeros_keep_their_bits(ranks):
    for r in ranks.found:
        assert r["sum_tensor"].tolist() == [3.0, 30.0]
        assert torch.equal(r["sum_bits"], torch.tensor([1 / 3, 2.5e-38, -0.1]))
        assert r["sum_long"].tolist() == [2**41 + 1]


@pytest.mark.slow
def test_metrics_are_merged_by_weight_not_by_rank(ranks):
    # (1 + 7) / (1 + 4), not (1 + 7 / 4) / 2
    assert [r["metrics"] for r in ranks.found] == [{"mean": 8 / 5, "max": -5.0}] * 2


# --- replicated models


@pytest.mark.slow
def test_gradients_of_a_replicated_model_are_summed_even_where_a_rank_has_none(ranks):
    # x is (1, 2) on rank 0 and (2, 4) on rank 1, which alone uses b
    for r in ranks.found:
        assert r["replicated_scale"] == 1.0
        assert r["replicated"]["a.weight"].tolist() == [[3.0, 6.0], [3.0, 6.0]]
        assert r["replicated"]["a.bias"].tolist() == [2.0, 2.0]
        assert r["replicated"]["b.weight"].tolist() == [[2.0, 4.0], [2.0, 4.0]]
        assert r["frozen"]
        squares = 2 * (9 + 36) + 2 * 4 + 2 * (4 + 16) + 2 * 1
        assert r["replicated_norm"] == pytest.approx(math.sqrt(squares))


# --- sharded models against one process


@pytest.mark.slow
@NAMES
def test_a_placed_model_computes_what_it_computes_alone(ranks, name):
    model = BUILD[name]()
    for rank, r in enumerate(ranks.found):
        assert r[name]["sharded"] == (name != "adapters")  # adapters are replicated
        assert r[name]["scale"] == (1.0 if name == "adapters" else 2.0)
        with torch.no_grad():
            wanted = model(collate(ROWS[rank::RANKS], 3, CPU), 0.7)
        for got, value in zip(r[name]["logprobs"], wanted[:3], strict=True):
            torch.testing.assert_close(got, value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_adapters_can_be_off_in_a_placed_model(ranks):
    plain = LanguageModel(small())
    for rank, r in enumerate(ranks.found):
        with torch.no_grad():
            wanted = plain(collate(ROWS[rank::RANKS], 3, CPU)).logprobs
        torch.testing.assert_close(r["adapters"]["off"], wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@NAMES
def test_the_ranks_gradients_add_up_to_those_of_one_process(ranks, name):
    wanted, loss = gradients(BUILD[name](), ALONE, ROWS)
    assert sum(r[name]["loss"] for r in ranks.found) == pytest.approx(loss, rel=1e-5)
    for r in ranks.found:
        close(r[name]["gradients"], wanted)


@pytest.mark.slow
@NAMES
def test_the_norm_before_the_clip_and_the_clipped_gradients_are_those_of_one_process(ranks, name):
    model = BUILD[name]()
    wanted, _ = gradients(model, ALONE, ROWS)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in wanted.values()))
    assert norm > 0.1, "the clip at 0.05 changes something"
    assert clip_gradients(trainable(model), 0.05) == pytest.approx(norm, rel=1e-5)
    clipped = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for r in ranks.found:
        assert r[name]["norm"] == pytest.approx(norm, rel=1e-5)
        assert r[name]["clip norm"] == pytest.approx(norm, rel=1e-5)
        close(r[name]["clipped"], clipped)
        size = sum(float(g.double().square().sum()) for g in r[name]["clipped"].values())
        assert math.sqrt(size) == pytest.approx(0.05, rel=1e-4)


@pytest.mark.slow
@NAMES
def test_two_steps_lead_where_one_process_gets(ranks, name):
    model = BUILD[name]()
    optimizer = optimizer_of(model)
    step(model, optimizer, ALONE, ROWS)
    for r in ranks.found:
        close(r[name]["after one"], full_state(model), rtol=0, atol=1e-5)
    step(model, optimizer, ALONE, ROWS, clip=0.05)
    for r in ranks.found:
        close(r[name]["after two"], full_state(model), rtol=0, atol=1e-5)


@pytest.mark.slow
@NAMES
def test_a_sharded_run_goes_on_bitwise_from_its_checkpoint(ranks, name):
    for r in ranks.found:
        close(r[name]["resumed"], r[name]["after two"], rtol=0, atol=0)
    for first, second in zip(*(r[name]["after two"].values() for r in ranks.found), strict=True):
        assert torch.equal(first, second), "both ranks hold the same whole model"


@pytest.mark.slow
@NAMES
def test_a_sharded_models_checkpoint_loads_without_shards_and_goes_on(ranks, name):
    found = checkpoint.latest(ranks.folder / name)
    model = BUILD[name]()
    optimizer = optimizer_of(model)
    checkpoint.load_model_tensors(model, found.tensors("policy"))
    checkpoint.load_optimizer_tensors(model, optimizer, found.tensors("policy_optimizer"))
    close(full_state(model), ranks.found[0][name]["after one"], rtol=0, atol=0)
    step(model, optimizer, ALONE, ROWS, clip=0.05)
    close(full_state(model), ranks.found[0][name]["after two"], rtol=0, atol=1e-5)


@pytest.mark.slow
@NAMES
def test_the_engine_of_a_sharded_model_writes_what_one_process_writes(ranks, name):
    model = BUILD[name]()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(ranks.found[0][name]["after two"][key])
    template = ChatTemplate(tiny_tokenizer(["the sea is wide"] * 20, 300))
    engine = build_engine(EngineSettings(), model.lm, template, ALONE, torch.float32)
    prompts, seeds = [ids[:6] for ids, _ in ROWS], list(range(len(ROWS)))
    rollout = engine.generate(prompts, SamplingParams(max_new_tokens=8), seeds)
    for r in ranks.found:
        assert r[name]["rollout"] == (rollout.responses, rollout.logprobs)


@pytest.mark.slow
@NAMES
def test_a_whole_tensor_is_copied_into_a_sharded_one_and_a_misfit_is_named(ranks, name):
    for r in ranks.found:
        assert r[name]["copied"]
        assert "has shape (1,), the model's is" in r[name]["misfit"]


@pytest.mark.slow
def test_a_sharded_critic_has_the_values_and_gradients_of_one_process(ranks):
    model = ScalarModel.from_causal_lm(small(), 0)
    for rank, r in enumerate(ranks.found):
        values = model(collate(ROWS[rank::RANKS], 3, CPU).input_ids).values
        torch.testing.assert_close(r["critic"]["values"], values.detach(), rtol=0, atol=1e-5)
        values.square().sum().backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    for r in ranks.found:
        close(r["critic"]["gradients"], wanted, rtol=1e-4, atol=1e-5)


# --- one process


def test_alone_every_answer_is_the_identity():
    values = {"b": 1.5, "a": -2.0}
    tensor = torch.tensor([1.0, 2.0])
    assert all_sum(values, ALONE) == values
    assert all_max(values, ALONE) == values
    assert gather("x", ALONE) == ["x"]
    assert sum_tensor(tensor, ALONE) is tensor
    assert full(tensor) is tensor
    assert agree(True, ALONE)
    assert not agree(False, ALONE)
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.is_main
    barrier(ALONE)
    wait_for_main(ALONE)


def test_alone_nothing_is_sharded_and_nothing_scaled():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shard(model, ALONE, list(model))
    assert not is_sharded(model)
    assert loss_scale(model, ALONE) == 1.0
    sum_gradients(model, ALONE)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("size", [2, 3])
def test_the_shares_of_all_ranks_are_all_items_once(size):
    items = list(range(10))
    shares = [World(rank, size, CPU).share(items) for rank in range(size)]
    assert sorted(item for mine in shares for item in mine) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_full_state_holds_parameters_and_persistent_buffers_detached():
    model = nn.BatchNorm1d(3)
    model.register_buffer("passing", torch.ones(1), persistent=False)
    state = full_state(model)
    assert set(state) == set(model.state_dict())
    assert "passing" not in state
    assert not any(value.requires_grad for value in state.values())


def parameters_with(*gradients_):
    found = [nn.Parameter(torch.zeros_like(torch.tensor(g))) for g in gradients_]
    for parameter, gradient in zip(found, gradients_, strict=True):
        parameter.grad = torch.tensor(gradient)
    return found


def test_the_norm_is_that_before_the_clip_and_over_all_parameters():
    parameters = parameters_with([3.0, 0.0], [[4.0]])
    assert clip_gradients(parameters, 1.0) == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0], abs=1e-5)
    assert parameters[1].grad.tolist() == [pytest.approx([0.8], abs=1e-5)]


@pytest.mark.parametrize("limit", [None, 5.0, 100.0])
def test_gradients_within_the_limit_are_left_as_they_are(limit):
    parameters = parameters_with([3.0, 0.0], [[4.0]])
    parameters.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    writes = parameters[0].grad._version
    assert clip_gradients(parameters, limit) == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == pytest.approx([3.0, 0.0], abs=1e-5)
    if limit != 5.0:  # not even multiplied by 1
        assert parameters[0].grad._version == writes


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_returned_and_clips_nothing(bad):
    parameters = parameters_with([3.0, 4.0], [bad])
    assert not math.isfinite(clip_gradients(parameters, 1.0))
    assert parameters[0].grad.tolist() == [3.0, 4.0]


def test_without_gradients_the_norm_is_zero():
    assert clip_gradients([nn.Parameter(torch.zeros(2))], 1.0) == 0.0
    assert clip_gradients([], 1.0) == 0.0


def test_copying_keeps_memory_dtype_and_gradient_of_the_target():
    target = nn.Parameter(torch.zeros(2, 3))
    pointer = target.data_ptr()
    source = torch.arange(6.0, dtype=torch.float64).view(2, 3).requires_grad_()
    copy_full(target, source)
    assert target.data_ptr() == pointer
    assert target.requires_grad
    assert target.is_leaf
    assert target.dtype == torch.float32
    assert target.tolist() == source.tolist()


# --- the environment


def set_environment(monkeypatch, **values):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher_this_process_is_alone(monkeypatch):
    set_environment(monkeypatch)
    with world("cpu") as here:
        assert here == ALONE
        assert not torch.distributed.is_initialized()
    assert rank_in_environment() == 0


def test_the_rank_is_the_launchers(monkeypatch):
    set_environment(monkeypatch, RANK="3")
    assert rank_in_environment() == 3
    set_environment(monkeypatch, SLURM_PROCID="2")
    assert rank_in_environment() == 2
    set_environment(monkeypatch, RANK="1", SLURM_PROCID="2")
    assert rank_in_environment() == 1


def test_tasks_of_srun_that_have_no_place_to_meet_are_told_what_would_do(monkeypatch):
    set_environment(monkeypatch, SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="2", MASTER_ADDR="a")
    with pytest.raises(ConfigError, match=r"MASTER_PORT.*torchrun"), world("cpu"):
        pass


def test_tasks_of_srun_meet_where_they_are_told_to(monkeypatch):
    joined = {}
    monkeypatch.setattr(distributed, "_store", lambda rank, size: torch.distributed.HashStore())
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **k: joined.update(k))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
    set_environment(monkeypatch, MASTER_ADDR="a", MASTER_PORT="1", **slurm)
    with world("cpu") as here:
        assert (here.rank, here.size) == (1, 2)
    assert (joined["rank"], joined["world_size"]) == (1, 2)


@pytest.mark.parametrize("tasks", [{}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_or_a_single_task_is_alone(monkeypatch, tasks):
    set_environment(monkeypatch, SLURM_PROCID="0", SLURM_NTASKS="4", **tasks)
    with world("cpu") as here:
        assert here == ALONE


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch, name):
    set_environment(monkeypatch)
    with pytest.raises(ConfigError, match="setting device: cuda"), world(name):
        pass


def test_a_word_that_is_no_device_is_refused(monkeypatch):
    set_environment(monkeypatch)
    with pytest.raises(ConfigError, match="'gpu' is no device"), world("gpu"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_auto_takes_the_cpu_where_there_is_no_cuda(monkeypatch):
    set_environment(monkeypatch)
    with world() as here:
        assert here.device == CPU


def test_an_error_inside_leaves_no_process_group(monkeypatch):
    set_environment(monkeypatch)
    with pytest.raises(RuntimeError, match="inside"), world("cpu"):
        raise RuntimeError("inside")
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
