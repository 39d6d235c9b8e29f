"""The plan: sizes from a config alone, memory and disk from arithmetic one can redo by hand."""

import dataclasses

import pytest
import torch

from ppomax import footprint, planning
from ppomax.errors import ConfigError, ModelError
from ppomax.models.attention import use_grouped_attention
from ppomax.models.fused import is_fused, use_fused_blocks
from ppomax.models.heads import hidden_states
from ppomax.models.kernels import kernels_for
from ppomax.models.language import LanguageModel
from ppomax.models.lean import use_lean_blocks
from ppomax.models.load import load_policy
from ppomax.models.lora import LoraSettings, add_lora
from ppomax.models.tiny import tiny_model
from ppomax.planning import Size, advice, available_memory_gb, model_size, plan
from ppomax.recipe import Recipe

ONE_B = Size(
    parameters=10**9,
    embedding=10**8,
    layers=20,
    hidden=2000,
    kv_width=1000,
    q_width=2000,
    intermediate=5000,
    vocab=50_000,
)


def planned(config, kind, tmp_path):
    return plan(Recipe.model_validate({"out": tmp_path, kind: config}))[0]


def test_a_size_is_the_models(tiny):
    model = load_policy("tiny")
    size = model_size("tiny")
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.vocab == model.config.vocab_size
    assert (size.layers, size.hidden) == (2, 64)
    assert size.kv_width == 2 * 2 * 16
    assert size.embedding == size.vocab * 64


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ModelError, match="no-such"):
        model_size("./no-such")


def test_a_trained_billion_takes_16_gb_and_with_lora_little_more_than_its_weights(small, tmp_path):
    assert footprint.trained_gb(10**9, None, ONE_B, torch.bfloat16) == pytest.approx(16.0)
    lora = LoraSettings(rank=16)
    own = footprint.trained_gb(10**9, lora, ONE_B, torch.bfloat16)
    assert 2.0 < own < 2.5
    assert footprint.trained_gb(10**9, lora, ONE_B, torch.float32) > 4.0


def test_the_adapters_estimate_is_near_the_truth(tiny):
    settings = LoraSettings(rank=4)
    model = add_lora(load_policy("tiny"), settings, 0)
    true = sum(p.numel() for p in model.parameters() if p.requires_grad)
    guess = footprint.adapter_parameters(settings, model_size("tiny"))
    assert 0.3 < guess / true < 3


def test_ppo_counts_four_models_or_less(small, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "model_size", lambda *_, **__: ONE_B)
    whole = planned(small("ppo", tmp_path / "a"), "ppo", tmp_path)
    parts = dict(whole.lines)
    assert parts["policy"] == parts["critic"] == "16.00 GB"
    assert parts["reference"] == parts["reward model"] == "4.00 GB"
    assert parts["engine"] == "4.00 GB while replies are written"
    upper = planned(small("ppo", tmp_path / "u", {"freeze_layers": ONE_B.layers}), "ppo", tmp_path)
    assert dict(upper.lines)["policy"] == dict(upper.lines)["critic"] == "4.00 GB"  # weights alone
    half = planned(small("ppo", tmp_path / "b", {"dtype": "bfloat16"}), "ppo", tmp_path)
    assert dict(half.lines)["reference"] == "2.00 GB"
    none = planned(small("ppo", tmp_path / "c", {"kl": None}), "ppo", tmp_path)
    assert "reference" not in dict(none.lines)
    lora = planned(small("ppo", tmp_path / "d", {"lora": {"rank": 8}}), "ppo", tmp_path)
    assert "reference" not in dict(lora.lines)
    assert lora.memory_gb < none.memory_gb < whole.memory_gb
    # two trained models, masters and two moments: two kept, a green one, one being written; export
    assert whole.disk_gb == pytest.approx(4 * 2 * 12 + 4)


def test_checkpoints_take_the_room_of_what_is_trained(small, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "model_size", lambda *_, **__: ONE_B)

    def disk(**change):
        return planned(small("sft", tmp_path / "x", change), "sft", tmp_path).disk_gb

    two = 3 * 12  # kept ones and the one being written; weights and two moments, GB
    assert disk() == pytest.approx(two + 4)
    assert disk(freeze_layers=10) == pytest.approx(two * 0.45 + 4)
    assert 4 < disk(lora={"rank": 8}) < 5
    assert disk(lora={"rank": 8}, freeze_layers=10) < disk(lora={"rank": 8})


