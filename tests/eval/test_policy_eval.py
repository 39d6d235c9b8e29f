"""Two models judged on the same prompts: nothing between equals, the right sign between others."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppomax.errors import ConfigError, DataError
from ppomax.eval import policy
from ppomax.eval.policy import evaluate_policy
from ppomax.eval.statistics import paired_difference
from ppomax.models.load import load_policy, load_reward_model
from ppomax.rollout import Rollout
from ppomax.train.reward import train_reward
from ppomax.train.sft import train_sft
from ppomax.types import PromptRow

FIELDS = {
    "kind",
    "baseline",
    "policy",
    "num_prompts",
    "samples_per_prompt",
    "kl_ref_k1",
    "kl_ref_k3",
    "scorer",
    "scorers",
    "policies",
    "by",
    "samples",
    "scores",
    "sampling",
    "repeated_prompts",
}


def report_of(config):
    out = evaluate_policy(config)
    assert (out / "done.json").exists()
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.fixture
def judged(small, small_reward, tmp_path):
    """Judge with the small reward model as proxy; `judged(changes)`."""

    def run(changes=None, name="run"):
        base = {"scorers": [{"model": small_reward, "name": "own", "role": "proxy"}]}
        return report_of(small("eval", tmp_path / name, base | (changes or {})))

    return run


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """A policy that differs: the tiny model with its embeddings shaken."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    noise = torch.randn(
        tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(0)
    )
    tensors["model.embed_tokens.weight"] += 0.02 * noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.slow
def test_a_model_against_itself_is_a_tie_everywhere(judged):
    report = judged()
    assert set(report) == FIELDS
    (scorer,) = report["scorers"]
    assert (scorer["win"], scorer["tie"], scorer["lose"]) == (0, 8, 0)
    assert scorer["difference"] == 0
    assert scorer["win_rate"] == 0.5
    assert scorer["ci95"] in ([0.0, 0.0], None)
    assert report["kl_ref_k1"] == report["kl_ref_k3"] == 0
    assert report["policies"]["sft"] == report["policies"]["ppo"]
    assert report["scores"]["sft"] == report["scores"]["ppo"]
    assert all(row["sft"] == row["ppo"] for row in report["samples"])
    assert all(group["difference"] == 0 for group in report["by"])


def test_a_report_says_what_was_compared(judged, small_reward):
    report = judged({"samples": 3})
    assert (report["kind"], report["num_prompts"]) == ("policy", 8)
    assert report["scorer"] == {"name": "own", "role": "proxy"}
    assert len(report["samples"]) == 3
    assert set(report["samples"][0]) == {"id", "prompt", "sft", "ppo", "sft_score", "ppo_score"}
    assert [(g["group"], g["n"]) for g in report["by"]] == [("en", 4), ("zh", 4)]
    described = {"perplexity", "length_mean", "length_p95", "truncated_share", "distinct_2"}
    assert set(report["policies"]["ppo"]) == described | {"repetition_4"}
    assert report["sampling"]["max_new_tokens"] == 6
    assert len(report["scores"]["sft"]) == 8


@pytest.mark.slow
def test_another_policy_is_measured_against_the_first(judged, other, small_reward):
    report = judged({"policy": other})
    assert report["kl_ref_k3"] > 0
    sft, ppo = report["scores"]["sft"], report["scores"]["ppo"]
    (scorer,) = report["scorers"]
    pairs = [(a, b) for a, b in zip(sft, ppo, strict=True)]
    same = [row["sft"] == row["ppo"] for row in report["samples"]]
    assert scorer["win"] == sum(b > a for (a, b), s in zip(pairs, same, strict=True) if not s)
    assert scorer["lose"] == sum(b < a for (a, b), s in zip(pairs, same, strict=True) if not s)
    assert scorer["win"] + scorer["tie"] + scorer["lose"] == 8
    assert scorer["difference"] == pytest.approx(scorer["ppo_mean"] - scorer["sft_mean"])
    low, high = scorer["ci95"]
    assert low <= scorer["difference"] <= high
    swapped = judged({"baseline": other, "policy": "tiny"}, "swapped")["scorers"][0]
    assert swapped["difference"] == pytest.approx(-scorer["difference"])
    assert (swapped["win"], swapped["lose"]) == (scorer["lose"], scorer["win"])


