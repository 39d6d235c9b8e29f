import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from ppomax import checkpoint
from ppomax.checkpoint import (
    MANIFEST,
    STATE,
    latest,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    prune,
    save,
    verify,
)
from ppomax.errors import CheckpointError

FILES = ["policy.safetensors", "policy_optimizer.safetensors", STATE, MANIFEST]


class Killed(BaseException):
    """Stands for the process ending on the spot: nothing may catch it."""


def groups(value):
    return {
        "policy": {"w": torch.full((3, 2), float(value)), "b": torch.arange(2.0) + value},
        "policy_optimizer": {"exp_avg.w": torch.full((3, 2), value * 0.5)},
    }


def write(root, step):
    return save(root, step, groups(step), {"step": step})


def whole(found):
    """Whether what was found is one checkpoint through and through."""
    step = found.state["step"]
    assert found.path.name.removesuffix(".old") == f"step-{step:06d}"
    for name, tensors in groups(step).items():
        loaded = found.tensors(name)
        assert loaded.keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(loaded[key], value)
    return step


def visible(root):
    return sorted(path.name for path in root.glob("step-*"))


# --- round trip


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "half": torch.randn(4).bfloat16(),
        "scalar": torch.tensor(7.0),
        "count": torch.tensor([1, 2**40]),
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "turned": torch.randn(3, 2).T,
        "grad": torch.randn(2, requires_grad=True),
        "odd.name-with 空": torch.randn(1),
    }
    state = {
        "step": 4,
        "moments": [0.1, 1e-300, 2**53],
        "name": "é",
        "none": None,
        "deep": {"a": []},
    }
    path = save(tmp_path / "new" / "checkpoints", 4, {"policy": tensors, "empty": {}}, state)
    assert path == tmp_path / "new" / "checkpoints" / "step-000004"
    found = latest(tmp_path / "new" / "checkpoints")
    assert found is not None
    assert found.path == path
    assert found.state == state
    loaded = found.tensors("policy")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert found.tensors("empty") == {}


def test_the_manifest_names_every_other_file_by_its_sha256(tmp_path):
    import hashlib

    path = write(tmp_path, 100)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["step"] == 100
    others = {item.name for item in path.iterdir()} - {MANIFEST}
    assert set(manifest["files"]) == others == set(FILES) - {MANIFEST}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest


def test_nothing_in_a_checkpoint_can_be_unpickled(tmp_path):
    path = write(tmp_path, 1)
    assert {item.suffix for item in path.iterdir()} == {".safetensors", ".json"}


def test_loaded_tensors_are_aligned_like_any_newly_made_tensor(tmp_path):
    # kernels take other paths, and round otherwise, on memory that is not aligned
    odd = {f"{n}": torch.arange(n, dtype=torch.uint8) for n in (3, 5, 7)}
    save(tmp_path, 1, {"policy": odd | {"w": torch.randn(33), "v": torch.randn(3)}}, {})
    loaded = latest(tmp_path).tensors("policy")
    assert all(value.data_ptr() % 64 == 0 for value in loaded.values())


def test_loaded_tensors_have_memory_of_their_own(tmp_path):
    found = verify(write(tmp_path, 1))
    first, second = found.tensors("policy"), found.tensors("policy")
    first["w"].fill_(9)
    assert torch.equal(second["w"], groups(1)["policy"]["w"])
    pointers = {value.untyped_storage().data_ptr() for value in first.values()}
    assert len(pointers) == len(first)


def test_a_group_that_is_not_there_is_named(tmp_path):
    found = verify(write(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"critic\.safetensors cannot be read"):
        found.tensors("critic")


def test_the_newest_step_is_found_by_number(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, step)
    assert whole(latest(tmp_path)) == 100


def test_steps_past_a_million_are_newer_than_those_before(tmp_path):
    write(tmp_path, 999_999)
    write(tmp_path, 1_000_000)
    assert whole(latest(tmp_path)) == 1_000_000
    prune(tmp_path, 1)
    assert visible(tmp_path) == ["step-1000000"]


def test_without_any_checkpoint_nothing_is_found(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "none") is None
    assert verify(tmp_path / "none") is None
    prune(tmp_path / "none", 2)


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, groups(4), {"step": 4})
    write(tmp_path, 5)
    assert whole(latest(tmp_path)) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


# --- damage


