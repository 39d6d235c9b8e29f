"""Options beside PPO-max: estimators without a critic, KL as a loss, PPO-penalty, buffers, ..."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppomax.config import parse, read_yaml
from ppomax.distributed import World
from ppomax.errors import ConfigError, TrainingError
from ppomax.experience import FixedKL
from ppomax.metrics import MetricSums
from ppomax.models.load import load_policy
from ppomax.models.names import resolve
from ppomax.normalise import RunningMoments
from ppomax.recipe import load_recipe
from ppomax.rollout.engine import Rollout
from ppomax.train import buffer, observe, ppo
from ppomax.train.actors import load_actors
from ppomax.train.estimates import critic_free, estimate
from ppomax.train.experience_batch import exact_kl, plan_updates, score
from ppomax.train.loop import StageRun
from ppomax.train.observe import critic_metrics
from ppomax.train.ppo import train_ppo
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.ppo_settings import AdvantageSettings, LossSettings
from ppomax.train.update import Updating, kl_of_update, update_critic, update_policy

HERE = World(0, 1, torch.device("cpu"))
PROMPTS = [[5, 9, 30], [11, 40, 41, 42, 43, 44], [70], [80, 81, 300, 301]]
REPLIES = [[50, 2], [60, 61, 62, 63, 64], [90, 3, 91], [100]]
COUNT = sum(map(len, REPLIES))
HOT = 0.7


def rows(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "throughput", "memory")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in found]


@pytest.fixture(scope="module")
def other(tiny_cache, tmp_path_factory):
    """The tiny model with other weights, as a reference that is not the policy."""
    folder = tmp_path_factory.mktemp("other") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPOMAX_CACHE", str(tiny_cache))
        shutil.copytree(resolve("tiny"), folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for tensor in tensors.values():
        tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def made(small, out, changes):
    """Actors, experience and what an optimizer step takes, of four replies given by hand."""
    sampling = {"temperature": HOT, "max_new_tokens": 6}
    config = small("ppo", out, {"minibatch_size": 4, "sampling": sampling, **changes})
    actors = load_actors(config, HERE)
    run = StageRun("ppo", config, HERE, resume=False)
    rollout = Rollout(PROMPTS, REPLIES, [[0.0] * len(r) for r in REPLIES], [True] * 4)
    plan = plan_updates(rollout, config, HERE, "ppo", 1, 0)
    scored = score(rollout, [], plan, actors, config, HERE)
    experience = estimate(rollout, scored, RunningMoments(), FixedKL(0.3), config)
    now = Updating(
        actors, config, HERE, run, MetricSums(), 1, penalty_coef=config.loss.penalty_coef
    )
    return now, experience, plan[0]


def logits_of(model, row):
    ids = torch.tensor([PROMPTS[row] + REPLIES[row]])
    return model(ids).logits[0, len(PROMPTS[row]) - 1 : -1] / HOT


def stepped(now, experience, minibatch, monkeypatch, first=True):
    """Metrics of one step and the gradient it was about to apply."""
    caught = {}
    policy = now.actors.policy
    plain = policy.step

    def step():
        caught.update({n: p.grad.clone() for n, p in policy.model.named_parameters()})
        return plain()

    monkeypatch.setattr(policy, "step", step)
    kl = update_policy(now, experience, minibatch, [], first=first)
    return now.sums.merged(HERE), caught, kl


# --- KL as a loss


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
@pytest.mark.parametrize("micro_tokens", [1, 10_000])
def test_the_kl_term_s_gradient_is_autograd_s_on_single_replies(
    estimator, micro_tokens, small, tmp_path, other, monkeypatch
):
    kl = {"where": "loss", "estimator": estimator, "coef": 0.3}
    change = {"kl": kl, "reference": other, "micro_tokens": micro_tokens}
    now, experience, minibatch = made(small, tmp_path / "run", change)
    values, caught, _ = stepped(now, experience, minibatch, monkeypatch)
    model, reference, total = load_policy("tiny"), load_policy(other), torch.zeros(())
    for row, reply in enumerate(REPLIES):
        own, theirs = (logits_of(m, row).log_softmax(-1) for m in (model, reference))
        index = torch.tensor(reply)[:, None]
        chosen, ref_chosen = own.gather(1, index)[:, 0], theirs.gather(1, index)[:, 0].detach()
        r = ref_chosen - chosen
        kl = {
            "k2": r.square() / 2,
            "k3": r.exp() - 1 - r,
            "exact": (own.exp() * (own - theirs.detach())).sum(-1),
        }[estimator]
        total = total + kl.sum() / COUNT
        assert not experience.rewards[row, : len(reply) - 1].any(), "no penalty in the reward"
    advantage = sum(
        (logits_of(model, row).log_softmax(-1).gather(1, torch.tensor(r)[:, None])[:, 0])
        @ experience.advantages[row, : len(r)]
        for row, r in enumerate(REPLIES)
    )
    (0.3 * total - advantage / COUNT).backward()
    assert values["kl/loss"] == pytest.approx(float(total.detach()), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(caught[f"lm.{name}"], parameter.grad, rtol=2e-3, atol=2e-6)


def test_the_exact_kl_of_the_first_replies_is_a_metric(small, tmp_path, other):
    change = {"reference": other, "kl": {"exact_replies": 2}}
    now, experience, _ = made(small, tmp_path / "run", change)
    found = exact_kl(experience.rollout, now.actors, now.config, HERE, 2)
    model, reference = load_policy("tiny"), load_policy(other)
    with torch.no_grad():
        tables = [[logits_of(m, r).log_softmax(-1) for m in (model, reference)] for r in (0, 1)]
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in tables)
    assert found == pytest.approx(total / (len(REPLIES[0]) + len(REPLIES[1])), rel=1e-4)


@pytest.mark.slow
def test_a_reference_that_is_not_the_policy_is_measured_from_the_first_step(small, tmp_path, other):
    own = rows(train_ppo(small("ppo", tmp_path / "a", {})))[0]
    held = rows(train_ppo(small("ppo", tmp_path / "b", {"reference": other})))[0]
    assert own["kl/ref_k3"] == 0.0 < held["kl/ref_k3"]
    lora = {"reference": other, "lora": {"rank": 2}}
    adapted = rows(train_ppo(small("ppo", tmp_path / "c", lora)))[0]
    assert adapted["kl/ref_k3"] == pytest.approx(held["kl/ref_k3"], rel=1e-3)


# --- PPO-penalty, entropy


def test_the_penalty_s_gradient_is_autograd_s(small, tmp_path, monkeypatch):
    change = {"loss": {"policy_clip": None, "penalty_coef": 2.0}, "micro_tokens": 14}
    now, experience, minibatch = made(small, tmp_path / "run", change)
    generator = torch.Generator().manual_seed(2)
    noise = 0.3 * torch.randn(experience.scored.logprobs.shape, generator=generator)
    scored = dataclasses.replace(experience.scored, logprobs=experience.scored.logprobs + noise)
    experience = dataclasses.replace(experience, scored=scored)
    values, caught, kl = stepped(now, experience, minibatch, monkeypatch, first=False)
    model, total, divergence = load_policy("tiny"), torch.zeros(()), 0.0
    for row, reply in enumerate(REPLIES):
        chosen = logits_of(model, row).log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]
        log_ratio = chosen - scored.logprobs[row, : len(reply)]
        k3 = log_ratio.exp() - 1 - log_ratio
        total = total + (log_ratio.exp() * experience.advantages[row, : len(reply)] - 2 * k3).sum()
        divergence += float(k3.sum().detach())
    (-total / COUNT).backward()
    assert kl == pytest.approx(divergence / COUNT, rel=1e-4)
    assert values["kl/old_k3"] == pytest.approx(kl)
    assert values["policy/loss"] == pytest.approx(float(-total.detach() / COUNT), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(caught[f"lm.{name}"], parameter.grad, rtol=2e-3, atol=2e-6)


@pytest.mark.slow
def test_the_penalty_s_coefficient_follows_its_target_and_is_saved(small, tmp_path):
    change = {"loss": {"policy_clip": None, "penalty_coef": 1.0, "penalty_target": 1e3}}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    assert [row["policy/penalty_coef"] for row in rows(run)] == [1.0, 0.5]
    state = json.loads((max((run / "checkpoints").iterdir()) / "state.json").read_text())
    assert state["penalty"] == {"coef": 0.25}


@pytest.mark.parametrize("micro_tokens", [1, 10_000])
def test_the_penalty_is_steered_by_the_kl_after_the_last_step(micro_tokens, small, tmp_path):
    change = {"optim": {"lr": 1e-2, "warmup": 0}, "micro_tokens": micro_tokens}
    change |= {"loss": {"policy_clip": None, "penalty_coef": 1.0, "penalty_target": 0.01}}
    now, experience, minibatch = made(small, tmp_path / "run", change)
    assert kl_of_update(now, experience, minibatch) == pytest.approx(0, abs=1e-7)
    before = update_policy(now, experience, minibatch, [], first=True)
    assert before == pytest.approx(0, abs=1e-7)  # that of the step's own forward
    total = 0.0
    with torch.no_grad():
        for row, reply in enumerate(REPLIES):
            logprobs = logits_of(now.actors.policy.model.lm, row).log_softmax(-1)
            own = logprobs[range(len(reply)), reply]
            moved = own - experience.scored.logprobs[row, : len(reply)]
            total += float((moved.exp() - 1 - moved).sum())
    assert total / COUNT > 1e-3
    assert kl_of_update(now, experience, minibatch) == pytest.approx(total / COUNT, rel=1e-3)


@pytest.mark.slow
def test_one_step_an_iteration_steers_the_penalty(small, tmp_path):
    loss = {"policy_clip": None, "penalty_coef": 1.0, "penalty_target": 1e-12}
    change = {"loss": loss, "minibatch_size": 4, "rollout_size": 4}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    assert [row["policy/penalty_coef"] for row in rows(run)] == [1.0, 2.0]


def test_a_minibatch_with_nothing_to_learn_from_moves_nothing(small, tmp_path):
    change = {"optim": {"lr": 1e-2, "warmup": 0}, "critic_optim": {"lr": 1e-2, "warmup": 0}}
    now, experience, minibatch = made(small, tmp_path / "run", change)
    update_policy(now, experience, minibatch, [], first=True)  # there are moments now
    update_critic(now, experience, minibatch, clip=0.2)
    parts = (now.actors.policy, now.actors.critic)
    before = [[p.detach().clone() for p in part.model.parameters()] for part in parts]
    sums = now.sums.state_dict()
    nothing = dataclasses.replace(experience, mask=torch.zeros_like(experience.mask))
    assert update_policy(now, nothing, minibatch, [], first=False) is None
    update_critic(now, nothing, minibatch, clip=0.2)
    for part, weights in zip(parts, before, strict=True):
        assert part.step_count == 1
        assert all(map(torch.equal, part.model.parameters(), weights))
    assert now.sums.state_dict() == sums


@pytest.mark.slow
def test_an_update_that_target_kl_ends_moves_the_penalty_too(small, tmp_path, monkeypatch):
    read = []

    def timing(seconds, experience, trained, here):
        lengths = experience.rollout.lengths
        read.append(trained / sum(lengths))
        return observe.timing(seconds, experience, trained, here)

    monkeypatch.setattr(ppo, "timing", timing)
    loss = {"policy_clip": None, "penalty_coef": 1.0, "penalty_target": 1e-9, "target_kl": 1e-12}
    run = train_ppo(small("ppo", tmp_path / "run", {"loss": loss, "epochs": 4}))
    assert all(passes < 2 for passes in read)  # of four
    assert [row["policy/penalty_coef"] for row in rows(run)] == [1.0, 2.0]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert len([row for row in events if row["kind"] == "target_kl"]) == 2


def test_the_entropy_threshold_is_held_against_the_policy_as_it_is(small, tmp_path, monkeypatch):
    """The rollout's mean would be on the other side of it."""
    now, experience, minibatch = made(small, tmp_path / "run", {"loss": {"entropy_coef": 1.0}})
    mean = float(experience.scored.entropy[experience.scored.mask].mean())
    stale = dataclasses.replace(experience.scored, entropy=experience.scored.entropy + 1.0)
    held = dataclasses.replace(now, entropy_threshold=mean + 0.5)
    moved = dataclasses.replace(experience, scored=stale, advantages=0 * experience.advantages)
    _, caught, _ = stepped(held, moved, minibatch, monkeypatch)
    model, total = load_policy("tiny"), torch.zeros(())
    for row in range(4):
        table = logits_of(model, row).log_softmax(-1)
        total = total - (table.exp() * table).sum()
    (-total / COUNT).backward()  # below the threshold: entropy is pushed up
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(caught[f"lm.{name}"], parameter.grad, rtol=2e-3, atol=2e-6)