@pytest.mark.slow
def test_scores_and_perplexity_are_those_of_single_replies(judged, small_reward, monkeypatch):
    seen = []
    plain = policy.answer

    def spy(*args):
        seen.append(plain(*args))
        return seen[-1]

    monkeypatch.setattr(policy, "answer", spy)
    report = judged()
    judge, model = load_reward_model(small_reward, init_from_lm=False), load_policy("tiny")
    rollout, total, count = seen[0].rollout, 0.0, 0
    for index, (prompt, reply) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        ids = torch.tensor([prompt + reply])
        with torch.no_grad():
            score = float(judge.scores(ids, torch.tensor([ids.shape[1]])))
            table = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(table.gather(1, torch.tensor(reply)[:, None]).sum())
        count += len(reply)
        assert report["scores"]["sft"][index] == pytest.approx(score, abs=1e-5)
    assert report["policies"]["sft"]["perplexity"] == pytest.approx(math.exp(total / count), 1e-4)


@pytest.mark.slow
def test_micro_batches_and_seeds(judged):
    plain = judged()
    small_batches = judged({"micro_tokens": 30}, "micro")
    replies = [[row["sft"] for row in found["samples"]] for found in (plain, small_batches)]
    assert replies[0] == replies[1]
    assert len(replies[0]) == 8
    assert small_batches["scores"]["sft"] == pytest.approx(plain["scores"]["sft"], abs=1e-5)
    assert small_batches["policies"]["sft"] == pytest.approx(plain["policies"]["sft"], rel=1e-5)
    again, seeded = judged(name="again"), judged({"seed": 9}, "seeded")
    assert again == plain
    assert [r["sft"] for r in seeded["samples"]] != [r["sft"] for r in plain["samples"]]


def test_equal_replies_tie_whatever_rounding_made_of_their_scores():
    def answers(replies):
        rollout = Rollout([[1]] * 3, replies, [[0.0]] * 3, [True] * 3)
        return policy.Answers(rollout, ["a", "b", "c"], 1.0, torch.zeros(3, 1), torch.ones(3, 1))

    scorer = policy.ScorerConfig(model="m")
    one, two = answers([[5], [6], [7]]), answers([[5], [6], [8]])
    found = policy.compare_scores(scorer, [1.0, 2.0, 3.0], [1.0 + 1e-6, 2.0, 4.0], one, two, 1)
    assert (found["win"], found["tie"], found["lose"]) == (1, 2, 0)
    assert found["difference"] == pytest.approx(1 / 3)


def test_replies_to_one_prompt_count_as_their_mean():
    def answers(replies):
        rollout = Rollout([[1]] * 6, replies, [[0.0]] * 6, [True] * 6)
        return policy.Answers(rollout, ["a"] * 6, 1.0, torch.zeros(6, 1), torch.ones(6, 1))

    one = answers([[1], [2], [3], [4], [5], [6]])
    two = answers([[1], [2], [3], [9], [9], [9]])
    sft, ppo = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [7.0, 7.0, 7.0, 6.0, 1.0, 9.0]
    found = policy.compare_scores(policy.ScorerConfig(model="m"), sft, ppo, one, two, 2)
    # prompts: replies equal, so a tie; 3.5 against (3 + 6) / 2; 5.5 against 5
    assert (found["win"], found["tie"], found["lose"]) == (1, 1, 1)
    assert (found["sft_mean"], found["ppo_mean"]) == (3.5, pytest.approx((1.5 + 4.5 + 5) / 3))
    expected = paired_difference([1.5, 4.5, 5.0], [1.5, 3.5, 5.5])
    assert found["ci95"] == list(expected.interval)


@pytest.mark.slow
def test_more_replies_to_a_prompt_leave_its_first_as_it_was(judged, other, monkeypatch):
    seen, seeded = [], []
    plain, seed_of = policy.answer, policy.derived_seed
    monkeypatch.setattr(policy, "answer", lambda *args: seen.append(plain(*args)) or seen[-1])
    monkeypatch.setattr(policy, "derived_seed", lambda *a: seeded.append(a) or seed_of(*a))
    one = judged({"policy": other})
    assert {len(key) for key in seeded} == {4}  # seeds of before there were several replies
    three = judged({"policy": other, "samples_per_prompt": 3}, "three")
    assert [len(found.texts) for found in seen] == [8, 8, 24, 24]
    assert [found.texts[::3] for found in seen[2:]] == [found.texts for found in seen[:2]]
    assert len(set(seen[2].texts[:3])) > 1
    assert (three["num_prompts"], three["samples_per_prompt"]) == (8, 3)
    assert len(three["scores"]["sft"]) == sum(group["n"] for group in three["by"]) == 8
    gains = sum(group["n"] * group["difference"] for group in three["by"])
    assert gains / 8 == pytest.approx(three["scorers"][0]["difference"], abs=1e-4)
    for before, now in zip(one["samples"], three["samples"], strict=True):
        assert (now["id"], now["sft"], now["ppo"]) == (before["id"], before["sft"], before["ppo"])
        assert now["sft_score"] == pytest.approx(before["sft_score"], abs=1e-5)
    assert three["scores"]["ppo"] != pytest.approx(one["scores"]["ppo"], abs=1e-3)