def flip(path):
    data = bytearray(path.read_bytes())
    place = data.rindex(b'"') - 3 if path.name == MANIFEST else len(data) - 3
    data[place] ^= 1
    path.write_bytes(bytes(data))


def flip_first(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "flipped": flip,
    "flipped first": flip_first,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "deleted": Path.unlink,
    "made a folder": lambda path: (path.unlink(), path.mkdir()),
    "renamed": lambda path: path.rename(path.with_name("other.safetensors")),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_noticed_and_the_checkpoint_before_is_used(tmp_path, name, damage):
    write(tmp_path, 10)
    newest = write(tmp_path, 20)
    DAMAGE[damage](newest / name)
    assert verify(newest) is None
    assert whole(latest(tmp_path)) == 10


def test_an_extra_file_or_folder_is_noticed(tmp_path):
    write(tmp_path, 10)
    (write(tmp_path, 20) / "extra.txt").write_text("x")
    (write(tmp_path, 30) / "folder").mkdir()
    assert whole(latest(tmp_path)) == 10


def test_what_a_file_browser_leaves_does_no_harm(tmp_path):
    write(tmp_path, 1)
    (checkpoint.path_of(tmp_path, 1) / ".DS_Store").write_text("")
    assert checkpoint.latest(tmp_path) is not None


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_or_of_another_name_is_noticed(tmp_path, name):
    older, newest = write(tmp_path, 10), write(tmp_path, 20)
    good = (newest / name).read_bytes()
    (newest / name).write_bytes((older / name).read_bytes())
    assert whole(latest(tmp_path)) == 10
    for other in set(FILES) - {name}:
        (newest / name).write_bytes((newest / other).read_bytes())
        assert whole(latest(tmp_path)) == 10
    (newest / name).write_bytes(good)
    assert whole(latest(tmp_path)) == 20


def test_a_whole_checkpoint_under_another_number_is_none(tmp_path):
    write(tmp_path, 10).rename(tmp_path / "step-000030")
    assert latest(tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_of_any_file_is_noticed(tmp_path, name):
    path = write(tmp_path, 10)
    good = (path / name).read_bytes()
    for place in range(len(good)):
        data = bytearray(good)
        data[place] ^= 1 << place % 8
        (path / name).write_bytes(bytes(data))
        assert verify(path) is None, place


@pytest.mark.slow
def test_any_flipped_bit_of_the_manifest_gives_nothing(tmp_path):
    path = write(tmp_path, 10)
    good = (path / MANIFEST).read_bytes()
    for place in range(len(good)):
        for bit in (0, 6):
            data = bytearray(good)
            data[place] ^= 1 << bit
            (path / MANIFEST).write_bytes(bytes(data))
            assert verify(path) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        "{}",
        '{"files": null}',
        '{"files": 3}',
        '{"files": {}}',
        json.dumps({"files": FILES[:3]}),
        json.dumps({"files": dict.fromkeys(FILES[:3])}),
        json.dumps({"files": {name: [1] for name in FILES[:3]}}),
    ],
)
def test_a_manifest_of_another_form_is_no_manifest(tmp_path, text):
    write(tmp_path, 10)
    (write(tmp_path, 20) / MANIFEST).write_text(text)
    assert whole(latest(tmp_path)) == 10


def test_files_and_strange_names_among_the_checkpoints_do_no_harm(tmp_path):
    write(tmp_path, 10)
    (tmp_path / "step-999999").write_text("a file")
    (tmp_path / "step-abc").mkdir()
    (tmp_path / "step-999998").symlink_to(tmp_path / "nowhere")
    assert whole(latest(tmp_path)) == 10
    prune(tmp_path, 1)
    assert whole(latest(tmp_path)) == 10


# --- crashes

CALLS = [
    (checkpoint, "save_file"),
    (os, "fsync"),
    (os, "mkdir"),
    (os, "rename"),
    (os, "rmdir"),
    (os, "unlink"),
    (os, "open"),
    (checkpoint, "_write"),
    (checkpoint, "_digest"),
    (shutil, "rmtree"),
]
"""Everything that a save does to the disk."""


