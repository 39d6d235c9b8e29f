"""What cannot change a PPO iteration does not, through `train_ppo` itself, in float32.

Each test runs two iterations (and one of critic pre-training) twice and holds everything against
each other: metrics, gradients before the clip, running moments, parameters. `-s` prints the largest
deviations; those of docs/LOG.md are from here.
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from ppomax import distributed
from ppomax.distributed import World
from ppomax.models.language import LanguageModel
from ppomax.models.load import load_policy
from ppomax.train import ppo, ppo_state
from ppomax.train.experience_batch import plan_updates
from ppomax.train.micro_batches import rank_micro_batches
from ppomax.train.ppo import train_ppo
from ppomax.train.prompts import PromptStream

pytestmark = pytest.mark.slow
TIMES = ("time", "throughput/", "memory/")
TOLERANCES = {
    "loss": 1e-5,
    "gradient": 5e-5,
    "gradient norm": 1e-5,
    "running moments": 1e-5,
    "metric": 1e-4,
    "parameter": 1e-5,
}
"""Of losses, norms, moments and metrics: relative, above a floor of 0.1. Of a gradient: the largest
entry's, relative to the norm; later steps start from parameters that differ in the last bits. Of a
parameter: absolute."""

BUSY = {
    "rollout_size": 6,
    "minibatch_size": 3,
    "epochs": 2,
    "micro_tokens": 100_000,
    "max_length": 256,
    "max_prompt": 220,
    "sampling": {"temperature": 0.9, "max_new_tokens": 8, "stop": ["a"]},
    "critic_pretraining": {"max_rollouts": 1},
    "kl": {"coef": 0.1, "target_per_token": 0.01, "horizon": 50},
    "loss": {"value_clip": 1.0, "entropy_coef": 0.01, "entropy_threshold": 3.0},
    "advantage": {"whiten": True, "lam_critic": 0.5},
    "checkpoint": {"every": 1},
}
"""Every term that could depend on a split is on, and replies end at different lengths."""
OTHER = BUSY | {
    "buffer_iterations": 2,
    "advantage": {"missing_eos": "bootstrap"},
    "kl": {"coef": 0.1, "where": "loss", "estimator": "exact", "exact_replies": 4},
    "loss": {
        "value_clip": 1.0,
        "policy_clip": None,
        "penalty_coef": 0.5,
        "penalty_target": 1e-3,
        "entropy_coef": 0.01,
        "entropy_fraction": 0.9,
    },
}
"""The terms that take the place of those."""
GROUPED = BUSY | {
    "rollout_size": 3,
    "samples_per_prompt": 2,
    "critic_pretraining": None,
    "advantage": {"estimator": "grpo", "missing_eos": "drop", "clip": 1.0},
    "kl": {"coef": 0.1, "where": "loss", "estimator": "k3"},
    "loss": {"entropy_coef": 0.01, "value_clip": None},
}
"""No critic; replies to the same prompt are compared."""
BASES = {"busy": BUSY, "other terms": OTHER, "groups": GROUPED}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Six prompts, one of them twenty times as long as another."""
    river = "Rain fell on the hills all night and the river rose above the old bridge. " * 5
    texts = [river, "Why?", "What of tea and bread?", "Go on.", river[:90], "Sing!"]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


@dataclasses.dataclass(frozen=True)
class Record:
    """All that a run leaves."""

    rows: list
    gradients: list
    moments: dict
    parameters: dict