def test_frozen_blocks_in_common_are_counted_once(small, small_reward, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "model_size", lambda *_, **__: ONE_B)
    own = {"reward": {"model": str(tmp_path / "reward" / "export")}, "freeze_layers": ONE_B.layers}

    def shared(name, judge=ONE_B.layers, **change):
        stages = {
            "ppo": small("ppo", tmp_path / name, own | change),
            "reward": small("reward", tmp_path / "reward", {"freeze_layers": judge}),
        }
        [found] = plan(Recipe.model_validate({"out": tmp_path, **stages}), "ppo")
        return dict(found.lines).get("held once", "").partition(" GB")[0]

    assert shared("a", freeze_layers=None) == ""
    assert shared("b") == "-12.00"  # four models of 4 GB, one kept
    assert shared("c", kl=None) == "-8.00"
    assert shared("d", dtype="bfloat16") == "-6.00"  # masters of two, and two in bf16
    assert shared("e", dtype="bfloat16", lora={"rank": 8}) == "-4.00"  # the reference is the policy
    assert shared("f", freeze_layers=ONE_B.layers // 2) == "-6.60"  # with the embeddings
    assert (
        shared("g", reward={"model": small_reward}) == "-4.00"
    )  # another's reward model and its critic
    for judge in (None, ONE_B.layers - 1):  # trained further down
        assert shared(f"h{judge}", judge) == "-4.00"


def kept_for_backward(model, tokens, compute):
    """Bytes that autograd holds of a forward over so many tokens, weights left out."""
    ids = torch.full((1, tokens), 5)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, held = {}, []

    def pack(tensor):
        held.append(tensor)  # so that no storage is freed and its place used again
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    casting = torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), casting:
        hidden_states(model.lm, ids)
    return sum(size for place, size in found.items() if place not in weights)


@pytest.mark.slow
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["stock", "lean", "fused"])
@pytest.mark.parametrize("shape", [{}, {"kv_heads": 1}, {"intermediate": 512}, {"layers": 9}])
def test_what_layers_keep_for_backward_is_what_autograd_holds(compute, shape, kind):
    sizes = {"vocab_size": 64, "hidden_size": 64, "heads": 4, "kv_heads": 2, "intermediate": 160}
    sizes = {**sizes, "layers": 6, **shape}
    model = LanguageModel(tiny_model(**sizes))
    if kind != "stock":
        use_lean_blocks(model.lm)
    if kind == "fused":
        use_grouped_attention(model.lm)
        use_fused_blocks(model.lm)
        if not is_fused(model.lm):
            pytest.skip("no compiled kernels")
    size = Size(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=64 * 64,
        layers=sizes["layers"],
        hidden=64,
        kv_width=2 * 16 * sizes["kv_heads"],
        vocab=64,
        q_width=64,
        intermediate=sizes["intermediate"],
        lean=kind != "stock",
        fused=kind == "fused",
    )
    few, many = (kept_for_backward(model, tokens, compute) for tokens in (100, 300))
    per_token = footprint.kept_bytes(size, compute) * sizes["layers"]
    assert (many - few) / 200 == pytest.approx(per_token, rel=0.08)  # the last norm, positions
    casts = 0 if compute == torch.float32 else 2 * (size.parameters - size.embedding)
    casts = 0 if kind == "fused" else casts
    assert few == pytest.approx(100 * per_token + casts, rel=0.15)
    plan = footprint.activations_gb(100, size, compute, checkpointing=False) * footprint.GB
    gradients = 100 * footprint.kept_bytes(size, compute) + 4 * size.embedding
    if kind == "fused":
        casts = 0 if compute == torch.float32 else 2 * (size.parameters - size.embedding)
        casts //= size.layers
    logits = 20 * 64 * 100
    if kernels_for(compute) is not None:
        logits = compute.itemsize * 64 * 100
    assert plan == pytest.approx(footprint.HOLES * (100 * per_token + casts + gradients + logits))


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    def per_token(**change):
        both = [
            footprint.activations_gb(tokens, ONE_B, torch.float32, **change)
            for tokens in (10**5, 10**6)
        ]
        return (both[1] - both[0]) * footprint.GB / 9e5 / footprint.HOLES

    layer = 4 * (6 * 2000 + 2 * 2000 + 1000 + 4 * 5000)
    # and logits of the narrowest part of the vocabulary
    assert per_token(checkpointing=False) == pytest.approx(21 * layer, rel=1e-3)
    assert per_token(checkpointing=True) == pytest.approx(20 * 4 * 2000 + 2 * layer, rel=5e-3)