@pytest.mark.slow
def test_an_entropy_fraction_is_of_the_first_rollout_and_survives_in_the_checkpoint(
    small, tmp_path
):
    loss = {"entropy_coef": 0.1, "entropy_fraction": 0.5}
    run = train_ppo(small("ppo", tmp_path / "run", {"loss": loss}))
    state = json.loads((max((run / "checkpoints").iterdir()) / "state.json").read_text())
    assert state["first_entropy"] == pytest.approx(rows(run)[0]["policy/entropy"], rel=1e-6)
    fixed = {"entropy_coef": 0.1, "entropy_threshold": 0.5 * state["first_entropy"]}
    same = train_ppo(small("ppo", tmp_path / "same", {"loss": fixed}))
    for one, two in zip(rows(run), rows(same), strict=True):
        numbers = {key: value for key, value in one.items() if key != "stage"}
        assert numbers == pytest.approx({key: two[key] for key in numbers}, rel=1e-6)


# --- estimators without a critic

REWARDS = torch.tensor([[0.1, 1.0], [0.0, 3.0], [2.0, 0.0], [5.0, math.nan], [9.0, 9.0]])
MASK = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0], [0, 0]]).bool()
GROUPS = torch.tensor([0, 0, 0, 1, 1])


def test_rloo_compares_the_summed_rewards_of_a_prompt_s_replies():
    found = critic_free(REWARDS, MASK, GROUPS, AdvantageSettings(estimator="rloo"))
    # totals 1.1, 3, 2 | 5 alone (its mate is set aside): own less the mean of the others
    expected = [[1.1 - 2.5] * 2, [3 - 1.55] * 2, [2 - 2.05, 0], [0, 0], [0, 0]]
    torch.testing.assert_close(found.advantages, torch.tensor(expected))


