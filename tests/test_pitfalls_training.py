"""Mistakes of other RLHF code (docs/pitfalls.md) that training must not make, under their numbers.

Runs are of one or two steps on the tiny model; maths-only pitfalls are in test_pitfalls_maths.py,
those of several ranks in train/test_ranks.py, those of resuming in train/test_resume.py.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file

from ppomax.config import merge
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.errors import ConfigError, DataError, PpomaxError
from ppomax.models.language import LanguageModel
from ppomax.models.load import load_policy, load_reward_model, load_tokenizer
from ppomax.monitors import DECLARED
from ppomax.rollout.engine import EngineSettings, Rollout, build_engine
from ppomax.rollout.sampling import SamplingParams
from ppomax.train import experience_batch, ppo, ppo_state
from ppomax.train.experience_batch import reply_batch, response_mask
from ppomax.train.ppo import train_ppo
from ppomax.train.ppo_config import KLSettings, PPOConfig
from ppomax.train.reward import train_reward
from ppomax.train.sft import encode_dialogue, train_sft
from ppomax.types import Message, SFTRow

CPU = torch.device("cpu")
TIMES = ("time", "throughput/", "memory/")


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(run):
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMES)}
        for row in jsonl(run / "metrics.jsonl")
    ]


def exported(run):
    return load_file(run / "export" / "model.safetensors")


def checkpointed(run, name):
    return load_file(max((run / "checkpoints").iterdir()) / f"{name}.safetensors")


def copied(tiny, folder, config=None, generation=None):
    """The tiny model's folder with other entries in its configs."""
    shutil.copytree(tiny, folder)
    if config:
        text = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(text | config))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


# --- masks


def test_03_masks_come_from_lengths_whatever_ids_a_reply_holds():
    rollout = Rollout([[5, 3], [6]], [[7, 3, 2], [3]], [[0.0] * 3, [0.0]], [True, False])
    assert response_mask(rollout, CPU).tolist() == [[True] * 3, [True, False, False]]
    batch = reply_batch(rollout, [0, 1], 3, CPU)  # 3 is the pad id and stands in both replies
    assert batch.targets.sum(1).tolist() == [3, 1]
    assert batch.lengths.tolist() == [5, 2]