def test_a_micro_batch_is_no_larger_than_what_there_is(small, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "model_size", lambda *_, **__: ONE_B)
    plans = [
        planned(small("ppo", tmp_path / str(micro), {"micro_tokens": micro}), "ppo", tmp_path)
        for micro in (10**4, 10**9)
    ]
    assert plans[0].memory_gb == plans[1].memory_gb  # two replies of at most 70 tokens a step


def test_what_is_not_held_at_once_is_not_added_up(small, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "model_size", lambda *_, **__: ONE_B)

    def memory(**change):
        found = planned(small("ppo", tmp_path / "x", change), "ppo", tmp_path)
        return found.memory_gb - planning.PROCESS_GB, dict(found.lines)

    held = 16 + 16 - 4 + 2 * 4  # one model's gradients at a time; reference and reward model
    activations = footprint.activations_gb(2 * 70, ONE_B, torch.float32, checkpointing=False)
    plain, parts = memory()
    cache = float(parts["cache"].split()[0])
    assert activations > cache
    assert plain == pytest.approx(held + activations)  # the engine's copy is where gradients were
    kept, parts = memory(engine={"kind": "transformers"})
    assert kept == pytest.approx(held + 4 + activations)
    assert parts["engine"] == "4.00 GB"
    upper, _ = memory(freeze_layers=ONE_B.layers, kl=None)  # no gradients to speak of
    assert upper == pytest.approx(3 * 4 + 4 + cache, abs=0.2)


def test_forwards_of_both_models_are_counted_where_one_micro_batch_may_hold_all_replies(
    small, tmp_path, monkeypatch
):
    shape = dataclasses.replace(ONE_B, parameters=10**7, embedding=10**6)
    monkeypatch.setattr(planning, "model_size", lambda *_, **__: shape)

    def memory(minibatch, **change):
        change |= {"minibatch_size": minibatch, "micro_tokens": 2 * 70}
        return planned(small("ppo", tmp_path / "x", change), "ppo", tmp_path).memory_gb

    kept = footprint.kept_gb(2 * 70, shape, torch.float32, checkpointing=False)
    more = memory(4) - memory(2)  # of 4 replies
    assert more == pytest.approx(kept - 4 * shape.parameters / footprint.GB)
    assert memory(4, critic=None, advantage={"estimator": "reinforce"}) == memory(
        2, critic=None, advantage={"estimator": "reinforce"}
    )
    with monkeypatch.context() as patch:  # nothing is kept there
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert memory(4) == memory(2)


def test_the_best_weights_and_every_member_take_disk(small, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "model_size", lambda *_, **__: ONE_B)
    plain = planned(small("reward", tmp_path / "a"), "reward", tmp_path)
    best = planned(small("reward", tmp_path / "b", {"early_stop": {}}), "reward", tmp_path)
    assert best.disk_gb == pytest.approx(plain.disk_gb + 2 * 4)
    three = planned(small("reward", tmp_path / "c", {"ensemble": 3}), "reward", tmp_path)
    assert three.disk_gb == pytest.approx(3 * plain.disk_gb)
    assert dict(three.lines)["ensemble"].startswith("3 models")


def test_knobs_move_the_estimate_the_right_way(small, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "model_size", lambda *_, **__: ONE_B)

    def memory(**change):
        change = {"batch_tokens": 100_000} | change
        return planned(small("sft", tmp_path / "x", change), "sft", tmp_path).memory_gb

    assert memory(micro_tokens=512) < memory() < memory(micro_tokens=32_768)
    assert memory(gradient_checkpointing=True) < memory()
    assert memory(freeze_layers=4) < memory(freeze_layers=2) < memory()
    adapted = {"lora": {"rank": 8}}
    assert memory(**adapted, freeze_layers=4) < memory(**adapted)


