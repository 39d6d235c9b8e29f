"""One optimizer step of policy and critic against autograd on unpadded replies."""

import copy
import dataclasses
import json

import pytest
import torch
from torch.nn.utils import get_total_norm

from ppomax.distributed import World
from ppomax.experience import FixedKL
from ppomax.metrics import MetricSums
from ppomax.models.load import load_policy
from ppomax.normalise import RunningMoments
from ppomax.rollout.engine import Rollout
from ppomax.train.actors import load_actors
from ppomax.train.estimates import estimate
from ppomax.train.experience_batch import plan_updates, score
from ppomax.train.loop import StageRun
from ppomax.train.update import Updating, prepared_advantages, update_critic, update_policy

HERE = World(0, 1, torch.device("cpu"))
PROMPTS = [[5, 9, 30], [11, 40, 41, 42, 43, 44], [70], [80, 81, 300, 301]]
REPLIES = [[50, 2], [60, 61, 62, 63, 64], [90, 3, 91], [100]]  # 3 is the pad id, said by the policy


def a_rollout():
    generator = torch.Generator().manual_seed(0)
    logprobs = [torch.randn(len(r), generator=generator).tolist() for r in REPLIES]
    return Rollout(PROMPTS, REPLIES, logprobs, [True, False, True, False])


@pytest.fixture
def stage(small, tmp_path):
    """Actors, config, run and experience of four replies; `stage(changes)`."""
    made = []

    def make(changes=None, set_aside=()):
        out = tmp_path / str(len(made))
        made.append(out)
        config = small("ppo", out, {"minibatch_size": 4, **(changes or {})})
        actors = load_actors(config, HERE)
        run = StageRun("ppo", config, HERE, resume=False)
        rollout = a_rollout()
        plan = plan_updates(rollout, config, HERE, "ppo", 1, 0)
        scored = score(rollout, [], plan, actors, config, HERE)
        if set_aside:
            scores = scored.scores.clone()
            scores[list(set_aside)] = torch.nan
            mask = scored.mask & ~torch.isnan(scores)[:, None]
            scored = dataclasses.replace(scored, scores=scores, mask=mask)
        found = estimate(rollout, scored, RunningMoments(), FixedKL(0.05), config)
        return actors, config, run, found, plan

    return make


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def caught_gradients(trainable, monkeypatch):
    """What `Trainable.step` was about to apply, before the clip."""
    caught = {}
    plain = trainable.step

    def step():
        caught.update(gradients(trainable.model))
        return plain()

    monkeypatch.setattr(trainable, "step", step)
    return caught


def policy_step(stage_made, texts=(), first=True):
    actors, config, run, experience, plan = stage_made
    sums = MetricSums()
    now = Updating(
        actors,
        config,
        HERE,
        run,
        sums,
        1,
        penalty_coef=config.loss.penalty_coef,
        entropy_threshold=config.loss.entropy_threshold,
    )
    kl = update_policy(now, experience, plan[0], list(texts), first=first)
    return sums.merged(HERE), kl


def critic_step(stage_made, clip=None):
    actors, config, run, experience, plan = stage_made
    sums = MetricSums()
    now = Updating(actors, config, HERE, run, sums, 1)
    update_critic(now, experience, plan[0], clip=clip)
    return sums.merged(HERE)


def reply_logprobs(model, prompt, reply, temperature):
    """Of one unpadded reply, and the entropy of each choice, from plain logits."""
    ids = torch.tensor([prompt + reply])
    logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
    table = logits.log_softmax(-1)
    chosen = table.gather(1, torch.tensor(reply)[:, None])[:, 0]
    return chosen, -(table.exp() * table).sum(-1)


TEMPERATURE = {"sampling": {"temperature": 0.7}}