def fail_at(monkeypatch, number, error):
    """Make the `number`-th call to the disk fail; counts the calls."""
    count = {"calls": 0}

    def wrap(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            count["calls"] += 1
            if count["calls"] == number:
                if name == "save_file":  # what a full disk or a kill leaves behind
                    Path(args[1]).write_bytes(b"half a file")
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in CALLS:
        wrap(owner, name)
    return count


def crash_everywhere(tmp_path, monkeypatch, error, before, step, check):
    """Save `step` beside those `before`, the first, second, ... call failing, until none does."""
    for number in range(1, 200):
        root = tmp_path / str(number)
        for earlier in before:
            write(root, earlier)
        with monkeypatch.context() as patch:
            count = fail_at(patch, number, error)
            try:
                write(root, step)
                failed = False
            except (Killed, CheckpointError):
                failed = True
        if count["calls"] < number:
            assert not failed
            assert number > 10, "the calls were not seen"
            return
        check(root)
    raise AssertionError("the save never ended")


@pytest.mark.slow
@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")])
def test_a_crash_at_any_call_leaves_the_checkpoint_before_or_the_new_one(
    tmp_path, monkeypatch, error
):
    def check(root):
        assert whole(latest(root)) in (10, 20)
        for path in root.glob("step-*"):
            assert verify(path) is not None, "half a checkpoint can be seen"
        write(root, 20)  # what a crash left is no obstacle
        assert visible(root) == ["step-000010", "step-000020"]
        assert whole(latest(root)) == 20
        assert not list(root.glob(".*")), "what a crash left is swept by the next save"

    crash_everywhere(tmp_path, monkeypatch, error, [10], 20, check)


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")])
def test_a_crash_while_the_first_checkpoint_is_written_leaves_none_or_a_whole_one(
    tmp_path, monkeypatch, error
):
    def check(root):
        found = latest(root)
        assert found is None or whole(found) == 20
        assert visible(root) == ([] if found is None else ["step-000020"])

    crash_everywhere(tmp_path, monkeypatch, error, [], 20, check)


@pytest.mark.slow
@pytest.mark.parametrize("error", [Killed(), OSError(5, "Input/output error")])
def test_a_crash_while_a_step_is_written_again_leaves_a_checkpoint_of_that_step(
    tmp_path, monkeypatch, error
):
    def check(root):
        assert latest(root) is not None, "the only checkpoint is lost"
        assert whole(latest(root)) == 20
        write(root, 20)  # what a crash left is no obstacle, and is swept
        assert [path.name for path in root.iterdir()] == ["step-000020"]

    crash_everywhere(tmp_path, monkeypatch, error, [20], 20, check)


def test_a_full_disk_is_one_line_that_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    good = write(tmp_path, 10)
    error = OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", lambda *_args: (_ for _ in ()).throw(error))
    with pytest.raises(CheckpointError, match=r"step-000020: .*not written .*No space left") as it:
        write(tmp_path, 20)
    assert str(good) in str(it.value)
    assert "\n" not in str(it.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(
        CheckpointError, match=r"needs .* [GM]B, .* [GM]B are free.*no checkpoint exists"
    ):
        write(tmp_path, 20)
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_of_the_same_step_counts_as_free_space(tmp_path, monkeypatch):
    left = tmp_path / ".step-000020.part"
    left.mkdir()
    (left / "policy.safetensors").write_bytes(b"x" * 1000)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _path: real._replace(free=0 if left.exists() else 2**30)
    )
    assert whole(verify(write(tmp_path, 20))) == 20


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(CheckpointError, match="not written"):
        write(tmp_path / "checkpoints", 1)


def test_only_the_manifest_makes_a_checkpoint_and_it_is_written_last(tmp_path, monkeypatch):
    order = []
    original = checkpoint._write
    monkeypatch.setattr(
        checkpoint, "_write", lambda path, text: (order.append(path.name), original(path, text))
    )
    sync = checkpoint._sync
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (order.append(path.name), sync(path)))
    write(tmp_path, 20)
    at = order.index(MANIFEST)
    assert set(FILES) - {MANIFEST} <= set(order[:at]), "every file is on the disk before"
    assert order[at + 1 :] == [".step-000020.part", tmp_path.name], "then both folders"