def test_a_reward_that_is_a_function_is_no_model_in_memory(small, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "model_size", lambda *_, **__: ONE_B)
    change = {"critic": "policy", "reward": {"callable": "math:sqrt"}}
    parts = dict(planned(small("ppo", tmp_path, change), "ppo", tmp_path).lines)
    assert "reward model" not in parts


def test_every_reward_model_is_counted_and_the_members_of_a_folder_too(
    small, small_reward, tmp_path, monkeypatch
):
    sizes = {"tiny": 10**9, "big": 4 * 10**9}

    def size(name, **_):
        return dataclasses.replace(ONE_B, parameters=sizes.get(name, 2 * 10**9))

    monkeypatch.setattr(planning, "model_size", size)
    monkeypatch.setattr(planning.preflight, "check_reward_model", lambda *_, **__: None)
    folder = tmp_path / "two"
    for member in ("a", "b"):
        (folder / member).mkdir(parents=True)
        (folder / member / "config.json").write_text("{}")
    (folder / "ensemble.json").write_text('{"members": ["a", "b"]}')
    unmade = str(tmp_path / "run" / "reward" / "export")  # of the policy's size, as it will be
    models = [str(folder), {"model": "big", "retokenize": True}, unmade]
    config = small("ppo", tmp_path / "run" / "ppo", {"reward": {"model": None, "models": models}})
    plan_of_it = planned(config, "ppo", tmp_path)
    # two members of 2 billion, one of 4, one of 1: 9 billion in float32
    assert dict(plan_of_it.lines)["4 reward models"] == "36.00 GB"
    one = planned(small("ppo", tmp_path / "x" / "ppo"), "ppo", tmp_path)
    assert dict(one.lines)["reward model"] == "8.00 GB"
    assert plan_of_it.memory_gb - one.memory_gb == pytest.approx(28.0)


def test_the_plan_says_what_the_run_will_do(small, tmp_path):
    change = {"iterations": 5, "rollout_size": 8, "minibatch_size": 4, "epochs": 3}
    change |= {"critic_pretraining": {"max_rollouts": 2}, "sampling": {"max_new_tokens": 6}}
    parts = dict(planned(small("ppo", tmp_path, change), "ppo", tmp_path).lines)
    assert parts["iterations"].startswith("5, each 6 optimizer steps of 4 replies")
    assert parts["critic pre-training"] == "at most 2 rollouts"
    assert parts["replies"] == "56, at most 336 new tokens"
    assert parts["prompts"].startswith("8; 8 per iteration")


def test_advice_says_whether_it_fits_and_what_would_help(small, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "model_size", lambda *_, **__: ONE_B)
    stages = [planned(small("ppo", tmp_path), "ppo", tmp_path)]
    most = stages[0].memory_gb
    assert advice(stages, most + 1)[0].startswith("fits")
    found = advice(stages, most / 3)
    assert found[0].startswith("does not fit")
    assert any("lora" in line for line in found)
    assert any("or 3 ranks" in line or "or 4 ranks" in line for line in found)
    assert advice([], 1.0)[0].startswith("fits")


def test_a_device_that_is_not_here_is_not_compared_with(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_memory_gb("cuda:0") is None
    [line] = advice([planning.StagePlan("ppo", memory_gb=3.0)], None)
    assert line.startswith("3.0 GB at most; the device asked for is not here")


def test_this_machine_has_memory():
    assert 0.5 < available_memory_gb() < 10_000


def test_more_frozen_blocks_than_there_are_is_no_plan(tiny, tmp_path):
    config = {"model": "tiny", "out": str(tmp_path / "sft"), "data": "bundled:preferences"}
    with pytest.raises(ConfigError, match=r"freeze_layers: 99 is more than the model's \d+ blocks"):
        planned(config | {"optim": {"lr": 1e-3}, "freeze_layers": 99}, "sft", tmp_path)