@pytest.mark.slow
@pytest.mark.parametrize("entropy", [None, 0.3])
def test_the_policys_gradient_is_autograds_on_single_replies(entropy, stage, monkeypatch):
    made = stage(TEMPERATURE | {"micro_tokens": 14, "loss": {"entropy_coef": entropy}})
    caught = caught_gradients(made[0].policy, monkeypatch)
    values, kl = policy_step(made)
    advantages = made[3].advantages
    model, total = load_policy("tiny"), 0.0
    count = sum(map(len, REPLIES))
    for row, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        chosen, entropies = reply_logprobs(model, prompt, reply, 0.7)
        ratio = (chosen - chosen.detach()).exp()
        total = total - (ratio * advantages[row, : len(reply)]).sum() / count
        total = total - (entropy or 0.0) * entropies.sum() / count
    total.backward()
    expected = gradients(model)
    for name, value in expected.items():
        torch.testing.assert_close(caught[f"lm.{name}"], value, rtol=1e-3, atol=1e-6)
    assert values["policy/grad_norm"] == pytest.approx(
        float(get_total_norm(list(expected.values()))), rel=1e-5
    )
    mean = sum(float(advantages[r, : len(reply)].sum()) for r, reply in enumerate(REPLIES)) / count
    assert values["policy/loss"] == pytest.approx(-mean, rel=1e-5)
    assert values["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert values["policy/ratio_max"] == 1.0
    assert kl == values["kl/old_k3"] == values["policy/first_ratio_error"] == 0.0


@pytest.mark.slow
def test_the_critics_gradient_is_autograds_on_single_replies(stage, monkeypatch):
    made = stage({"micro_tokens": 14})
    caught = caught_gradients(made[0].critic, monkeypatch)
    model, total, count = copy.deepcopy(made[0].critic.model), 0.0, sum(map(len, REPLIES))
    values = critic_step(made)
    for row, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        own = model.values(torch.tensor([prompt + reply]))[0, len(prompt) - 1 : -1]
        total = total + 0.5 * (own - made[3].returns[row, : len(reply)]).square().sum() / count
    total.backward()
    assert values["value/loss"] == pytest.approx(float(total.detach()), rel=1e-5)
    for name, value in gradients(model).items():
        torch.testing.assert_close(caught[name], value, rtol=1e-3, atol=1e-6)
    assert "value/clip_fraction" not in values
    assert "value/clip_fraction" in critic_step(stage(), clip=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"advantage": {"whiten": True, "clip": 0.5}},
        {"loss": {"entropy_coef": 0.1, "entropy_threshold": 5.0, "dual_clip": 2.0}},
        {"loss": {"ratio_to": "reference"}, "lora": {"rank": 2}},
    ],
    ids=str,
)
def test_19_any_micro_batches_give_the_same_step(change, stage):
    found = []
    texts = [[7, 8, 9, 10], [300, 301, 302], [20] * 9]
    if "lora" not in change:
        change = change | {"ptx": {"data": "bundled:text", "tokens": 14}}
    for micro in (1, 14, 10_000):
        made = stage(change | {"micro_tokens": micro})
        assert len(made[4][0]) == {1: 4, 14: 3, 10_000: 1}[micro]
        values, kl = policy_step(made, texts if "ptx" in change else ())
        found.append(values | critic_step(made, clip=0.2) | {"kl": kl})
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [[[1], [0], [2, 3]], [[1, 0, 2], [3]], [[3, 1, 2, 0]]], ids=str)
def test_a_reply_set_aside_moves_nothing_and_changes_no_mean(plan, stage):
    """Its score is gone; the step is that of the other replies alone."""
    made = (*stage(set_aside=[1])[:4], [plan])
    values, _ = policy_step(made)
    rest = (*stage(set_aside=[1])[:4], [[[0], [2], [3]]])
    alone, _ = policy_step(rest)
    assert values == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert critic_step(made) == pytest.approx(critic_step(rest), rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_19_an_entropy_threshold_among_the_parts_means_is_held_against_the_whole(stage):
    entropy, mask = stage()[3].scored.entropy, stage()[3].scored.mask
    parts = sorted(float(entropy[row][mask[row]].mean()) for row in range(4))
    change = {"entropy_coef": 1.0, "entropy_threshold": (parts[1] + parts[2]) / 2}
    norms = []
    for micro in (1, 10_000):
        values, _ = policy_step(stage({"micro_tokens": micro, "loss": change}))
        norms.append(values["policy/grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_minibatch_of_nothing_but_replies_set_aside_is_no_step(stage):
    made = stage(set_aside=[0, 1, 2])
    values, kl = policy_step((*made[:4], [[[0], [1, 2]]]))
    assert values == {}
    assert kl is None


def test_whitening_is_over_the_optimizer_batch_and_leaves_other_rows(stage):
    actors, config, _, experience, _ = stage({"advantage": {"whiten": True}})
    rows = [0, 1]
    found = prepared_advantages(experience, rows, config)
    mask = experience.scored.mask[rows]
    chosen = found[rows][mask]
    assert float(chosen.mean()) == pytest.approx(0, abs=1e-6)
    assert float(chosen.std()) == pytest.approx(1, rel=1e-5)
    assert torch.equal(found[[2, 3]], experience.advantages[[2, 3]])
    assert actors.rewards.functions == []


@pytest.mark.slow
def test_the_text_term_is_added_to_the_same_step_with_its_weight(stage, monkeypatch):
    texts = [[7, 8, 9, 10], [20, 21, 22]]
    found = {}
    for coef in (None, 1.0, 3.0):
        ptx = None if coef is None else {"data": "bundled:text", "tokens": 5, "coef": coef}
        made = stage({"ptx": ptx})
        caught = caught_gradients(made[0].policy, monkeypatch)
        values, _ = policy_step(made, texts if coef else ())
        found[coef] = (values, caught, made[0].policy.step_count)
    assert {steps for _, _, steps in found.values()} == {1}
    model, total = load_policy("tiny"), 0.0
    for ids in texts:
        table = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        total = total - table.gather(1, torch.tensor(ids[1:])[:, None]).sum() / 5
    total.backward()
    assert found[1.0][0]["ptx/loss"] == pytest.approx(float(total.detach()), rel=1e-5)
    for name, value in gradients(model).items():
        for coef in (1.0, 3.0):
            added = found[coef][1][f"lm.{name}"] - found[None][1][f"lm.{name}"]
            torch.testing.assert_close(added, coef * value, rtol=1e-3, atol=1e-5)


def test_a_step_that_is_not_finite_is_skipped_and_said(stage):
    actors, config, run, experience, plan = stage()
    bad = dataclasses.replace(experience, advantages=experience.advantages * torch.inf)
    before = {n: p.detach().clone() for n, p in actors.policy.model.named_parameters()}
    values, _ = policy_step((actors, config, run, bad, plan))
    assert "policy/grad_norm" not in values
    assert all(torch.equal(p, before[n]) for n, p in actors.policy.model.named_parameters())
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["model"]) for row in events] == [("skipped_step", "policy")]