def test_grpo_and_the_baseline_take_the_mean_off_and_scale_each_in_its_way():
    totals = torch.tensor([1.1, 3.0, 2.0])
    centred = totals - totals.mean()
    grpo = critic_free(REWARDS, MASK, GROUPS, AdvantageSettings(estimator="grpo"))
    torch.testing.assert_close(grpo.advantages[:3, 0], centred / totals.std())
    plain = AdvantageSettings(estimator="grpo", scale_std=False)
    free = critic_free(REWARDS, MASK, GROUPS, plain).advantages
    torch.testing.assert_close(free[:3, 0], centred)
    settings = AdvantageSettings(estimator="reinforce_baseline")
    whitened = critic_free(REWARDS, MASK, GROUPS, settings).advantages
    tokens = torch.tensor([*centred[[0, 0, 1, 1, 2]].tolist(), 0.0])
    expected = (tokens - tokens.mean()) / tokens.std()
    torch.testing.assert_close(whitened[MASK], expected, rtol=1e-4, atol=1e-5)


def test_reinforce_whitens_the_reward_to_go_over_the_rollout():
    found = critic_free(REWARDS, MASK, GROUPS, AdvantageSettings(estimator="reinforce", gamma=0.5))
    to_go = torch.tensor([0.1 + 0.5, 1.0, 1.5, 3.0, 2.0, 5.0])
    expected = (to_go - to_go.mean()) / to_go.std()
    torch.testing.assert_close(found.advantages[MASK], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.returns[MASK], to_go)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["reinforce", "rloo", "grpo", "reinforce_baseline"])