# --- pruning


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    prune(tmp_path, 2)
    assert visible(tmp_path) == ["step-000003", "step-000004"]
    prune(tmp_path, 0)
    assert visible(tmp_path) == ["step-000004"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_prune_never_removes_the_last_good_one(tmp_path, keep):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    for step in (2, 3, 4):
        (tmp_path / f"step-{step:06d}" / STATE).write_text("{}")
    prune(tmp_path, keep)
    assert whole(latest(tmp_path)) == 1


# --- models


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    model[2].bias.requires_grad_(False)
    model.register_buffer("count", torch.tensor(3))
    return model


def optimizer_of(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 4, generator=generator)
        (model(x) * model.scale).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_trainable_parameters_alone_are_saved_whole_and_detached():
    model = net()
    tensors = model_tensors(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(tensors) == trainable
    assert "2.bias" not in tensors
    assert not any(value.requires_grad for value in tensors.values())


def test_loading_fills_the_models_own_memory():
    source, target = net(0), net(1)
    pointers = {name: p.data_ptr() for name, p in target.named_parameters()}
    load_model_tensors(target, model_tensors(source))
    assert pointers == {name: p.data_ptr() for name, p in target.named_parameters()}
    assert all(p.requires_grad for n, p in target.named_parameters() if n != "2.bias")
    for name, value in model_tensors(source).items():
        assert torch.equal(target.get_parameter(name), value)


def test_tensors_that_do_not_fit_the_model_are_named_and_nothing_is_loaded():
    target = net(1)
    before = {name: value.clone() for name, value in model_tensors(target).items()}
    tensors = model_tensors(net(0))
    with pytest.raises(CheckpointError, match=r"0\.weight stands on one side only"):
        load_model_tensors(target, {k: v for k, v in tensors.items() if k != "0.weight"})
    with pytest.raises(CheckpointError, match="extra stands on one side only"):
        load_model_tensors(target, tensors | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"2\.weight has shape \(1, 6\).*\(6, 6\)"):
        load_model_tensors(target, tensors | {"2.weight": torch.zeros(1, 6)})
    assert all(torch.equal(value, before[name]) for name, value in model_tensors(target).items())


def test_training_goes_on_bitwise_after_a_checkpoint(tmp_path):
    straight = net()
    optimizer = optimizer_of(straight)
    train(straight, optimizer, 0, 3)
    tensors = {
        "policy": model_tensors(straight),
        "policy_optimizer": optimizer_tensors(straight, optimizer),
    }
    save(tmp_path, 3, tensors, {})
    train(straight, optimizer, 3, 6)

    found = latest(tmp_path)
    resumed = net(1)
    resumed[2].bias.data.copy_(straight[2].bias)
    again = optimizer_of(resumed)
    train(resumed, again, 0, 2)  # state of its own, to be replaced
    load_model_tensors(resumed, found.tensors("policy"))
    load_optimizer_tensors(resumed, again, found.tensors("policy_optimizer"))
    train(resumed, again, 3, 6)
    for (name, a), (_, b) in zip(
        straight.named_parameters(), resumed.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    first, second = optimizer_tensors(straight, optimizer), optimizer_tensors(resumed, again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_without_the_optimizers_state_training_would_go_another_way():
    straight, other = net(), net()
    a, b = optimizer_of(straight), optimizer_of(other)
    train(straight, a, 0, 3)
    load_model_tensors(other, model_tensors(straight))
    train(straight, a, 3, 4)
    train(other, b, 3, 4)
    assert not torch.equal(straight[0].weight, other[0].weight)


def test_optimizer_state_is_named_by_slot_and_parameter():
    model = net()
    optimizer = optimizer_of(model)
    assert optimizer_tensors(model, optimizer) == {}
    train(model, optimizer, 0, 1)
    tensors = optimizer_tensors(model, optimizer)
    slots = {"exp_avg", "exp_avg_sq", "step"}
    assert set(tensors) == {f"{slot}.{name}" for slot in slots for name in model_tensors(model)}
    assert float(tensors["step.0.weight"]) == 1
    assert tensors["exp_avg.scale"].dim() == 0
    assert len(optimizer.state) == len(model_tensors(model)), "asking made no entries"


def test_optimizer_state_of_another_model_is_refused_by_name():
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 1)
    tensors = optimizer_tensors(model, optimizer) | {"exp_avg.other.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"other\.weight"):
        load_optimizer_tensors(model, optimizer, tensors)


@pytest.mark.parametrize("shape", [(1, 6), (6,), (6, 1), (3, 12), (36,)])
def test_optimizer_state_of_another_shape_is_refused_by_name(shape):
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 1)
    tensors = optimizer_tensors(model, optimizer) | {"exp_avg.2.weight": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=r"2\.weight"):
        load_optimizer_tensors(model, optimizer, tensors)