def record(run, gradients):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = max((run / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    return Record(
        rows=[{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows],
        gradients=gradients,
        moments=state["moments"] | {"kl coefficient": state["kl"]["coef"]},
        parameters={
            f"{name}.{key}": value
            for name in ("policy", "critic")
            if (newest / f"{name}.safetensors").exists()
            for key, value in load_file(newest / f"{name}.safetensors").items()
        },
    )


@pytest.fixture(scope="module")
def known():
    """Records of runs without a patch, by their changes."""
    return {}


@pytest.fixture
def settings(small, prompts, small_data, tmp_path):
    """`settings(name, changes)` of a run."""
    ptx = {"data": small_data["text"], "length": 32, "tokens": 40}
    data = {"data": prompts, "ptx": ptx}
    return lambda name, base, changes: small("ppo", tmp_path / name, BASES[base] | data | changes)


@pytest.fixture
def do(settings, tmp_path, monkeypatch, known):
    """`do(changes)`: a run's record. Every gradient is noted before it is clipped."""
    caught = []
    plain = distributed.clip_gradients

    def note(parameters, max_norm):
        caught.append({str(i): p.grad.clone() for i, p in enumerate(parameters)})
        return plain(parameters, max_norm)

    monkeypatch.setattr(distributed, "clip_gradients", note)

    def run(changes=None, *, base="busy", patched=False):
        key = base + json.dumps(changes or {})
        if patched or key not in known:
            caught.clear()
            out = train_ppo(settings(f"{len(list(tmp_path.iterdir()))}", base, changes or {}))
            found = record(out, list(caught))
            if patched:
                return found
            known[key] = found
        return known[key]

    return run


def norm_of(gradient):
    return sum(value.square().sum() for value in gradient.values()).sqrt()


def deviations(one, two):
    """The largest deviation of each kind; shapes, keys and steps are the same or it fails."""
    found = dict.fromkeys(TOLERANCES, 0.0)

    def see(kind, deviation):
        found[kind] = max(found[kind], float(deviation))

    assert len(one.rows) == len(two.rows)
    for row, other in zip(one.rows, two.rows, strict=True):
        assert set(row) == set(other)
        for key, value in row.items():
            if key in ("stage", "step", "attempt"):
                assert other[key] == value
            elif not key.startswith("engine/"):  # the engine's rounding against the trainer's
                exact = {"loss": "loss", "norm": "gradient norm"}
                kind = next((k for end, k in exact.items() if key.endswith(end)), "metric")
                see(kind, abs(other[key] - value) / max(abs(value), 0.1))
    for step, other in zip(one.gradients, two.gradients, strict=True):
        assert set(step) == set(other)
        norm = norm_of(step).clamp(min=1e-6)  # a critic past its clip everywhere has none
        for key, value in step.items():
            see("gradient", (other[key] - value).abs().max() / norm)
    assert set(one.moments) == set(two.moments)
    for key, value in one.moments.items():
        see("running moments", abs(two.moments[key] - value) / max(abs(value), 0.1))
    assert set(one.parameters) == set(two.parameters)
    for key, value in one.parameters.items():
        see("parameter", (two.parameters[key] - value).abs().max())
    return found


def check(name, one, two):
    for row in one.rows + two.rows:
        if row["stage"] == "ppo":
            assert row["policy/first_ratio_error"] == row["kl/first_old_k3"] == 0.0
        assert row["engine/logprob_gap_max"] < 2e-5
    found = deviations(one, two)
    print(f"\n{name}: " + ", ".join(f"{kind} {value:.1e}" for kind, value in found.items()))
    for kind, value in found.items():
        assert value <= TOLERANCES[kind], (name, kind, value)


def test_the_base_run_has_something_to_lose(do):
    """Steps are many, replies end early and late, and two seeds are far beyond the tolerances."""
    one, two = do(), do({"seed": 1})
    assert len(one.gradients) == 2 + 2 * 4 * 2  # critic pre-training: one pass; then 2 x 2 passes
    assert all(norm_of(gradient) > 1e-3 for gradient in one.gradients[2::2]), "the policy's"
    assert any(norm_of(gradient) > 1e-3 for gradient in one.gradients[3::2]), "the critic's"
    assert any(0 < row["response/truncated_share"] < 1 for row in one.rows)
    assert any(row["response/length_p95"] > row["response/length_mean"] + 2 for row in one.rows)
    for base in BASES:
        last = do(base=base).rows[-1]
        assert last["policy/ratio_max"] > 1.001, base
        assert abs(last["policy/loss"]) > 1e-3, base
    found = deviations(one, two)
    assert all(found[kind] > 10 * TOLERANCES[kind] for kind in TOLERANCES), found


@pytest.mark.parametrize(
    ("base", "micro_tokens"),
    [("busy", 1), ("busy", 80), ("busy", 250), ("other terms", 80), ("groups", 80)],
)
def test_micro_batches_from_one_reply_up_to_all(base, micro_tokens, do):
    one, two = do(base=base), do({"micro_tokens": micro_tokens}, base=base)
    check(f"{base}, micro_tokens {micro_tokens}", one, two)


@pytest.mark.parametrize(
    "engine",
    [{"slots": 1}, {"slots": 4}, {"kind": "transformers"}, {"kind": "transformers", "slots": 1}],
    ids=str,
)
def test_padding_inside_the_engine_left_right_or_none(engine, do):
    """The native engine pads prompts on the right, the other on the left; one slot pads none."""
    check(f"engine {engine}", do(), do({"engine": engine}))


def test_the_order_of_a_rollouts_prompts(do, monkeypatch):
    """One optimizer batch is the whole rollout: the order decides no composition then."""
    whole = {"minibatch_size": 6}
    plain, seen = PromptStream.batch, []
    one = do(whole)

    def turned(self, start, count):
        found = plain(self, start, count)
        seen.append([prompt.index for prompt in found])
        return found[2:][::-1] + found[:2]

    monkeypatch.setattr(PromptStream, "batch", turned)
    check("order of prompts", one, do(whole, patched=True))
    assert len(seen) == 3
    assert all(sorted(order) == list(range(6)) for order in seen)


def test_with_lora_adapters_off_or_a_separate_reference(do, monkeypatch):
    change = {"lora": {"rank": 4, "alpha": 8.0}, "optim": {"lr": 1e-2}, "iterations": 3}
    one = do(change)
    assert one.rows[-1]["kl/ref_k3"] > 1e-5
    plain = ppo_state.load_actors

    def with_reference(config, here):
        reference = LanguageModel(load_policy("tiny")).requires_grad_(False)
        return dataclasses.replace(plain(config, here), reference=reference)

    monkeypatch.setattr(ppo_state, "load_actors", with_reference)
    check("LoRA, separate reference", one, do(change, patched=True))


@pytest.mark.parametrize("base", ["busy", "groups"])
def test_one_process_or_two(base, do, launch, settings, tmp_path, monkeypatch):
    """Over gloo, sharded; in some step one rank has more than twice the other's tokens.

    The other terms on two ranks are in test_ranks.py.
    """
    config = settings("two", base, {"micro_tokens": 60})
    job = [("ppo", config.model_dump(mode="json"), False)]
    ended = launch(ranks=2, stages=job, gradients=str(tmp_path / "gradients"))
    assert [end.code for end in ended] == [0, 0], ended[0].log[-3000:] + ended[1].log[-3000:]
    files = sorted((tmp_path / "gradients").iterdir())
    two = record(tmp_path / "two", [load_file(file) for file in files])
    shares = []
    plain = ppo.estimate

    def watch(rollout, *more):
        length = [len(p) + len(r) for p, r in zip(rollout.prompts, rollout.responses, strict=True)]
        worlds = [World(rank, 2, torch.device("cpu")) for rank in (0, 1)]
        for minibatch in plan_updates(rollout, config, worlds[0], "ppo", 1, 0):
            parts = [rank_micro_batches(minibatch, here) for here in worlds]
            shares.append([sum(w * length[i] for b, w in part for i in b) for part in parts])
        return plain(rollout, *more)

    monkeypatch.setattr(ppo, "estimate", watch)
    check(f"{base}, two processes", do(base=base, patched=True), two)
    assert any(max(share) > 2 * min(share) > 0 for share in shares), shares