def test_without_a_critic_nothing_of_one_is_loaded_saved_or_logged(estimator, small, tmp_path):
    change = {"advantage": {"estimator": estimator}}
    config = small("ppo", tmp_path / "run", change)
    assert config.samples_per_prompt == (1 if estimator == "reinforce" else 4)
    assert config.critic is config.critic_pretraining is config.loss.value_clip is None
    run = train_ppo(config)
    assert not [key for key in rows(run)[0] if key.startswith(("value/", "return/"))]
    saved = {path.stem for path in max((run / "checkpoints").iterdir()).iterdir()}
    assert "policy" in saved
    assert not [name for name in saved if name.startswith("critic")]
    assert rows(run)[1]["policy/grad_norm"] > 0
    assert parse(type(config), read_yaml(run / "config.yaml")) == config, "it can be resumed"


def test_several_replies_to_a_prompt_stand_together_and_differ(small, tmp_path):
    change = {"samples_per_prompt": 3, "minibatch_size": 12, "iterations": 1}
    change |= {"log": {"samples": 12}, "sampling": {"max_new_tokens": 8}}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    lines = (run / "samples.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    texts = [json.loads(line)["response"] for line in lines]
    assert ids[0::3] == ids[1::3] == ids[2::3]
    assert len(set(ids)) == 4
    assert len(set(texts)) == 12


def test_one_override_asks_what_a_critic_is_worth(tiny, tmp_path):
    words = [f"out={tmp_path}", "ppo.advantage.estimator=rloo"]
    ppo = load_recipe("smoke", words).ppo
    assert ppo.critic is None
    assert ppo.samples_per_prompt == 4
    with pytest.raises(ConfigError, match="critic_optim has no effect"):
        load_recipe("smoke", [*words, "ppo.critic_optim.lr=0.1"])


# --- replies without an end, buffers, initial models


def gappy(small, tmp_path, missing_eos):
    """Experience of the four replies, the second and the last cut at the limit."""
    change = {"advantage": {"missing_eos": missing_eos, "lam": 0.7, "gamma": 0.9}}
    now, experience, _ = made(small, tmp_path / str(missing_eos), change)
    rollout = dataclasses.replace(experience.rollout, finished=[True, False, True, False])
    plan = [[[0, 1, 2, 3]]]
    scored = score(rollout, [], plan, now.actors, now.config, HERE)
    return estimate(rollout, scored, RunningMoments(), FixedKL(0.3), now.config), now


def test_a_cut_reply_can_go_on_in_the_critic_s_value(small, tmp_path):
    found, now = gappy(small, tmp_path, "bootstrap")
    critic = now.actors.critic.model
    for row, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        with torch.no_grad():
            values = critic.values(torch.tensor([prompt + reply]))[0, len(prompt) - 1 :].tolist()
        cut = row in (1, 3)
        values[-1] = values[-1] if cut else 0.0
        rewards = found.rewards[row, : len(reply)].tolist()
        assert (rewards[-1] == 0.0) == cut, "the score gives way to the value"
        errors = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(len(reply))]
        for t in range(len(reply)):
            expected = sum((0.9 * 0.7) ** (k - t) * errors[k] for k in range(t, len(reply)))
            assert float(found.advantages[row, t]) == pytest.approx(expected, abs=1e-5)


