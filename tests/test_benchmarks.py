"""The yardsticks themselves: work counted against torch's own count, numbers, turns."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ppomax.models.tiny import tiny_model

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def common():
    spec = importlib.util.spec_from_file_location("common", FOLDER / "common.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["common"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["common"]


SHAPE = {"hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 16}
SHAPE |= {"intermediate": 96, "vocab": 300}


def counted(read, length):
    """What torch counts of a forward whose output matrix is used at the last `read` positions."""
    model = tiny_model(vocab_size=300, layers=3, intermediate=96)
    model.set_attn_implementation("eager")  # scores and mixing as matrix products, unmasked
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.full((1, length), 5), logits_to_keep=read)
    return counter.get_total_flops()


def test_flops_of_a_forward_are_those_that_torch_counts(common):
    shape = common.Shape(**SHAPE)
    for length, read in ((40, 8), (25, 25)):
        unmasked = 4 * 3 * 64 * length * length  # eager attention computes what the mask drops
        own = shape.forward(length, read) - shape.attention(length) + unmasked
        rotary = 2 * 8 * length  # angles: positions times frequencies
        assert counted(read, length) == pytest.approx(own + rotary, abs=rotary)


def test_causal_attention_counts_each_pair_once(common):
    pairs = sum(position + 1 for position in range(10))
    assert common.Shape(**SHAPE).attention(10) == 3 * 2 * 2 * 64 * pairs


def test_an_iteration_is_a_rollout_four_readings_and_two_updates(common):
    shape = common.Shape(**SHAPE)
    found = common.iteration_flops(shape, prompts=5, prompt=7, new=3, epochs=2)
    policy, critic = shape.forward(10, 3), shape.forward(10, 0)
    assert found["rollout"] == 5 * shape.forward(9, 3)  # the last token is not read again
    assert found["score"] == 5 * 2 * (policy + critic)
    assert found["update"] == 5 * 2 * 3 * (policy + critic)
    assert found["whole"] == found["rollout"] + found["score"] + found["update"]
    assert found["kept"] == 5 * (policy + critic)
    less, again = common.iteration_flops(shape, 5, 7, 3, 2, opening=4), 4 * shape.forward(4, 0)
    passes = {"rollout": 1, "score": 4, "update": 2 * 2 * 3, "kept": 2}  # of four texts of five
    assert all(less[part] == found[part] - times * again for part, times in passes.items())


def test_the_exponent_is_the_slope_of_logarithms(common):
    assert common.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2.0)
    assert common.exponent([10, 20], [5, 5]) == pytest.approx(0.0)


def test_workers_take_turns_and_the_warm_up_is_left_out(common):
    order = []

    class Fake:
        def __init__(self, name):
            self.name, self.count = name, 0

        def go(self):
            self.count += 1
            order.append(self.name)
            return {"seconds": float(self.count)}

    answers = common.in_turn({"a": Fake("a"), "b": Fake("b")}, rounds=2)
    assert "".join(order) in ("abbaab", "baabba")
    assert [row["seconds"] for row in answers["a"]] == [2.0, 3.0]


def test_a_worker_that_dies_says_why(common):
    with pytest.raises(SystemExit, match=r"mine ended \(3\):\nno such thing"):
        common.Worker("mine", [sys.executable, "-c", DYING])


DYING = "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_on_the_cpu_with_a_tiny_model():
    command = [sys.executable, FOLDER / "gpu.py", "--tiny"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert "times the tokens of generate" in found.stdout
    assert "of the matrix rate" in found.stdout