def test_03_the_end_token_is_learned_where_pad_was_eos(tiny, tmp_path):
    folder = copied(tiny, tmp_path / "model")
    text = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    (Path(folder) / "tokenizer_config.json").write_text(
        json.dumps(text | {"pad_token": text["eos_token"]})
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    talk = (Message(role="user", content="Hi"), Message(role="assistant", content="Yes"))
    encoded = encode_dialogue(SFTRow("a", talk), ChatTemplate(tokenizer), 64)
    assert (encoded.ids[-1], encoded.mask[-1]) == (tokenizer.eos_token_id, True)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_02_a_score_lands_on_the_last_token_that_was_sampled(
    pad_is_eos, small, tiny, tmp_path, monkeypatch
):
    """Replies of every length up to the limit, ended or cut, some with the pad id among them."""
    folder = copied(tiny, tmp_path / "model")
    place = Path(folder) / "tokenizer_config.json"
    text = json.loads(place.read_text())
    if pad_is_eos:
        place.write_text(json.dumps(text | {"pad_token": text["eos_token"]}))
    (tmp_path / "two_for_all.py").write_text(
        "def two(prompts, responses, *, ids, metadata):\n    return [2.0] * len(ids)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = load_tokenizer(folder)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    words = [[60, pad, 61, 62][:length] for length in (1, 2, 3, 4)]
    replies = [[*word[:-1], eos] for word in words] + words
    ended = [True] * 4 + [False] * 4
    seen = []
    merge_parts, estimate = ppo.merge_rollouts, ppo.estimate

    def written(parts, count):
        prompts = merge_parts(parts, count).prompts
        return Rollout(prompts, replies, [[-1.0] * len(reply) for reply in replies], ended)

    monkeypatch.setattr(ppo, "merge_rollouts", written)
    monkeypatch.setattr(ppo, "estimate", lambda *args: seen.append(estimate(*args)) or seen[-1])
    reward = {"callable": "two_for_all:two", "normalise": None, "clip": None}
    change = {"model": folder, "critic": "policy", "kl": None, "reward": reward}
    change |= {"iterations": 1, "rollout_size": 8, "minibatch_size": 8}
    train_ppo(small("ppo", tmp_path / "run", change | {"advantage": {"lam": 1.0}}))
    for row, reply in enumerate(replies):
        expected = [0.0] * (len(reply) - 1) + [2.0] + [0.0] * (4 - len(reply))
        assert seen[0].rewards[row].tolist() == expected
        fitted = [2.0] * len(reply) + [0.0] * (4 - len(reply))
        assert seen[0].returns[row].tolist() == pytest.approx(fitted, abs=1e-6)


# --- reference and coefficient


def test_08_without_a_reference_there_is_no_penalty_and_no_kl(small, tmp_path):
    found = rows(train_ppo(small("ppo", tmp_path / "run", {"kl": None})))
    assert not [key for key in found[0] if key.startswith(("kl/ref", "kl/coef", "ref/"))]
    scores = found[0]["reward/score_mean"], found[0]["reward/score_std"]
    assert found[0]["reward/total_mean"] == pytest.approx(0, abs=1e-5), scores  # standardized
    with pytest.raises(ConfigError, match=r"loss\.ratio_to"):
        small("ppo", tmp_path, {"kl": None, "loss": {"ratio_to": "reference"}})


@pytest.mark.slow
def test_10_the_targets_unit_is_in_its_name_and_the_coefficient_in_the_checkpoint(small, tmp_path):
    with pytest.raises(ValidationError, match="not both"):
        KLSettings(target_per_token=0.1, target_per_sequence=1.0)
    change = {"kl": {"coef": 0.05, "target_per_sequence": 1.0, "horizon": 4}}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    found = rows(run)
    assert found[0]["kl/coef"] == 0.05
    expected = 0.05 * (1 - 0.2)  # the first rollout is the reference's own: KL 0, far below
    assert found[1]["kl/coef"] == pytest.approx(expected)
    state = json.loads((max((run / "checkpoints").iterdir()) / "state.json").read_text())
    error = max(-0.2, min(0.2, found[1]["kl/ref_sequence"] / 1.0 - 1))
    assert state["kl"]["coef"] == pytest.approx(expected * (1 + error))


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_10_the_coefficient_follows_the_kl_of_its_targets_unit(unit, small, tmp_path):
    key = {"token": "kl/ref_k1", "sequence": "kl/ref_sequence"}[unit]
    kl = {"coef": 0.05, f"target_per_{unit}": 0.1, "horizon": 4}
    change = {"kl": kl, "iterations": 4, "epochs": 2, "optim": {"lr": 1e-2}}
    found = rows(train_ppo(small("ppo", tmp_path / "run", change)))
    coef, differ = 0.05, 0
    for row in found:
        assert row["kl/coef"] == pytest.approx(coef)
        errors = {
            name: max(-0.2, min(0.2, row[name] / 0.1 - 1)) for name in row if "kl/ref_" in name
        }
        differ += errors["kl/ref_k1"] != errors["kl/ref_sequence"]
        coef *= 1 + errors[key]
    assert differ, "a run in which the unit makes no difference says nothing"


# --- every key under `ppo` (13)

BUSY = {
    "epochs": 2,
    "optim": {"lr": 3e-3},
    "critic_optim": {"lr": 3e-3},
    "loss": {"value_clip": 0.05},
    "log": {"samples_every": 1},
    "seed": 3,
}
"""A base run in which every trick has something to act on."""

CALLED = {"critic": "policy", "reward": {"callable": "scores_for_pitfalls:length"}}
TEXT = {"data": "TEXT", "tokens": 20}
TARGET = {"kl": {"target_per_token": 0.05, "horizon": 8}}
PRETRAINED = {"critic_pretraining": {"max_rollouts": 2, "explained_variance": 1.0}}
LORA = {"lora": {"rank": 2, "alpha": 4.0}}
PLAIN_CRITIC = {"lr": 1.65e-6, "eps": 1e-8, "schedule": "constant"}
GRPO = {
    "advantage": {"estimator": "grpo"},
    "loss": {"value_clip": None},
    "critic_optim": PLAIN_CRITIC,
    "samples_per_prompt": 2,
}
PENALTY = {"loss": {"policy_clip": None, "penalty_coef": 5.0}}
KL_LOSS = {"kl": {"where": "loss", "estimator": "k3", "coef": 1.0}}

CHANGES_ROWS = {
    "seed": {"seed": 4},
    "freeze_embeddings": {"freeze_embeddings": True},
    "freeze_layers": {"freeze_layers": 1},
    "dtype": {"dtype": "bfloat16"},
    "system": {"system": "Be brief.", **CALLED},
    "data.path": {"data": "PAIRS"},
    "data.limit": {"data": {"path": "PROMPTS", "limit": 3}},
    "data.where": {"data": [{"path": "PROMPTS", "where": {"lang": "en"}}, "TWO"]},
    "heldout": {"heldout": 0.5},
    "iterations": {"iterations": 3},
    "rollout_size": {"rollout_size": 6},
    "samples_per_prompt": {"samples_per_prompt": 2},
    "buffer_iterations": {"buffer_iterations": 2},
    "minibatch_size": {"minibatch_size": 4},
    "epochs": {"epochs": 1},
    "max_prompt": {"data": "LONG", "max_prompt": 40},
    "sampling.temperature": {"sampling": {"temperature": 0.5}},
    "sampling.max_new_tokens": {"sampling": {"max_new_tokens": 9}},
    "sampling.top_p": {"sampling": {"top_p": 0.3}},
    "sampling.top_k": {"sampling": {"top_k": 2}},
    "sampling.min_p": {"sampling": {"min_p": 0.9}},
    "sampling.repetition_penalty": {"sampling": {"repetition_penalty": 50.0}},
    "sampling.stop": {"sampling": {"stop": ["a", "e", "o"]}},
    "reward.normalise": {"reward": {"normalise": "scale"}},
    "reward.clip": {"reward": {"clip": 0.1}},
    "reward.missing_eos_penalty": {"reward": {"missing_eos_penalty": 2.0}},
    "kl.coef": {"kl": {"coef": 0.5}},
    "kl.target_per_token": TARGET,
    "kl.target_per_sequence": {"kl": {"target_per_sequence": 0.05, "horizon": 8}},
    "kl.where": KL_LOSS,
    "kl.estimator": merge(KL_LOSS, {"kl": {"estimator": "exact"}}),
    "kl.exact_replies": {"kl": {"exact_replies": 2}},
    "kl.horizon": merge(TARGET, {"kl": {"horizon": 800}}),
    "advantage.gamma": {"advantage": {"gamma": 0.5}},
    "advantage.lam": {"advantage": {"lam": 0.1}},
    "advantage.lam_critic": {"advantage": {"lam_critic": 0.1}},
    "advantage.estimator": GRPO,
    "advantage.scale_std": merge(GRPO, {"advantage": {"scale_std": False}}),
    "advantage.missing_eos": {"advantage": {"missing_eos": "bootstrap"}},
    "advantage.whiten": {"advantage": {"whiten": True}},
    "advantage.clip": {"advantage": {"clip": 0.01}},
    "loss.policy_clip": {"loss": {"policy_clip": 0.001}},
    "loss.penalty_coef": PENALTY,
    "loss.penalty_target": merge(PENALTY, {"loss": {"penalty_target": 1e-9}}),
    "loss.dual_clip": {"loss": {"policy_clip": None, "dual_clip": 1.001}},
    "loss.value_clip": {"loss": {"value_clip": None}},
    "loss.entropy_coef": {"loss": {"entropy_coef": 0.5}},
    "loss.entropy_threshold": {"loss": {"entropy_coef": 0.5, "entropy_threshold": 6.1}},
    "loss.entropy_fraction": {"loss": {"entropy_coef": 0.5, "entropy_fraction": 0.5}},
    "loss.ratio_to": {"loss": {"ratio_to": "reference"}},
    "loss.target_kl": {"loss": {"target_kl": 1e-9}},
    "critic": {"critic": "policy"},
    "critic_pretraining.max_rollouts": PRETRAINED,
    "critic_pretraining.explained_variance": merge(
        PRETRAINED, {"critic_pretraining": {"explained_variance": -1e9}}
    ),
    "critic_pretraining.epochs": merge(PRETRAINED, {"critic_pretraining": {"epochs": 3}}),
    "ptx.data.path": {"ptx": TEXT},
    "ptx.data.limit": {"ptx": TEXT | {"data": {"path": "TEXT", "limit": 1}}},
    "ptx.coef": {"ptx": TEXT | {"coef": 9.0}},
    "ptx.tokens": {"ptx": TEXT | {"tokens": None}},
    "ptx.length": {"ptx": TEXT | {"length": 8}},
    "lora.rank": LORA,
    "lora.alpha": {"lora": {"rank": 2, "alpha": 40.0}},
    "lora.target_modules": {"lora": {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj"]}},
    **{
        f"{which}.{key}": {which: {"lr": 3e-3} | value}
        for which in ("optim", "critic_optim")
        for key, value in {
            "lr": {"lr": 1e-4},
            "schedule": {"schedule": "linear"},
            "warmup": {"warmup": 0.5},
            "floor": {"schedule": "linear", "floor": 0.5},
            "betas": {"betas": [0.5, 0.6]},
            "eps": {"eps": 1e-2},
            "weight_decay": {"weight_decay": 0.5},
            "grad_clip": {"grad_clip": 1e-3},
        }.items()
    },
}
"""What each key changes, laid over BUSY; the metrics must differ from BUSY's and each other's."""

NEUTRAL = {
    "micro_tokens": {"micro_tokens": 30},
    "engine.slots": {"engine": {"slots": 2}},
    "engine.kind": {"engine": {"kind": "transformers"}},
    "engine.cuda_graphs": {"engine": {"cuda_graphs": False}},
    "engine.kernels": {"engine": {"kernels": False}},
    "threads": {"threads": torch.get_num_threads()},
    "deterministic": {"deterministic": True},
    "optim.spike_z": {"optim": {"spike_z": 6.0}},
    "critic_optim.spike_z": {"critic_optim": {"spike_z": 6.0}},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "checkpoint.every": {"checkpoint": {"every": 1}},
    "checkpoint.keep_last": {"checkpoint": {"every": 1, "keep_last": 1}},
    "checkpoint.keep_best": {"checkpoint": {"every": 1, "keep_best": 1}},
    "checkpoint.asynchronous": {"checkpoint": {"every": 1, "asynchronous": True}},
    "checkpoint.grace_s": {"checkpoint": {"grace_s": 5}},
    "log.samples_every": {"log": {"samples_every": 2}, "iterations": 2},
    "log.samples": {"log": {"samples": 1}},
    "max_length": {"max_length": 200},
}
"""Keys documented to leave results alone; what they do change is tested one by one below."""

ELSEWHERE = {
    **{
        f"monitor.{key}": "test_collapse.py"
        for key in ("baseline", "votes", "amber", "red", "patience", "calm", "release")
    },
    **{f"monitor.{key}": "test_collapse.py" for key in ("max_kl", "max_length_share")},
    **{
        f"monitor.{key}": "train/test_watching.py"
        for key in ("action", "max_rollbacks", "kl_factor", "kl_least", "lr_factor", "keep_green")
    },
    **{
        f"monitor.track.{key}": "train/test_watching.py"
        for key in ("every", "prompts", "data.path", "model", "callable")
    },
    **{
        f"monitor.track.data.{key}": "data/test_sources.py: the same sources"
        for key in ("where", "format", "limit", "weight", "strength")
    },
    "model": "test_31 and every run",
    "out": "every run",
    "device": "test_13_keys_that_a_machine_or_package_refuses",
    "log.to": "test_13_keys_that_a_machine_or_package_refuses",
    "trust_remote_code": "test_13_trust_reaches_every_loader",
    "max_bad_rows": "test_13_bad_rows_are_counted_against_max_bad_rows",
    "data.weight": "data/test_sources.py",
    "data.format": "data/test_sources.py",
    "data.strength": "of pairs alone: train/test_reward.py",
    "ptx.data.strength": "of pairs alone: train/test_reward.py",
    "ptx.data.weight": "data/test_sources.py",
    "ptx.data.where": "data/test_sources.py",
    "ptx.data.format": "data/test_sources.py",
    "reference": "train/test_options.py",
    "reward.model": "every run",
    "reward.callable": "train/test_rewards.py",
    **{
        f"reward.{key}": "train/test_reward_sources.py"
        for key in (
            "models.model",
            "models.weight",
            "models.retokenize",
            "callables.callable",
            "callables.weight",
            "ensemble",
            "variance_coef",
            "process",
            "step_separator",
        )
    },
    "reward.timeout": "train/test_rewards.py",
    "reward.retries": "train/test_rewards.py",
    "lora.dropout": "refused unless 0: models/test_lora.py",
}


def leaves(model, prefix=""):
    """Every setting of a tree of settings models, lists and unions looked through."""
    found = set()
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        if inner:
            for kind in inner:
                found |= leaves(kind, f"{prefix}{name}.")
        else:
            found.add(prefix + name)
    return found


def models_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in models_in(part)]


def test_13_every_ppo_key_is_in_one_of_the_tables():
    tested = [*CHANGES_ROWS, *NEUTRAL, *ELSEWHERE]
    assert len(tested) == len(set(tested))
    assert leaves(PPOConfig) == set(tested)


@pytest.fixture(scope="module")
def files(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "scores_for_pitfalls.py").write_text(
        "def length(prompts, responses, *, ids, metadata):\n"
        "    return [float(len(text)) for text in responses]\n"
    )
    (folder / "two.jsonl").write_text('{"prompt": "Two?"}\n{"prompt": "Three?"}\n')
    long = [{"role": "user", "content": "word " * 6}, {"role": "assistant", "content": "Yes."}]
    talks = [[*long, {"role": "user", "content": f"And {i}?"}] for i in range(5)]
    (folder / "long.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in talks))
    names = {"PROMPTS": small_data["prompts"], "PAIRS": small_data["pairs"]}
    names |= {"TEXT": small_data["text"], "TWO": str(folder / "two.jsonl")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield names | {"LONG": str(folder / "long.jsonl")}


def named(value, names):
    """File names in the place of the words in capitals."""
    if isinstance(value, dict):
        return {key: named(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [named(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def runs():
    """Metrics of runs that several tests look at, by name."""
    return {}


def run_with(change, small, tmp_path, files, runs, name=None):
    name = name or json.dumps(change, sort_keys=True)
    if name not in runs:
        runs[name] = rows(
            train_ppo(small("ppo", tmp_path / str(len(runs)), merge(BUSY, named(change, files))))
        )
    return runs[name]


BASES = {
    "system": CALLED,
    "kl.horizon": TARGET,
    "loss.entropy_threshold": CHANGES_ROWS["loss.entropy_coef"],
    "loss.entropy_fraction": CHANGES_ROWS["loss.entropy_coef"],
    "loss.dual_clip": {"loss": {"policy_clip": None}},
    "loss.penalty_coef": {"loss": {"policy_clip": None}},
    "loss.penalty_target": PENALTY,
    "kl.estimator": KL_LOSS,
    "advantage.scale_std": GRPO,
    "critic_pretraining.epochs": PRETRAINED,
    "critic_pretraining.explained_variance": PRETRAINED,
    "data.where": {"data": ["PROMPTS", "TWO"]},
    "max_prompt": {"data": "LONG"},
    "lora.alpha": LORA,
    "lora.target_modules": LORA,
    "optim.floor": CHANGES_ROWS["optim.schedule"],
    "critic_optim.floor": CHANGES_ROWS["critic_optim.schedule"],
    **{f"ptx.{key}": {"ptx": TEXT} for key in ("data.limit", "coef", "tokens", "length")},
}
"""What a key is held against, where it needs another one beside it."""


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(CHANGES_ROWS))
def test_13_each_key_changes_the_result(key, small, tmp_path, files, runs):
    base = run_with(BASES.get(key, {}), small, tmp_path, files, runs)
    changed = run_with(CHANGES_ROWS[key], small, tmp_path, files, runs)
    assert changed != base


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_13_keys_said_to_be_neutral_are(key, small, tmp_path, files, runs):
    base = run_with({}, small, tmp_path, files, runs)
    changed = run_with(NEUTRAL[key], small, tmp_path, files, runs, name=f"neutral {key}")
    assert len(base) == len(changed)
    for one, other in zip(base, changed, strict=True):
        assert set(one) == set(other)
        numbers = {k: v for k, v in one.items() if not k.startswith(("stage", "engine/logprob"))}
        assert {k: other[k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=2e-6)
        assert other["policy/first_ratio_error"] == other["kl/first_old_k3"] == 0.0


@pytest.mark.slow
def test_13_what_the_neutral_keys_do_change(small, tmp_path):
    few = {"checkpoint": {"every": 1, "keep_last": 1}, "log": {"samples_every": 2, "samples": 1}}
    run = train_ppo(small("ppo", tmp_path / "few", few | {"iterations": 4, "monitor": None}))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000004"]
    assert [row["step"] for row in jsonl(run / "samples.jsonl")] == [1, 2, 4]
    many = {"checkpoint": {"every": 1, "keep_last": 9}, "log": {"samples_every": 1, "samples": 3}}
    run = train_ppo(small("ppo", tmp_path / "many", many | {"threads": 1}))
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert len(jsonl(run / "samples.jsonl")) == 6
    assert json.loads((run / "env.json").read_text())["threads"] == 1


@pytest.mark.slow
def test_13_slots_kind_and_checkpointing_reach_what_reads_them(small, tmp_path, monkeypatch):
    seen = {}
    plain = ppo_state.load_actors

    def spy(config, here):
        actors = plain(config, here)
        seen[config.out.name] = actors
        return actors

    monkeypatch.setattr(ppo_state, "load_actors", spy)
    change = {"iterations": 1, "gradient_checkpointing": True}
    train_ppo(small("ppo", tmp_path / "a", change | {"engine": {"slots": 3}}))
    train_ppo(small("ppo", tmp_path / "b", {"iterations": 1, "engine": {"kind": "transformers"}}))
    assert seen["a"].engine.settings.slots == 3
    assert type(seen["a"].engine).__name__ != type(seen["b"].engine).__name__
    assert seen["a"].policy.model.lm.is_gradient_checkpointing
    assert not seen["b"].policy.model.lm.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"device": "cuda"}, "device: cuda"),
        ({"device": "abacus"}, "device: 'abacus'"),
        ({"log": {"to": ["tensorboard"]}}, r"log.to: tensorboard.*ppomax\[tensorboard\]"),
        ({"max_length": 100_000}, "max_length: 100000 is more than the 512 positions"),
        ({"max_length": 65}, "max_prompt 64"),
        ({"loss": {"entropy_coef": 0.1, "entropy_threshold": 7.0}}, r"ln \|V\|"),
        ({"loss": {"entropy_threshold": 3.0}}, "no effect without entropy_coef"),
        ({"kl": {"horizon": 5}}, "horizon has no effect"),
        ({"kl": {"coef": 0.0, "target_per_token": 0.1}}, "cannot start at 0"),
        ({"optim": {"floor": 0.1}}, "floor has no effect with schedule constant"),
        ({"reward": {"timeout": 5.0}}, "timeout has no effect without callable"),
        ({"reward": {"retries": 0}}, "retries has no effect without callable"),
        ({"reward": {"callable": "m:f"}}, "critic: reward needs a reward model"),
        ({"rollout_size": 5}, "multiple of minibatch_size"),
        ({"sampling": {"temperature": 0.0}}, "explores nothing"),
        ({"optim": {"betas": [0.9, 1.5]}}, "optim.betas"),
        ({"lora": {"dropout": 0.1}}, "dropout must be 0"),
        ({"kl": {"estimator": "k3"}}, "k3 inside the reward has a wrong policy gradient"),
        ({"kl": {"estimator": "k2"}}, "k2 inside the reward has a wrong policy gradient"),
        ({"kl": {"estimator": "exact"}}, "exact is a loss term"),
        ({"kl": {"where": "loss"}}, "k1 as a loss term has an expected gradient of zero"),
        ({"kl": {"where": "loss", "estimator": "k2", "coef": 0.0}}, "no effect with coef 0"),
        ({"kl": None, "reference": "tiny"}, "reference has no effect with kl: null"),
        ({"critic": None}, "advantage.estimator gae needs one"),
        ({"advantage": {"estimator": "rloo"}, "critic": "policy"}, "critic has no effect"),
        (
            {"advantage": {"estimator": "rloo"}, "critic_pretraining": {"epochs": 2}},
            "critic_pretraining has no effect",
        ),
        (
            {"advantage": {"estimator": "rloo"}, "critic_optim": {"lr": 0.1}},
            "critic_optim has no effect",
        ),
        (
            {"advantage": {"estimator": "rloo"}, "loss": {"value_clip": 0.2}},
            "loss.value_clip has no effect",
        ),
        ({"advantage": {"estimator": "rloo", "lam": 0.5}}, "lam needs a critic"),
        ({"advantage": {"estimator": "rloo", "lam_critic": 0.5}}, "lam_critic needs a critic"),
        ({"advantage": {"estimator": "grpo", "missing_eos": "bootstrap"}}, "needs a critic"),
        ({"advantage": {"estimator": "rloo", "gamma": 0.5}}, "gamma has no effect"),
        ({"advantage": {"estimator": "reinforce", "whiten": True}}, "whitens the rollout"),
        (
            {"advantage": {"missing_eos": "drop"}, "reward": {"missing_eos_penalty": 1.0}},
            "missing_eos_penalty has no effect with",
        ),
        ({"advantage": {"scale_std": False}}, "scale_std has no effect without"),
        (
            {"advantage": {"estimator": "grpo"}, "samples_per_prompt": 1},
            "compares replies to one prompt",
        ),
        ({"loss": {"penalty_coef": 1.0}}, "set policy_clip to null"),
        (
            {"loss": {"penalty_coef": 1.0, "policy_clip": None, "dual_clip": 2.0}},
            "set dual_clip to null",
        ),
        ({"loss": {"penalty_target": 1.0}}, "no effect without penalty_coef"),
        (
            {"loss": {"penalty_coef": 1.0, "policy_clip": None, "ratio_to": "reference"}},
            "penalty_coef weighs KL to the sampling policy",
        ),
        (
            {"loss": {"entropy_coef": 0.1, "entropy_fraction": 2.0}},
            r"entropy_fraction: .* not below ln \|V\|",
        ),
        ({"loss": {"entropy_fraction": 0.5}}, "no effect without entropy_coef"),
        (
            {
                "loss": {
                    "entropy_coef": 0.5,
                    "entropy_fraction": 0.5,
                    "entropy_threshold": 3.0,
                }
            },
            "give entropy_threshold or entropy_fraction",
        ),
    ],
)
def test_13_keys_that_are_refused_say_why(change, text, small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=text) as caught:
        train_ppo(small("ppo", tmp_path / "run", change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "done.json").exists()


@pytest.mark.slow
def test_13_trust_reaches_every_loader(small, tmp_path, monkeypatch):
    from ppomax.train import actors, reward_sources

    seen = []
    homes = {"load_policy": actors, "load_tokenizer": actors, "load_value_model": actors}
    for name, home in (homes | {"load_reward_model": reward_sources}).items():
        plain = getattr(home, name)

        def spy(*args, plain=plain, name=name, trust_remote_code=False, **more):
            seen.append((name, trust_remote_code))
            return plain(*args, trust_remote_code=trust_remote_code, **more)

        monkeypatch.setattr(home, name, spy)
    train_ppo(small("ppo", tmp_path / "a", {"iterations": 1, "trust_remote_code": True}))
    assert len({name for name, _ in seen}) == 4
    assert all(trust for _, trust in seen)
    seen.clear()
    train_ppo(small("ppo", tmp_path / "b", {"iterations": 1}))
    assert not any(trust for _, trust in seen)


@pytest.mark.slow
def test_13_bad_rows_are_counted_against_max_bad_rows(small, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "One?"}\nnot json\n{"prompt": "Two?"}\n{"prompt": ""}\n')
    with pytest.raises(DataError, match=r"2 of 4 rows.*rows\.jsonl:2"):
        train_ppo(small("ppo", tmp_path / "a", {"data": str(path)}))
    run = train_ppo(small("ppo", tmp_path / "b", {"data": str(path), "max_bad_rows": 0.5}))
    events = [row for row in jsonl(run / "events.jsonl") if row["kind"] == "quarantined_row"]
    assert [row["where"].rpartition(":")[2] for row in events] == ["2", "4"]
    assert all(row["reason"] and row["defect"] for row in events)


@pytest.mark.slow
def test_07_a_cut_reply_goes_on_in_the_critic_whatever_its_batch_mates(
    small, tmp_path, files, monkeypatch
):
    """The same cut reply among shorter and among longer ones, through the whole iteration."""
    found = {}
    merge_parts, estimate = ppo.merge_rollouts, ppo.estimate
    for name, mates in {
        "longest": [[60], [61, 2], [62, 2]],
        "shortest": [[60, 61, 62], [61, 62, 63, 64, 2], [62, 63, 64]],
    }.items():
        replies = [[70, 71], *mates]
        ended = [reply[-1] == 2 for reply in replies]

        def written(parts, count, replies=replies, ended=ended):
            prompts = merge_parts(parts, count).prompts
            return Rollout(prompts, replies, [[-1.0] * len(reply) for reply in replies], ended)

        def keep(*args, name=name):
            found[name] = estimate(*args)
            return found[name]

        monkeypatch.setattr(ppo, "merge_rollouts", written)
        monkeypatch.setattr(ppo, "estimate", keep)
        change = CALLED | {"reward": CALLED["reward"] | {"normalise": None, "clip": None}}
        change |= {"iterations": 1, "advantage": {"missing_eos": "bootstrap"}, "kl": None}
        train_ppo(small("ppo", tmp_path / name, change))
    one, two = found["longest"], found["shortest"]
    for table in ("advantages", "returns"):
        a, b = getattr(one, table)[0], getattr(two, table)[0]
        torch.testing.assert_close(a[:2], b[:2], rtol=0, atol=1e-6)
    value, after = one.scored.values[0, 1], one.scored.last_values[0]
    torch.testing.assert_close(one.advantages[0, 1], after - value)
    assert abs(float(after)) > 1e-6


# --- sampling and scoring


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [{"top_p": 0.9}, {"repetition_penalty": 1.1}, {"top_k": 5}, {"min_p": 0.1}, {}],
)
def test_14_a_sampler_that_is_not_the_policy_is_said_in_the_log(sampling, small, tmp_path):
    run = train_ppo(small("ppo", tmp_path / "run", {"iterations": 1, "sampling": sampling}))
    path = run / "events.jsonl"
    said = [row for row in jsonl(path) if row["kind"] == "sampler"] if path.exists() else []
    assert len(said) == (1 if sampling else 0)
    if said:
        assert "not to the one replies were drawn from" in said[0]["note"]
    assert ("engine/logprob_gap_max" in rows(run)[0]) == (not sampling)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": "bfloat16"},
        {"micro_tokens": 30},
        {"dtype": "bfloat16", "micro_tokens": 60},
        {"sampling": {"temperature": 0.7}},
        {"gradient_checkpointing": True, "dtype": "bfloat16"},
        {"lora": {"rank": 2}},
        {"lora": {"rank": 2}, "dtype": "bfloat16"},
        {"loss": {"entropy_coef": 0.1}, "minibatch_size": 4},
    ],
    ids=str,
)
def test_15_the_first_ratio_is_one_bitwise(change, small, tmp_path):
    change = change | {"rollout_size": 8, "epochs": 2}
    for row in rows(train_ppo(small("ppo", tmp_path / "run", change))):
        assert row["policy/first_ratio_error"] == 0.0
        assert row["kl/first_old_k3"] == 0.0
        assert row["policy/ratio_max"] > 1.0  # later steps do move


@pytest.mark.slow
def test_15_dropout_in_a_models_config_is_off_everywhere(small, tiny, tmp_path):
    folder = copied(tiny, tmp_path / "model", {"attention_dropout": 0.5})
    plain = rows(train_ppo(small("ppo", tmp_path / "a")))
    assert rows(train_ppo(small("ppo", tmp_path / "b", {"model": folder}))) == plain
    checkpointed_run = {"model": folder, "gradient_checkpointing": True}
    found = rows(train_ppo(small("ppo", tmp_path / "c", checkpointed_run)))
    assert found[0]["policy/first_ratio_error"] == 0.0
    assert found[0]["policy/loss"] == pytest.approx(plain[0]["policy/loss"], rel=1e-4, abs=1e-7)


@pytest.mark.slow
def test_16_left_padded_right_padded_and_unpadded_log_probs_agree(tiny):
    model, template = load_policy(tiny), ChatTemplate(load_tokenizer(tiny))
    here = World(0, 1, CPU)
    prompts = [[5], list(range(40, 90)), [7, 8, 9], list(range(100, 120))]
    params = SamplingParams(temperature=0.8, max_new_tokens=6)
    rollouts = {  # padded on the right, on the left, and one by one without any
        (kind, slots): build_engine(
            EngineSettings(kind=kind, slots=slots), model, template, here, torch.float32
        ).generate(prompts, params, [1, 2, 3, 4])
        for kind in ("native", "transformers")
        for slots in (4, 1)
    }
    alone = rollouts["transformers", 1]
    with torch.no_grad():
        batch = reply_batch(alone, [0, 1, 2, 3], 3, CPU)
        trained = LanguageModel(model)(batch, 0.8).logprobs.tolist()
    for rollout in rollouts.values():
        assert rollout.responses == alone.responses
        flat = [value for row in rollout.logprobs for value in row]
        assert flat == pytest.approx(trained, abs=1e-5)


@pytest.mark.slow
def test_17_a_step_at_5e_7_changes_every_matrix_in_bf16(small, tiny, tmp_path):
    adam = {"lr": 5e-7, "eps": 1e-12}  # whatever the gradient's size, the step is the rate
    change = {"dtype": "bfloat16", "optim": adam}
    single = {"iterations": 1, "minibatch_size": 4, "critic_optim": adam}
    before = load_file(Path(tiny) / "model.safetensors")
    run = train_ppo(small("ppo", tmp_path / "ppo", change | single))
    after = exported(run)
    matrices = [name for name, value in before.items() if value.dim() == 2]
    assert len(matrices) >= 15
    assert all(not torch.equal(after[name], before[name]) for name in matrices)
    assert after["model.norm.weight"].dtype == torch.float32
    change["max_steps"] = 1
    sft = exported(train_sft(small("sft", tmp_path / "sft", change)))
    assert all(not torch.equal(sft[name], before[name]) for name in matrices)
    reward = exported(train_reward(small("reward", tmp_path / "reward", change)))
    for name in matrices:
        assert not torch.equal(reward[name], before[name]), name


@pytest.mark.slow
def test_17_the_critic_too(small, small_reward, tmp_path):
    adam = {"lr": 5e-7, "eps": 1e-12}
    change = {"dtype": "bfloat16", "critic_optim": adam, "iterations": 1, "minibatch_size": 4}
    after = checkpointed(train_ppo(small("ppo", tmp_path / "run", change)), "critic")
    before = load_file(Path(small_reward) / "model.safetensors")
    for name, value in before.items():
        own = name.replace("model.", "backbone.", 1)
        assert value.dim() < 2 or not torch.equal(after[own], value), name


@pytest.mark.slow
def test_18_each_model_is_clipped_alone_and_the_norm_is_that_before(small, tmp_path):
    tight = {"optim": {"lr": 1e-3, "grad_clip": 1e-4}}
    wide = {"optim": {"lr": 1e-3, "grad_clip": None}}
    first = {"iterations": 1, "minibatch_size": 4}
    runs = [
        train_ppo(small("ppo", tmp_path / str(number), change | first))
        for number, change in enumerate((tight, wide))
    ]
    one, other = (rows(run)[0] for run in runs)
    assert one["policy/grad_norm"] == other["policy/grad_norm"] > 1e-4
    assert one["value/grad_norm"] == other["value/grad_norm"]
    critics = [checkpointed(run, "critic") for run in runs]
    assert all(torch.equal(critics[0][name], critics[1][name]) for name in critics[0])
    moments = [checkpointed(run, "policy_optimizer") for run in runs]
    name = "exp_avg.lm.model.embed_tokens.weight"
    ratio = moments[1][name].norm() / moments[0][name].norm()
    assert ratio == pytest.approx(one["policy/grad_norm"] / 1e-4, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ptx", [None, {"data": "TEXT", "tokens": 30}], ids=["plain", "ptx"])
def test_20_the_steps_taken_are_the_planned_ones(ptx, small, tmp_path, files):
    from ppomax.planning import plan
    from ppomax.recipe import Recipe

    change = {"iterations": 3, "rollout_size": 6, "minibatch_size": 2, "epochs": 2}
    change |= {"ptx": named(ptx, files), "micro_tokens": 40}
    config = small("ppo", tmp_path / "run", change)
    lines = dict(plan(Recipe(out=tmp_path, ppo=config))[0].lines)
    assert "3, each 6 optimizer steps of 2 replies" in lines["iterations"]
    run = train_ppo(config)
    for model in ("policy", "critic"):
        steps = {
            int(value)
            for name, value in checkpointed(run, f"{model}_optimizer").items()
            if name.startswith("step.")
        }
        assert steps == {3 * 6}
    assert ("ptx/loss" in rows(run)[0]) == (ptx is not None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_20_supervised_stages_take_the_planned_steps_too(kind, small, tmp_path):
    from ppomax.planning import plan
    from ppomax.recipe import Recipe

    config = small(kind, tmp_path / "run", {"max_steps": None, "epochs": 2, "micro_tokens": 40})
    lines = dict(plan(Recipe.model_validate({"out": tmp_path, kind: config}))[0].lines)
    run = {"sft": train_sft, "reward": train_reward}[kind](config)
    found = rows(run)
    assert lines["optimizer steps"].startswith(f"{len(found)}, ")
    assert f" {sum(row['batch/tokens'] for row in found):.0f} " in lines["optimizer steps"]
    steps = checkpointed(run, {"sft": "policy_optimizer", "reward": "reward_optimizer"}[kind])
    assert {int(v) for k, v in steps.items() if k.startswith("step.")} == {len(found)}


def test_23_the_ids_sampled_are_the_ids_trained_on(small, tmp_path, monkeypatch):
    sampled, trained = [], []
    merge_parts, collate = ppo.merge_rollouts, experience_batch.collate

    def note_rollout(parts, count):
        rollout = merge_parts(parts, count)
        sampled.extend(
            tuple(p + r) for p, r in zip(rollout.prompts, rollout.responses, strict=True)
        )
        return rollout

    def note_batch(rows, pad, device):
        trained.extend(tuple(ids) for ids, _ in rows)
        return collate(rows, pad, device)

    monkeypatch.setattr(ppo, "merge_rollouts", note_rollout)
    monkeypatch.setattr(experience_batch, "collate", note_batch)
    change = {"sampling": {"temperature": 3.0}, "iterations": 1}
    config = small("ppo", tmp_path / "run", change)
    train_ppo(config)
    assert set(trained) <= set(sampled)
    template = ChatTemplate(load_tokenizer("tiny"))
    texts = [template.decode(ids) for ids in sampled]
    assert any(
        tuple(template.tokenizer(text, add_special_tokens=False)["input_ids"]) != ids
        for text, ids in zip(texts, sampled, strict=True)
    ), "replies this odd do not survive a decode: the test above means something"


@pytest.mark.slow
def test_24_two_seeds_write_other_replies(small, tmp_path):
    replies = []
    for seed in (0, 1):
        change = {"iterations": 2, "seed": seed, "log": {"samples_every": 1, "samples": 4}}
        change |= {"data": "bundled:prompts"}
        run = train_ppo(small("ppo", tmp_path / str(seed), change))
        replies.append([row["response"] for row in jsonl(run / "samples.jsonl")])
    assert replies[0] != replies[1]
    assert len(set(replies[0])) == len(replies[0])


@pytest.mark.slow
def test_25_a_models_generation_config_changes_nothing(small, tiny, tmp_path):
    odd = {"repetition_penalty": 9.0, "max_new_tokens": 2, "max_length": 3, "temperature": 0.01}
    odd |= {"top_k": 1, "do_sample": False, "suppress_tokens": [10, 11]}
    folder = copied(tiny, tmp_path / "model", generation=odd)
    for kind in ("native", "transformers"):
        engine = {"engine": {"kind": kind}}
        plain = rows(train_ppo(small("ppo", tmp_path / f"a-{kind}", engine)))
        with_odd = small("ppo", tmp_path / f"b-{kind}", engine | {"model": folder})
        assert rows(train_ppo(with_odd)) == plain


# --- reward model


def test_29_useless_pairs_are_set_aside_with_their_place(small, tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "Q?", "chosen": "Yes.", "rejected": "No."}
    lines = [
        good,
        good | {"rejected": "Yes."},
        good | {"chosen": ""},
        {"prompt": "P?", "chosen": "A " * 300 + "x", "rejected": "A " * 300 + "y"},
        good | {"prompt": "R?"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {"data": str(path), "max_bad_rows": 0.6, "heldout": 0.0, "max_steps": 1}
    kinds = "3 of 5 rows cannot be used .identical-pair 1, empty-answer 1, too-long 1"
    with pytest.raises(DataError, match=kinds):  # 2 of 5 before lengths are known
        train_reward(small("reward", tmp_path / "no", change | {"max_bad_rows": 0.5}))
    run = train_reward(small("reward", tmp_path / "run", change))
    events = [row for row in jsonl(run / "events.jsonl") if row["kind"] == "quarantined_row"]
    assert [int(row["where"].rpartition(":")[2]) for row in events] == [2, 3, 4]
    assert events[2]["defect"] == "too-long"  # not cut to two identical halves
    card = json.loads((run / "export" / "reward_card.json").read_text())
    assert card["counts"] == {"train": 2, "heldout": 0, "quarantined": 3}
    assert card["quarantined"] == {"identical-pair": 1, "empty-answer": 1, "too-long": 1}
    assert rows(run)[0]["batch/pairs"] == 2


@pytest.mark.slow
def test_30_accuracy_is_over_all_pairs_whatever_the_micro_batches(small, small_data, tmp_path):
    found = {}
    for micro in (1, 90, 10_000):
        change = {"micro_tokens": micro, "max_steps": 1, "heldout": 0.6}
        run = train_reward(small("reward", tmp_path / str(micro), change))
        row = rows(run)[0]
        found[micro] = (row["eval/accuracy"], row["reward/accuracy"], row["eval/loss"])
    assert found[1] == pytest.approx(found[10_000], rel=1e-5)
    assert found[90] == pytest.approx(found[10_000], rel=1e-5)
    pairs = json.loads((run / "export" / "reward_card.json").read_text())["counts"]["heldout"]
    assert pairs > 1
    assert found[1][0] * pairs == pytest.approx(round(found[1][0] * pairs))


def test_31_a_reward_model_with_another_tokenizer_is_refused(
    small, small_reward, tiny, tmp_path, small_data
):
    from ppomax.models.tiny import tiny_tokenizer

    other = tmp_path / "other"
    shutil.copytree(small_reward, other)
    tiny_tokenizer(["one two three " * 50], 300).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"reward\.model: .*another tokenizer or chat template"):
        train_ppo(small("ppo", tmp_path / "a", {"reward": {"model": str(other)}}))
    with pytest.raises(ConfigError, match=r"ppo\.critic: .*another tokenizer"):
        train_ppo(small("ppo", tmp_path / "b", {"critic": str(other)}))


def test_31_a_reward_model_with_another_template_is_refused(small, small_reward, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(small_reward, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|endoftext|>"))
    with pytest.raises(ConfigError, match="another tokenizer or chat template"):
        train_ppo(small("ppo", tmp_path / "run", {"reward": {"model": str(other)}}))


def test_31_a_reward_model_whose_probes_score_otherwise_is_refused(small, small_reward, tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "other"
    shutil.copytree(small_reward, other)
    tensors = load_file(other / "model.safetensors")
    tensors["score.weight"] = -tensors["score.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="scores a probe text"):
        train_ppo(small("ppo", tmp_path / "run", {"reward": {"model": str(other)}}))
    with pytest.raises(ConfigError, match="scores a probe text"):
        train_ppo(small("ppo", tmp_path / "b", {"system": "Answer in rhyme, at length."}))


# --- reproducibility, logs


@pytest.mark.slow
def test_32_perplexity_is_the_policys_whatever_the_length_of_replies_and_prompts(
    small, tmp_path, files
):
    """The tiny model knows nothing: about as many choices as its vocabulary has, never 1.01."""
    found = []
    for name, change in {
        "short": {"sampling": {"max_new_tokens": 2}},
        "long": {"sampling": {"max_new_tokens": 24}},
        "long prompts": {"data": files["LONG"], "sampling": {"max_new_tokens": 2}},
    }.items():
        change = change | {"iterations": 1, "rollout_size": 32, "minibatch_size": 32}
        row = rows(train_ppo(small("ppo", tmp_path / name, change)))[0]
        found.append(row["policy/perplexity"])
        assert row["ref/perplexity"] == pytest.approx(found[-1], rel=1e-5)
    assert found == pytest.approx([512] * 3, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward", "ppo"])
def test_33_the_same_seed_twice_gives_the_same_rows(kind, small, tmp_path):
    train = {"sft": train_sft, "reward": train_reward, "ppo": train_ppo}[kind]
    changes = {"critic_pretraining": {"max_rollouts": 1}} if kind == "ppo" else {}
    torch.manual_seed(1)
    one = rows(train(small(kind, tmp_path / "a", changes)))
    torch.manual_seed(2)  # what a library may have left in the global state
    torch.rand(7)
    assert rows(train(small(kind, tmp_path / "b", changes))) == one
    assert rows(train(small(kind, tmp_path / "c", changes | {"seed": 1}))) != one


CONDITIONS = {
    "with a reference model (kl not null)": lambda c: c.kl is not None,
    "with kl.exact_replies": lambda c: c.kl is not None and c.kl.exact_replies is not None,
    "with kl.where: loss": lambda c: c.kl is not None and c.kl.where == "loss",
    "with loss.penalty_coef": lambda c: c.loss.penalty_coef is not None,
    "with a critic (advantage.estimator: gae)": lambda c: c.critic is not None,
    "with a critic; absent when every step was skipped": lambda c: c.critic is not None,
    "with loss.value_clip, outside critic pre-training": lambda c: c.loss.value_clip is not None,
    "absent when every step was skipped": lambda c: True,
    "with ppo.ptx": lambda c: c.ptx is not None,
    "with plain temperature sampling": lambda c: c.sampling.is_plain,
    "with several reward models in ensemble (ppo.reward.ensemble, or a folder of members)": (
        lambda c: c.reward.ensemble is not None
    ),
    "with a reference model, from the 11th row on, once KL has varied": lambda c: False,
    "in iterations that answer the held-out prompts": lambda c: False,
    "the same, with a second scorer": lambda c: False,
    "": lambda c: True,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"critic_pretraining": {"max_rollouts": 1}},
        {"kl": None},
        {"loss": {"ratio_to": "reference", "value_clip": None}},
        {"kl": {"where": "loss", "estimator": "exact", "exact_replies": 3}},
        {"loss": {"policy_clip": None, "penalty_coef": 1.0, "penalty_target": 0.01}},
        GRPO,
        {"ptx": TEXT, "sampling": {"top_p": 0.9}},
    ],
    ids=str,
)
def test_36_ppo_logs_every_key_of_its_configuration_and_all_are_finite(
    change, small, tmp_path, files
):
    config = small("ppo", tmp_path / "run", named(change, files))
    found = jsonl(train_ppo(config) / "metrics.jsonl")
    stages = {row["stage"] for row in found}
    assert stages == ({"critic", "ppo"} if config.critic_pretraining else {"ppo"})
    for row in found:
        declared = {
            m.key for m in DECLARED if row["stage"] in m.stages and CONDITIONS[m.condition](config)
        }
        assert set(row) - {"stage", "step", "time", "attempt"} == declared
        assert all(math.isfinite(value) for key, value in row.items() if key != "stage")


@pytest.mark.slow
def test_36_supervised_stages_log_every_key_and_all_are_finite(small, tmp_path):
    for kind, train in (("sft", train_sft), ("reward", train_reward)):
        for lm in (1.0, 0.0):
            own = {"lm_coef": lm, "centre_coef": None if lm else 0.1}
            change = own if kind == "reward" else {}
            run = train(small(kind, tmp_path / f"{kind}{lm}", change | {"eval_every": 2}))
            found = jsonl(run / "metrics.jsonl")
            for row in found:
                wanted = {m.key for m in DECLARED if kind in m.stages}
                wanted -= {"reward/centre_loss"} if lm else {"reward/lm_loss"}
                wanted = {key for key in wanted if not key.startswith("ensemble/")}
                if row["step"] % 2 and row["step"] != len(found):
                    wanted -= {"eval/loss", "eval/accuracy", "eval/perplexity"}
                assert set(row) - {"stage", "step", "time", "attempt"} == wanted
                assert all(math.isfinite(v) for key, v in row.items() if key != "stage")


def test_36_the_samples_hold_what_was_sampled_and_scored(small, small_reward, tmp_path):
    change = {"iterations": 1, "log": {"samples": 4}}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    found = jsonl(run / "samples.jsonl")
    assert len(found) == 4
    model = load_reward_model(small_reward, init_from_lm=False)
    template = ChatTemplate(load_tokenizer("tiny"))
    for row in found:
        ids = template.prompt(row["prompt"]) + template.answer(row["response"])
        ids = ids if not row["truncated"] else ids[:-1]
        if len(ids) - len(template.prompt(row["prompt"])) != row["length"]:
            continue  # the reply's ids are not those of its text; see test_23
        score = float(model.scores(torch.tensor([ids]), torch.tensor([len(ids)])))
        assert row["score"] == pytest.approx(score, abs=1e-4)
    mean = sum(row["score"] for row in found) / 4
    assert rows(run)[0]["reward/score_mean"] == pytest.approx(mean, abs=1e-5)


def test_errors_of_all_kinds_are_one_line(small, tmp_path):
    with pytest.raises(PpomaxError) as caught:
        train_ppo(small("ppo", tmp_path, {"data": str(tmp_path / "none.jsonl")}))
    assert "\n" not in str(caught.value)
