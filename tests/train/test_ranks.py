"""Two processes over gloo take every stage where one process takes it (pitfalls 19 and 37).

Each stage runs twice, alone and on two ranks, with a data set in which one rank's texts are several
times as long as the other's; metrics, gradient norms before the clip and exported weights are held
against each other. float32; the reward model of PPO is the same folder in both.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ppomax.data.batching import plan_micro_batches
from ppomax.distributed import World
from ppomax.models.tiny import tiny_model
from ppomax.train.micro_batches import rank_micro_batches

CPU = torch.device("cpu")
TIMES = ("time", "throughput/", "memory/")
LONG = "Rain fell on the hills all night and the river rose above the old stone bridge. " * 7


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def weights(run):
    found = {}
    for file in sorted((run / "export").glob("*.safetensors")):
        found |= load_file(file)
    assert found
    return found


def stages(root, data, reward):
    """Every stage by name: (kind, settings)."""
    adam = {"lr": 1e-3, "grad_clip": 0.5}
    shared = {"dtype": "float32", "max_length": 400, "micro_tokens": 64, "heldout": 0.3}
    sft = shared | {"model": "tiny", "data": data["sft"], "epochs": 3, "batch_tokens": 4096}
    sft |= {"optim": adam, "eval_every": 1, "checkpoint": {"every": 1}}
    pairs = shared | {"model": "tiny", "data": data["pairs"], "epochs": 3, "batch_tokens": 8192}
    pairs |= {"optim": adam, "eval_every": 1, "checkpoint": {"every": 1}}
    ppo = {
        **{key: value for key, value in shared.items() if key != "heldout"},
        "model": "tiny",
        "data": data["prompts"],
        "iterations": 2,
        "rollout_size": 6,
        "minibatch_size": 3,
        "max_prompt": 360,
        "sampling": {"temperature": 0.9, "max_new_tokens": 9},
        "reward": {"model": str(reward)},
        "critic_pretraining": {"max_rollouts": 1},
        "optim": adam,
        "critic_optim": adam,
        "checkpoint": {"every": 1},
    }
    called = ppo | {"reward": {"callable": "math_scores:length"}, "critic": "policy"}
    lora = {"rank": 4, "alpha": 8.0}
    found = {
        "sft": ("sft", sft),
        "sft_lora": ("sft", sft | {"lora": lora}),
        "sft_checkpointing": ("sft", sft | {"gradient_checkpointing": True}),
        "reward": ("reward", pairs | {"margin": 0.3, "label_smoothing": 0.1}),
        "reward_untied": ("reward", pairs | {"model": data["untied"]}),
        "reward_no_lm": ("reward", pairs | {"lm_coef": 0.0}),
        "reward_lora": ("reward", pairs | {"lora": lora}),
        "ppo": ("ppo", ppo),
        "ppo_terms": (
            "ppo",
            ppo
            | {
                "epochs": 2,
                "ptx": {"data": data["text"], "length": 32, "tokens": 40},
                "loss": {"entropy_coef": 0.01, "entropy_threshold": 3.0, "dual_clip": 3.0},
                "advantage": {"whiten": True, "lam_critic": 0.5},
                "kl": {"coef": 0.1, "target_per_token": 0.01, "horizon": 50},
            },
        ),
        "ppo_lora": ("ppo", called | {"lora": lora}),
        "ppo_called": ("ppo", called | {"kl": None, "rollout_size": 3}),
        "ppo_frozen": ("ppo", ppo | {"freeze_layers": 1}),
        "ppo_importance": ("ppo", ppo | {"loss": {"ratio_to": "reference"}}),
        "ppo_penalty": (
            "ppo",
            ppo
            | {
                "kl": {"where": "loss", "estimator": "exact", "exact_replies": 2},
                "loss": {"policy_clip": None, "penalty_coef": 0.5, "penalty_target": 0.01},
                "advantage": {"missing_eos": "bootstrap"},
                "buffer_iterations": 2,
                "epochs": 2,
            },
        ),
        "ppo_groups": (
            "ppo",
            {key: value for key, value in ppo.items() if not key.startswith("critic")}
            | {
                "advantage": {"estimator": "grpo"},
                "kl": {"where": "loss", "estimator": "k2"},
                "samples_per_prompt": 2,
            },
        ),
        "ppo_bf16": ("ppo", ppo | {"dtype": "bfloat16"}),
    }
    evaluation = {
        "baseline": "tiny",
        "policy": str(root.parent / "alone" / "ppo" / "export"),
        "data": data["prompts"],
        "scorers": [{"model": str(reward), "role": "proxy"}],
        "max_prompt": 360,
        "sampling": {"temperature": 1.0, "max_new_tokens": 9},
        "micro_tokens": 64,
    }
    found["eval"] = ("eval", evaluation)
    return {
        name: (kind, settings | {"out": str(root / name)})
        for name, (kind, settings) in found.items()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("data")
    texts = ["A short one.", "Ask me again.", "Blue.", "No idea at all.", "Seven ducks."]
    answers = [LONG, *texts]
    questions = [LONG + "Why?", *[f"What about {word}?" for word in ("tea", "ice", "you", "mud")]]
    untied = folder / "untied"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tiny_model(vocab_size=len(tokenizer), tied=False, seed=3).save_pretrained(untied)
    tokenizer.save_pretrained(untied)
    (folder / "math_scores.py").write_text(
        "def length(prompts, responses, *, ids, metadata):\n"
        "    return [float(len(text)) / 7 for text in responses]\n"
    )
    return {
        "sft": write(
            folder / "sft.jsonl",
            [{"prompt": f"Say {i}.", "completion": text} for i, text in enumerate(answers)],
        ),
        "pairs": write(
            folder / "pairs.jsonl",
            [
                {"prompt": f"Say {i}.", "chosen": text, "rejected": f"{text[:20]} or not {i}"}
                for i, text in enumerate(answers)
            ],
        ),
        "prompts": write(folder / "prompts.jsonl", [{"prompt": text} for text in questions]),
        "text": write(folder / "text.jsonl", [{"text": LONG}, {"text": "Ducks swim. " * 9}]),
        "untied": str(untied),
        "folder": str(folder),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data, launch):
    """Folders of the runs alone and on two ranks."""
    root = tmp_path_factory.mktemp("ranks")
    reward = root / "alone" / "reward" / "export"
    for name, ranks in (("alone", 1), ("two", 2)):
        work = [(kind, s, False) for kind, s in stages(root / name, data, reward).values()]
        ended = launch(ranks=ranks, stages=work, path=[data["folder"]])
        assert [end.code for end in ended] == [0] * ranks, (
            ended[0].log[-3000:] + ended[-1].log[-3000:]
        )
    return root


NAMES = list(stages(Path("x"), dict.fromkeys(["sft", "pairs", "prompts", "text", "untied"]), ""))
TRAINED = [name for name in NAMES if name not in ("eval", "ppo_bf16")]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_37_two_ranks_log_what_one_process_logs(runs, name):
    alone, two = metrics(runs / "alone" / name), metrics(runs / "two" / name)
    assert [(row["stage"], row["step"]) for row in alone] == [
        (row["stage"], row["step"]) for row in two
    ]
    for one, other in zip(alone, two, strict=True):
        assert set(one) == set(other)
        for key, value in one.items():
            if isinstance(value, str):
                continue
            exact = key.endswith(("loss", "grad_norm", "lr"))
            tolerance = 1e-5 if exact else 1e-4
            assert math.isfinite(value), key
            assert other[key] == pytest.approx(value, rel=tolerance, abs=2e-6), (key, one["step"])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_37_two_ranks_export_the_weights_of_one_process(runs, name):
    alone, two = weights(runs / "alone" / name), weights(runs / "two" / name)
    assert set(alone) == set(two)
    for key, value in alone.items():
        assert two[key].shape == value.shape
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_checkpoint_what_one_process_checkpoints(runs, name):
    newest = [max((runs / way / name / "checkpoints").iterdir()) for way in ("alone", "two")]
    assert newest[0].name == newest[1].name
    files = [sorted(file.name for file in folder.glob("*.safetensors")) for folder in newest]
    assert files[0] == files[1]
    for file in files[0]:
        alone, two = (load_file(folder / file) for folder in newest)
        assert set(alone) == set(two), file
        for key, value in alone.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_judge_as_one_process_does(runs):
    alone, two = (
        json.loads((runs / way / "eval" / "report.json").read_text()) for way in ("alone", "two")
    )
    for one, other in zip(alone["samples"], two["samples"], strict=True):
        assert (one["sft"], one["ppo"]) == (other["sft"], other["ppo"])
    for key in ("kl_ref_k1", "kl_ref_k3", "num_prompts"):
        assert two[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6)
    for side in ("sft", "ppo"):
        assert two["scores"][side] == pytest.approx(alone["scores"][side], rel=1e-4, abs=1e-5)
        assert two["policies"][side] == pytest.approx(alone["policies"][side], rel=1e-4)


@pytest.mark.slow
def test_the_first_ratio_is_one_bitwise_on_two_ranks_in_bf16_too(runs):
    for name in ("ppo", "ppo_bf16", "ppo_lora"):
        for row in metrics(runs / "two" / name):
            if row["stage"] == "ppo":
                assert row["policy/first_ratio_error"] == row["kl/first_old_k3"] == 0.0


@pytest.mark.slow
def test_a_mistake_ends_every_rank_at_once(launch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine: 1\n")
    ended = launch(ranks=2, argv=["run", "smoke", "out=run"], cwd=str(tmp_path))
    assert ended[0].code == 2
    assert "already holds a run" in ended[0].log
    assert ended[1].code not in (0, None, -9), "it did not wait until it was killed"


def test_every_rank_runs_as_many_forwards_and_every_text_counts_once():
    lengths = [90, 11, 9, 8, 7]
    plan = plan_micro_batches(lengths, 12, 2)
    shares = [rank_micro_batches(plan, World(rank, 2, CPU)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 3
    counted = sorted(i for share in shares for batch, weight in share if weight for i in batch)
    assert counted == [0, 1, 2, 3, 4]
    tokens = [sum(lengths[i] for batch, w in share if w for i in batch) for share in shares]
    assert max(tokens) >= 3 * min(tokens)
