"""PPO iterations against the paper's arithmetic, the order of prompts, and scores that rise."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ppomax.data.template import ChatTemplate
from ppomax.errors import ConfigError, DataError
from ppomax.models.export import read_reward_card
from ppomax.models.language import LanguageModel
from ppomax.models.load import load_policy, load_reward_model, load_tokenizer, load_value_model
from ppomax.rollout.engine import merge_rollouts
from ppomax.train import ppo, ppo_state
from ppomax.train.experience_batch import plan_updates
from ppomax.train.ppo import train_ppo
from ppomax.train.ppo_config import PtxSettings
from ppomax.train.prompts import Prompt, TextStream, load_stream, reply_seeds
from ppomax.types import PromptRow

TIMES = ("time", "throughput/", "memory/")


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(run):
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMES)}
        for row in jsonl(run / "metrics.jsonl")
    ]


def numbers(row):
    return {key: value for key, value in row.items() if key != "stage"}


@pytest.fixture
def experiences(monkeypatch):
    """Every experience that a run of this test estimates."""
    seen = []
    plain = ppo.estimate

    def spy(*args):
        seen.append(plain(*args))
        return seen[-1]

    monkeypatch.setattr(ppo, "estimate", spy)
    return seen


# --- one iteration, worked out again on unpadded replies


@pytest.mark.slow
def test_an_iteration_is_the_papers_arithmetic(small, small_reward, experiences, tmp_path):
    tau, eta, gamma, lam = 0.8, 0.3, 0.9, 0.7
    change = {
        "iterations": 2,
        "minibatch_size": 4,
        "sampling": {"temperature": tau, "max_new_tokens": 7},
        "kl": {"coef": eta},
        "advantage": {"gamma": gamma, "lam": lam, "lam_critic": 0.2},
        "reward": {"clip": 0.9, "missing_eos_penalty": 0.25},
        "optim": {"lr": 3e-3},
        "checkpoint": {"every": 1},
    }
    run = train_ppo(small("ppo", tmp_path / "run", change))
    row, second = rows(run)[1], experiences[1]
    saved = run / "checkpoints" / "step-000001"
    policy, reference = LanguageModel(load_policy("tiny")), load_policy("tiny")
    critic = load_value_model(small_reward)
    for model, name in ((policy, "policy"), (critic, "critic")):
        model.load_state_dict(load_file(saved / f"{name}.safetensors"), strict=False)
    card = read_reward_card(Path(small_reward))
    critic.offset = card.score_mean / card.score_std
    judge = load_reward_model(small_reward, init_from_lm=False)
    history = torch.cat([e.scored.scores for e in experiences[:2]]).double()
    kls, k3s, totals, nlls, entropies, all_returns, all_values = [], [], [], [], [], [], []
    pure = []  # discounted sums of rewards, no critic in them
    rollout = second.rollout
    with torch.no_grad():
        for i, (prompt, reply) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
            ids = torch.tensor([prompt + reply])
            at = torch.tensor(reply)[:, None]
            own, ref = (
                m(ids).logits[0, len(prompt) - 1 : -1].double() for m in (policy.lm, reference)
            )
            tables = [(x / tau).log_softmax(-1) for x in (own, ref)]
            logp, logr = (x.gather(1, at)[:, 0] for x in tables)
            score = float(judge.scores(ids, torch.tensor([ids.shape[1]])))
            assert float(second.scored.scores[i]) == pytest.approx(score, abs=1e-5)
            shaped = (score - history.mean()) / history.std()
            shaped = shaped.clamp(-0.9, 0.9) - (0.25 if reply[-1] != 2 else 0.0)
            rewards = -eta * (logp - logr)
            rewards[-1] += shaped
            values = critic.values(ids)[0, len(prompt) - 1 : -1].double()
            length = len(reply)
            future = torch.cat([values[1:], torch.zeros(1)])
            deltas = rewards + gamma * future - values
            for power, name in ((lam, "advantages"), (0.2, "returns")):
                found = torch.stack(
                    [
                        sum((gamma * power) ** k * deltas[t + k] for k in range(length - t))
                        for t in range(length)
                    ]
                )
                found = found + values if name == "returns" else found
                torch.testing.assert_close(
                    getattr(second, name)[i, :length].double(), found, rtol=1e-4, atol=2e-5
                )
                if name == "returns":
                    all_returns.append(found)
            sums = [rewards.new_zeros(())]
            for reward in reversed(rewards):
                sums.append(reward + gamma * sums[-1])
            pure.append(torch.stack(sums[:0:-1]))
            totals.append(float(rewards.sum()))
            kls.append(logp - logr)
            k3s.append((logr - logp).exp() - 1 - (logr - logp))
            nlls.append(-own.log_softmax(-1).gather(1, at)[:, 0])
            entropies.append(-(tables[0].exp() * tables[0]).sum(-1))
            all_values.append(values)
    kl = torch.cat(kls)
    errors = torch.cat(all_returns) - torch.cat(all_values)
    expected = {
        "kl/ref_k1": float(kl.mean()),
        "kl/ref_k3": float(torch.cat(k3s).mean()),
        "kl/ref_sequence": sum(float(x.sum()) for x in kls) / 4,
        "reward/total_mean": sum(totals) / 4,
        "policy/perplexity": math.exp(float(torch.cat(nlls).mean())),
        "policy/entropy": float(torch.cat(entropies).mean()),
        "value/mean": float(torch.cat(all_values).mean()),
        "return/mean": float(torch.cat(all_returns).mean()),
        "value/loss": 0.5 * float(errors.square().mean()),
        "value/explained_variance": 1
        - float((torch.cat(pure) - torch.cat(all_values)).var() / torch.cat(pure).var()),
        "response/length_mean": sum(map(len, rollout.responses)) / 4,
        "response/truncated_share": sum(r[-1] != 2 for r in rollout.responses) / 4,
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=2e-4, abs=1e-5), key
    assert row["kl/ref_k3"] > 0
    assert row["engine/logprob_gap_max"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"loss": {"entropy_coef": 0.1}, "advantage": {"whiten": True}},
        {"ptx": {"data": "bundled:text", "tokens": 40}, "critic_pretraining": {"max_rollouts": 1}},
        {"lora": {"rank": 2}},
    ],
    ids=str,
)
def test_19_micro_batches_from_one_reply_up_to_all_change_nothing(change, small, tmp_path):
    found = []
    for micro in (1, 100_000):  # more cuts in test_invariances.py
        more = {"micro_tokens": micro, "iterations": 1, "epochs": 2, "rollout_size": 6}
        more |= {"minibatch_size": 3}
        run = train_ppo(small("ppo", tmp_path / str(micro), change | more))
        found.append((rows(run), load_file(run / "export" / "model.safetensors")))
    for other, weights in found:
        last = other[-1]
        assert last["policy/first_ratio_error"] == last["kl/first_old_k3"] == 0.0
        for one, two in zip(found[0][0], other, strict=True):
            gap = {k for k in one if k.startswith("engine/")}
            expected = {k: v for k, v in numbers(one).items() if k not in gap}
            assert {k: two[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=2e-6)
        for name, value in weights.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_with_lora_the_reference_is_the_policy_with_its_adapters_off(small, tmp_path, monkeypatch):
    change = {"lora": {"rank": 4, "alpha": 8.0}, "iterations": 3, "optim": {"lr": 1e-2}}
    own = rows(train_ppo(small("ppo", tmp_path / "a", change)))
    assert own[0]["kl/ref_k3"] == own[0]["kl/ref_k1"] == 0.0
    assert own[2]["kl/ref_k3"] > 1e-5
    plain = ppo_state.load_actors

    def with_reference(config, here):
        return dataclasses.replace(
            plain(config, here), reference=LanguageModel(load_policy("tiny")).requires_grad_(False)
        )

    monkeypatch.setattr(ppo_state, "load_actors", with_reference)
    separate = rows(train_ppo(small("ppo", tmp_path / "b", change)))
    # without adapters its blocks run as one operation, which rounds otherwise
    for one, two in zip(own, separate, strict=True):
        assert numbers(two) == pytest.approx(numbers(one), rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_an_iteration_with_a_separate_reference_starts_at_kl_zero(small, tmp_path):
    for dtype in ("float32", "bfloat16"):
        row = rows(train_ppo(small("ppo", tmp_path / dtype, {"dtype": dtype})))[0]
        assert abs(row["kl/ref_k1"]) < 1e-6 if dtype == "float32" else 0.05
        assert row["kl/ref_k3"] >= 0


# --- the critic before PPO


@pytest.mark.slow
def test_the_critic_is_fitted_with_the_policy_frozen_until_it_explains_enough(small, tmp_path):
    change = {"critic_pretraining": {"max_rollouts": 3, "explained_variance": 1.0}}
    change |= {"checkpoint": {"every": 1, "keep_last": 9}, "iterations": 1}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    found = rows(run)
    assert [(row["stage"], row["step"]) for row in found] == [
        *[("critic", step) for step in (1, 2, 3)],
        ("ppo", 1),
    ]
    for row in found[:3]:
        assert "value/clip_fraction" not in row
        assert abs(row["kl/ref_k1"]) < 1e-6, "the policy has not moved"
    saved = [
        load_file(run / "checkpoints" / f"step-00000{n}" / "policy.safetensors") for n in (1, 3)
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    critics = [
        load_file(run / "checkpoints" / f"step-00000{n}" / "critic.safetensors") for n in (1, 3)
    ]
    assert not torch.equal(critics[0]["score.weight"], critics[1]["score.weight"])
    state = json.loads((run / "checkpoints" / "step-000003" / "state.json").read_text())
    assert (state["critic_steps"], state["critic_ready"], state["iteration"]) == (0, True, 0)
    assert state["moments"]["count"] == 12
    ready = [row for row in jsonl(run / "events.jsonl") if row["kind"] == "critic_pretrained"]
    assert [(row["stage"], row["step"], row["reached"]) for row in ready] == [("critic", 3, False)]


@pytest.mark.slow
def test_a_critic_that_explains_enough_at_once_is_ready(small, tmp_path):
    change = {"critic_pretraining": {"max_rollouts": 9, "explained_variance": -1e6}}
    found = rows(train_ppo(small("ppo", tmp_path / "run", change)))
    assert [row["stage"] for row in found] == ["critic", "ppo", "ppo"]


@pytest.mark.slow
def test_a_long_pre_training_on_a_short_schedule_never_climbs(small, tmp_path):
    """The critic's schedule is PPO's; its pre-training may be longer than that."""
    change = {"critic_pretraining": {"max_rollouts": 4, "explained_variance": 1.0}}
    change |= {"iterations": 1, "critic_optim": {"lr": 1e-3, "schedule": "linear"}}
    found = rows(train_ppo(small("ppo", tmp_path / "run", change)))
    assert all(row["value/lr"] >= 0 for row in found)
    assert found[3]["value/lr"] == 0.0
    assert found[4]["value/lr"] > 0


@pytest.mark.slow
def test_the_update_ends_when_the_policy_has_moved_far_enough(small, tmp_path):
    change = {"epochs": 3, "optim": {"lr": 1e-2}, "checkpoint": {"every": 1}}
    change |= {"loss": {"target_kl": 1e-7}, "rollout_size": 8}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    events = [row for row in jsonl(run / "events.jsonl") if row["kind"] == "target_kl"]
    assert [row["step"] for row in events] == [1, 2]
    assert all((row["epoch"], row["minibatch"]) == (0, 1) for row in events)
    saved = load_file(max((run / "checkpoints").iterdir()) / "policy_optimizer.safetensors")
    assert {int(v) for k, v in saved.items() if k.startswith("step.")} == {4}  # 2 x 2 of 2 x 12


# --- prompts, seeds, plans


def prompt(index, name="p"):
    return Prompt(index, PromptRow(name, ()), [index])


def test_the_engine_holds_weights_while_replies_are_written_and_not_through_the_update(
    small, tmp_path, monkeypatch
):
    from ppomax.rollout.native import NativeEngine

    held, engines, plain = [], [], NativeEngine.generate

    def generate(engine, *given):
        engines.append(engine)
        held.append(("write", hasattr(engine, "weights")))
        return plain(engine, *given)

    def noting(name):
        inner = getattr(ppo, name)

        def noted(*given, **named):
            held.append((name, hasattr(engines[-1], "weights")))
            return inner(*given, **named)

        monkeypatch.setattr(ppo, name, noted)

    monkeypatch.setattr(NativeEngine, "generate", generate)
    for name in ("score", "update_policy", "update_critic"):
        noting(name)
    change = {"dtype": "float32", "iterations": 3, "critic_pretraining": {"max_rollouts": 1}}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    assert {name for name, _ in held} == {"write", "score", "update_policy", "update_critic"}
    assert all(has == (name == "write") for name, has in held)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row["engine/logprob_gap_max"] for row in rows) < 1e-4


def test_a_reply_s_seed_is_its_prompts_and_not_its_places():
    prompts = [prompt(i) for i in (4, 1, 9)]
    where = {"seed": 0, "stage": "ppo", "attempt": 0, "iteration": 3}
    seeds = reply_seeds(prompts, **where)
    assert reply_seeds(prompts[::-1], **where) == seeds[::-1]
    assert len(set(seeds)) == 3
    repeated = reply_seeds([prompt(4), prompt(1), prompt(4)], **where)
    assert repeated[:2] == seeds[:2]
    assert repeated[2] not in seeds
    for key, value in (("seed", 1), ("stage", "critic"), ("attempt", 1), ("iteration", 4)):
        assert not set(reply_seeds(prompts, **where | {key: value})) & set(seeds)


def test_every_prompt_comes_once_an_epoch_in_a_new_order(small, tmp_path, tiny):
    config = small("ppo", tmp_path)
    stream = load_stream(config, ChatTemplate(load_tokenizer("tiny")))
    size = len(stream.prompts)
    epochs = [[p.index for p in stream.batch(size * n, size)] for n in range(3)]
    assert all(sorted(order) == list(range(size)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    across = [p.index for p in stream.batch(size - 2, 4)]
    assert across == epochs[0][-2:] + epochs[1][:2]
    again = load_stream(config, ChatTemplate(load_tokenizer("tiny")))
    assert [p.index for p in again.batch(size - 2, 4)] == across


@pytest.mark.slow
def test_rollouts_take_the_prompts_one_after_the_other(small, tmp_path, experiences):
    change = {"critic_pretraining": {"max_rollouts": 1}, "iterations": 3, "rollout_size": 4}
    config = small("ppo", tmp_path / "run", change)
    train_ppo(config)
    stream = load_stream(config, ChatTemplate(load_tokenizer("tiny")))
    taken = [ids for experience in experiences for ids in experience.rollout.prompts]
    assert taken == [prompt.ids for prompt in stream.batch(0, 16)]


@pytest.mark.slow
def test_prompts_that_do_not_fit_are_set_aside_and_none_left_is_an_error(small, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Short?"}\n' + json.dumps({"prompt": "long " * 200}) + "\n")
    change = {"data": str(path), "iterations": 1}
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used \(too-long 1\)"):
        train_ppo(small("ppo", tmp_path / "a", change))
    run = train_ppo(small("ppo", tmp_path / "run", change | {"max_bad_rows": 0.5}))
    events = [row for row in jsonl(run / "events.jsonl") if row["kind"] == "quarantined_row"]
    assert [(row["where"], row["defect"]) for row in events] == [(f"{path}:2", "too-long")]
    with pytest.raises(DataError, match=r"ppo\.max_prompt: no prompt fits 5 tokens"):
        train_ppo(small("ppo", tmp_path / "b", {"data": str(path), "max_prompt": 5}))


def test_more_replies_than_prompts_repeat_them_with_other_noise(small, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Only me?"}\n')
    change = {"data": str(path), "iterations": 1, "log": {"samples": 4}}
    change |= {"sampling": {"temperature": 2.0}}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    assert len({row["response"] for row in jsonl(run / "samples.jsonl")}) == 4


def test_a_rollouts_plan_holds_every_reply_once_an_epoch(small, tmp_path):
    from ppomax.distributed import World
    from ppomax.rollout.engine import Rollout

    config = small("ppo", tmp_path, {"rollout_size": 12, "minibatch_size": 4, "micro_tokens": 9})
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    rollout = Rollout([[1]] * 12, [[2] * n for n in lengths], [[0.0] * n for n in lengths], [])
    here = World(0, 1, torch.device("cpu"))
    plans = [plan_updates(rollout, config, here, "ppo", 1, epoch) for epoch in (0, 1)]
    for plan in plans:
        assert [sum(map(len, minibatch)) for minibatch in plan] == [4, 4, 4]
        assert sorted(i for mini in plan for micro in mini for i in micro) == list(range(12))
        for micro in (micro for mini in plan for micro in mini):
            assert len(micro) == 1 or len(micro) * max(lengths[i] + 1 for i in micro) <= 9
    assert plans[0] != plans[1]
    assert plans[0] == plan_updates(rollout, config, here, "ppo", 1, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_ranks_replies_come_back_in_the_order_of_the_prompts(size):
    from ppomax.rollout.engine import Rollout

    every = list(range(7))
    parts = []
    for rank in range(size):
        own = every[rank::size]
        parts.append(
            Rollout([[i] for i in own], [[i] * 2 for i in own], [[float(i)] for i in own], own)
        )
    whole = merge_rollouts(parts, 7)
    assert [p[0] for p in whole.prompts] == [r[0] for r in whole.responses] == every
    assert whole.finished == every


def test_pieces_of_text_are_as_many_tokens_as_asked_and_the_seeds_choice(tiny, small_data):
    template = ChatTemplate(load_tokenizer("tiny"))
    settings = PtxSettings(data=[small_data["text"]], length=16)
    stream = TextStream(settings, template, 0, 0.0)
    assert all(8 <= len(piece) <= 16 for piece in stream.pieces)
    for tokens in (1, 7, 30, 45):
        assert sum(len(piece) - 1 for piece in stream.take(tokens, 1, 0, 0)) == tokens
    assert stream.take(30, 1, 0, 0) == stream.take(30, 1, 0, 0) != stream.take(30, 1, 0, 1)
    assert stream.take(30, 1, 0, 0) != TextStream(settings, template, 1, 0.0).take(30, 1, 0, 0)
    assert stream.take(0, 1, 0, 0) == []


def test_a_text_without_a_piece_long_enough_is_an_error(tiny, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "Hm."}\n')
    with pytest.raises(DataError, match=r"ppo\.ptx\.data: no text of at least 8 tokens"):
        TextStream(PtxSettings(data=[str(path)]), ChatTemplate(load_tokenizer("tiny")), 0, 0.0)


def test_the_reward_must_come_from_somewhere(small, tmp_path):
    config = small("ppo", tmp_path / "run").model_copy()
    bare = config.model_copy(update={"reward": config.reward.model_copy(update={"model": None})})
    with pytest.raises(ConfigError, match=r"ppo\.reward\.model: missing"):
        train_ppo(bare)


# --- it learns


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_raises_a_score_from_a_function(seed, small, tmp_path, monkeypatch):
    (tmp_path / "letter_scores.py").write_text(
        "def share(prompts, responses, *, ids, metadata):\n"
        "    return [text.count('e') / max(1, len(text)) for text in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    change = {
        "seed": seed,
        "reward": {"callable": "letter_scores:share"},
        "critic": "policy",
        "data": "bundled:prompts",
        "iterations": 30,
        "rollout_size": 32,
        "minibatch_size": 16,
        "max_prompt": 96,
        "sampling": {"max_new_tokens": 8},
        "kl": {"coef": 0.01},
        "optim": {"lr": 3e-3, "grad_clip": 1.0},
        "critic_optim": {"lr": 3e-3, "grad_clip": 1.0},
        "checkpoint": {"every": 1000},
    }
    found = rows(train_ppo(small("ppo", tmp_path / "run", change)))
    first = sum(row["reward/score_mean"] for row in found[:3]) / 3
    last = sum(row["reward/score_mean"] for row in found[-3:]) / 3
    print(f"seed {seed}: {first:.3f} -> {last:.3f}")
    assert first < 0.12
    assert last > 3 * first
    assert found[-1]["kl/ref_k1"] > 0.1


@pytest.mark.slow
def test_a_critic_from_the_reward_model_starts_in_units_of_normalised_scores(small, small_reward):
    from ppomax.distributed import World

    here = World(0, 1, torch.device("cpu"))
    card = json.loads((Path(small_reward) / "reward_card.json").read_text())
    judge, ids = load_reward_model(small_reward), torch.arange(4, 24)[None]
    for normalise, wanted in (
        ("standardize", (judge.values(ids) - card["score_mean"]) / card["score_std"]),
        ("scale", judge.values(ids) / card["score_std"]),
        (None, judge.values(ids)),
    ):
        config = small("ppo", Path("x"), {"reward": {"normalise": normalise}})
        critic = ppo_state.load_actors(config, here).critic.model
        torch.testing.assert_close(critic.values(ids), wanted, rtol=1e-4, atol=1e-5)


EXTREMES = {
    "one reply of one token": {
        "rollout_size": 1,
        "minibatch_size": 1,
        "sampling": {"max_new_tokens": 1},
        "advantage": {"whiten": True, "clip": 0.1},
        "critic_pretraining": {"max_rollouts": 1},
    },
    "the same score for all": {"reward": {"callable": "odd_scores:same"}, "critic": "policy"},
    "enormous scores": {"reward": {"callable": "odd_scores:enormous"}, "critic": "policy"},
    "cold": {"sampling": {"temperature": 0.01}},
    "hot": {"sampling": {"temperature": 50.0}},
    "a huge rate": {"optim": {"lr": 1.0}, "critic_optim": {"lr": 1.0}, "epochs": 3},
    "no clip at all": {
        "loss": {"policy_clip": None, "value_clip": None},
        "optim": {"lr": 1e-2, "grad_clip": None},
        "reward": {"normalise": None, "clip": None},
    },
    "a lopsided clip": {"loss": {"policy_clip": [0.1, 0.3]}, "epochs": 2},
    "gamma and lambda at their ends": {"advantage": {"gamma": 0.01, "lam": 0.0}},
    "monte carlo": {"advantage": {"gamma": 1.0, "lam": 1.0}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTREMES)
def test_at_the_extremes_every_number_stays_finite(name, small, tmp_path, monkeypatch):
    (tmp_path / "odd_scores.py").write_text(
        "def same(prompts, responses, *, ids, metadata):\n    return [1.5] * len(ids)\n"
        "def enormous(prompts, responses, *, ids, metadata):\n"
        "    return [1e30 * len(r) for r in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = train_ppo(small("ppo", tmp_path / "run", EXTREMES[name]))
    for row in rows(run):
        assert all(math.isfinite(value) for value in numbers(row).values()), row
    for value in load_file(run / "export" / "model.safetensors").values():
        assert bool(torch.isfinite(value).all())