def test_a_critic_is_judged_by_replies_that_its_value_does_not_end(small, tmp_path, monkeypatch):
    found, _ = gappy(small, tmp_path, "bootstrap")
    few = critic_metrics(found, guessed=True)["value/explained_variance"]
    assert few == 0.0, "two replies tell nothing"
    monkeypatch.setattr(observe, "LEAST_FINISHED", 2)
    rows = [0, 2]  # finished
    values, returns = (
        torch.cat([table[row, : len(REPLIES[row])] for row in rows]).double()
        for table in (found.scored.values, found.monte_carlo)
    )
    expected = 1 - float((returns - values).var() / returns.var())
    explained = critic_metrics(found, guessed=True)["value/explained_variance"]
    assert explained == pytest.approx(expected, rel=1e-4)
    assert critic_metrics(found, guessed=False)["value/explained_variance"] != explained


def test_a_cut_reply_can_be_dropped_from_what_is_learned_but_not_from_what_is_seen(small, tmp_path):
    found, _ = gappy(small, tmp_path, "drop")
    assert found.mask.any(1).tolist() == [True, False, True, False]
    assert found.scored.mask.any(1).all()
    assert (found.advantages[[1, 3]] == 0).all()


@pytest.mark.slow
def test_a_buffer_learns_from_the_latest_rollouts_too(small, tmp_path):
    change = {"iterations": 4, "buffer_iterations": 3, "checkpoint": {"every": 1, "keep_last": 9}}
    config = small("ppo", tmp_path / "run", change)
    assert config.total_steps == (1 + 2 + 3 + 3) * 2
    run = train_ppo(config)
    state = json.loads((run / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["policy_steps"] == state["critic_steps"] == config.total_steps
    found = rows(run)
    assert all(row["policy/first_ratio_error"] == 0.0 for row in found)
    assert found[2]["kl/old_k3"] > 0
    for gone in ("step-000003", "step-000004"):
        shutil.rmtree(run / "checkpoints" / gone)
    shutil.rmtree(run / "export")
    (run / "done.json").unlink(missing_ok=True)
    assert rows(train_ppo(config, resume=True)) == found


def test_experience_comes_back_from_a_checkpoint_as_it_was(small, tmp_path):
    _, experience, _ = made(small, tmp_path / "run", {})
    found = buffer.unpack(buffer.pack(experience), HERE.device)
    assert found.rollout == experience.rollout
    for one, two in ((found, experience), (found.scored, experience.scored)):
        for field in dataclasses.fields(two):
            a, b = getattr(one, field.name), getattr(two, field.name)
            if isinstance(b, torch.Tensor):
                assert torch.equal(a, b), field.name
            elif field.name != "scored":
                assert a == b, field.name


def test_a_policy_from_the_base_model_is_held_to_the_sft_model(tiny, tmp_path):
    words = [f"out={tmp_path}", "ppo.start=base"]
    ppo = load_recipe("smoke", words).ppo
    assert (ppo.model, ppo.reference) == ("tiny", str(tmp_path / "sft" / "export"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"advantage": {"whiten": True}}, "conflict"),
        ({"advantage": {"whiten": True}, "reward": {"normalise": "scale"}}, "not be mixed"),
        ({}, None),
        ({"advantage": {"whiten": True}, "loss": {"value_clip": None}}, None),
    ],
)
def test_figure_14_s_advice_is_given_where_it_applies(change, text, small, tmp_path):
    run = train_ppo(small("ppo", tmp_path / "run", {"iterations": 1, **change}))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    notes = [row["note"] for row in events if row["kind"] == "advice"]
    assert len(notes) == (text is not None)
    if text:
        assert text in notes[0]
        assert "Figure 14" in notes[0]


def test_a_rollout_with_nothing_left_to_learn_from_is_an_error(small, tmp_path):
    change = {"advantage": {"missing_eos": "drop"}, "sampling": {"max_new_tokens": 2}}
    with pytest.raises(TrainingError, match=r"raise sampling\.max_new_tokens"):
        train_ppo(small("ppo", tmp_path / "run", change))


def test_settings_objects_from_python_follow_the_estimator_too(small, tmp_path):
    config = small("ppo", tmp_path, {"advantage": {"estimator": "rloo"}})
    data = {name: getattr(config, name) for name in ("model", "out", "data", "iterations")}
    advantage, loss = AdvantageSettings(estimator="rloo"), LossSettings(dual_clip=3.0)
    again = PPOConfig(**data, advantage=advantage, loss=loss)
    assert (again.critic, again.loss.value_clip, again.loss.dual_clip) == (None, None, 3.0)