def test_judges_see_the_first_reply_to_each_prompt(small, tmp_path, monkeypatch):
    handed = []
    monkeypatch.setattr(policy, "judged_record", lambda pairs, *_, **__: handed.append(pairs) or {})
    rows = [PromptRow(str(i), ({"role": "user", "content": f"p{i}"},)) for i in range(2)]
    one, two = (
        policy.Answers(None, [f"{name}{i}" for i in range(6)], 1.0, None, None) for name in "ab"
    )
    changes = {"judges": ["callable:judge:fn"], "samples_per_prompt": 3}
    policy.judge_and_ask(small("eval", tmp_path, changes), rows, one, two)
    found = [(pair.a.response, pair.b.response) for pair in handed[0]["ppo"]]
    assert found == [("a0", "b0"), ("a3", "b3")]


def test_several_scorers_and_none(judged, small_reward):
    two = [
        {"model": small_reward, "name": "own", "role": "proxy"},
        {"model": small_reward, "name": "second"},
    ]
    report = judged({"scorers": two})
    assert [(s["name"], s["role"]) for s in report["scorers"]] == [
        ("own", "proxy"),
        ("second", "held-out"),
    ]
    report = judged({"scorers": []}, "none")
    assert report["scorer"] is None
    assert report["scorers"] == report["by"] == []
    assert "sft_score" not in report["samples"][0]


@pytest.mark.slow
def test_a_limit_takes_the_first_prompts_and_heldout_those_no_stage_trains_on(judged, small_data):
    from ppomax.data.sources import SourceConfig, load_prompts, split_by_prompt

    rows = load_prompts([SourceConfig(path=small_data["prompts"])]).rows
    assert [r["id"] for r in judged({"limit": 3})["samples"]] == [row.id for row in rows[:3]]
    kept = [row.id for row in split_by_prompt(rows, 0.5).heldout]
    assert [r["id"] for r in judged({"heldout": 0.5}, "held")["samples"]] == kept
    assert 0 < len(kept) < 8


def test_one_prompt_has_no_interval_and_still_a_report(judged, other):
    report = judged({"limit": 1, "policy": other})
    assert report["num_prompts"] == 1
    assert report["scorers"][0]["ci95"] is None
    assert math.isfinite(report["scorers"][0]["difference"])


def test_what_cannot_be_judged_is_one_line(small, tmp_path, small_data):
    with pytest.raises(DataError, match=r"eval\.max_prompt: none of 8 prompts fits 3 tokens"):
        evaluate_policy(small("eval", tmp_path / "a", {"max_prompt": 3}))
    assert not (tmp_path / "a" / "done.json").exists()
    with pytest.raises(ConfigError, match="role"):
        small("eval", tmp_path, {"scorers": [{"model": "m", "role": "judge"}]})


@pytest.mark.slow
def test_blocks_in_common_are_computed_once_and_change_no_digit(
    judged, small, tmp_path, monkeypatch
):
    upper = train_reward(small("reward", tmp_path / "reward", {"freeze_layers": 1})) / "export"
    upper_policy = train_sft(small("sft", tmp_path / "sft", {"freeze_layers": 1})) / "export"
    held, joined = [], []
    plain, join = policy.Trunk, policy.Trunk.join

    def trunk(owner, count):
        held.append(plain(owner, count))
        return held[-1]

    def spy(self, model):
        joined.append(join(self, model))
        return joined[-1]

    changes = {"policy": str(upper_policy), "micro_tokens": 60}
    scorers = [{"model": str(upper), "name": "own", "role": "proxy"}]
    monkeypatch.setattr(policy.Trunk, "join", spy)
    monkeypatch.setattr(policy, "Trunk", trunk)
    shared = judged(changes | {"scorers": scorers}, "shared")
    assert [(one.count, len(one) > 1) for one in held] == [(1, True)]
    assert joined == [True, True, True]  # the policy, the scorer once for each side
    monkeypatch.setattr(policy, "common_depth", lambda *_: 0)
    assert judged(changes | {"scorers": scorers}, "apart") == shared
    assert len(held) == 1
