"""Tasks whose optimum is known: PPO arrives there, noise does not.

The policy's vocabulary is in effect two tokens, `a` and `b`: a model made here gives every other
one a probability below 1e-12. With a KL penalty of weight eta towards the reference, the best
policy of one-token replies is pi ~ pi_ref exp(r / eta).
"""

import json
import math

import pytest
import torch

from ppomax.data.template import ChatTemplate
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.models.tiny import tiny_model
from ppomax.train.ppo import train_ppo
from ppomax.types import Message

pytestmark = pytest.mark.slow
PRIOR = 0.3
"""Of `a`, the better token, before training."""
ETA = 0.5


@pytest.fixture(scope="module")
def coin(tiny, tmp_path_factory):
    """A model that says `a` with probability 0.3 and else `b`, its prompt and its scores."""
    folder = tmp_path_factory.mktemp("coin")
    tokenizer = load_tokenizer(tiny)
    model = tiny_model(
        vocab_size=len(tokenizer), hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate=32,
        tied=False,
    )  # fmt: skip
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    scale = math.sqrt(32)  # of the first hidden unit after the norm, whatever was said before
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, 0] = -30 / scale
        model.lm_head.weight[a, 0] = math.log(PRIOR) / scale
        model.lm_head.weight[b, 0] = math.log(1 - PRIOR) / scale
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text('{"prompt": "a or b?"}\n')
    (folder / "coin_scores.py").write_text(
        "import hashlib\n\n\n"
        "def share(prompts, responses, *, ids, metadata):\n"
        "    return [text.count('a') / len(text) for text in responses]\n\n\n"
        "def noise(prompts, responses, *, ids, metadata):\n"
        "    key = ' '.join(responses)\n"
        "    digests = [hashlib.sha256(f'{key}{i}'.encode()) for i in range(len(responses))]\n"
        "    return [digest.digest()[0] / 255 for digest in digests]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


ADAM = {"lr": 1e-2, "schedule": "linear", "grad_clip": 1.0}
CRITIC = {"critic": "policy", "critic_optim": ADAM}


def settings(small, coin, out, changes):
    base = {
        "model": str(coin / "model"),
        "data": str(coin / "prompts.jsonl"),
        "reward": {"callable": "coin_scores:share", "normalise": None, "clip": None},
        "max_prompt": 32,
        "freeze_embeddings": True,
        "optim": ADAM,
        "checkpoint": {"every": 1000},
        "log": {"samples": 0},
    }
    return small("ppo", out, base | changes)


def chances(folder, coin):
    """Probabilities of the first token of a reply, over the vocabulary."""
    template = ChatTemplate(load_tokenizer(str(coin / "model")))
    ids = template.prompt([Message(role="user", content="a or b?")])
    with torch.no_grad():
        logits = load_policy(str(folder))(torch.tensor([ids])).logits[0, -1]
    return logits.double().softmax(0)


def share_of_a(folder, coin):
    tokenizer = load_tokenizer(str(coin / "model"))
    return float(chances(folder, coin)[tokenizer.convert_tokens_to_ids("a")])


def towards_reference(prior):
    """argmax of p - ETA KL(pi || ref): pi_ref exp(r / ETA), normalised; `a` alone has r = 1."""
    odds = prior / (1 - prior) * math.exp(1 / ETA)
    return odds / (1 + odds)


def from_reference(prior):
    """argmax of p - ETA KL(ref || pi): p (1 - p) = ETA (p - prior)."""
    half = (1 - ETA) / 2
    return half + math.sqrt(half**2 + ETA * prior)


LOSS = {"coef": ETA, "where": "loss"}
KL = {
    "k1 in the reward": ({"coef": ETA}, towards_reference),
    "k2 as a loss": (LOSS | {"estimator": "k2"}, towards_reference),
    "k3 as a loss": (LOSS | {"estimator": "k3"}, from_reference),
    "the exact KL as a loss": (LOSS | {"estimator": "exact"}, towards_reference),
}
"""Each way of charging the KL, and the share of `a` that it is best to have under it."""


def test_the_two_directions_of_the_kl_have_optima_that_can_be_told_apart():
    assert towards_reference(PRIOR) - from_reference(PRIOR) > 0.04
    assert from_reference(PRIOR) - PRIOR > 0.4


@pytest.mark.parametrize("name", KL)
def test_the_bandits_closed_form_optimum_is_reached(name, coin, small, tmp_path):
    kl, best = KL[name]
    change = {"sampling": {"max_new_tokens": 1}, "iterations": 60, "kl": kl} | CRITIC
    change |= {"rollout_size": 256, "minibatch_size": 256}
    run = train_ppo(settings(small, coin, tmp_path / "run", change))
    after, expected = share_of_a(run / "export", coin), best(share_of_a(coin / "model", coin))
    assert float(chances(run / "export", coin).topk(2).values.sum()) > 1 - 1e-6
    distance = abs(after - expected)  # the total variation: no other token has a share
    print(f"\n{name}: {after:.4f} for {expected:.4f}, total variation {distance:.4f}")
    assert distance < 0.02


ESTIMATORS = {
    "gae": CRITIC,
    "reinforce": {"advantage": {"estimator": "reinforce"}},
    **{
        name: {"advantage": {"estimator": name}, "rollout_size": 8, "samples_per_prompt": 4}
        for name in ("rloo", "grpo", "reinforce_baseline")
    },
}
STEPS, LONG_ETA = 4, 0.05
PLATEAU = 1 / (1 + (1 - PRIOR) / PRIOR * math.exp(-1 / (STEPS * LONG_ETA)))
"""Share of `a` in four-token replies at the optimum: each token is a coin with a reward of 1/4."""
THRESHOLD = 0.85


def mean_score(coin, small, out, estimator, seed, scores="share"):
    """Mean score of the last iterations."""
    change = {
        "seed": seed,
        "iterations": 20,
        "rollout_size": 32,
        "minibatch_size": 16,
        "sampling": {"max_new_tokens": STEPS},
        "kl": {"coef": LONG_ETA},
        "reward": {"callable": f"coin_scores:{scores}", "normalise": None, "clip": None},
    }
    run = train_ppo(settings(small, coin, out, change | ESTIMATORS[estimator]))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows, sum(row["reward/score_mean"] for row in rows[-5:]) / 5


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_estimator_learns_what_can_be_learned(estimator, seed, coin, small, tmp_path):
    rows, found = mean_score(coin, small, tmp_path / "run", estimator, seed)
    print(f"\n{estimator}, seed {seed}: {rows[0]['reward/score_mean']:.3f} -> {found:.3f}")
    assert rows[0]["reward/score_mean"] < 0.5
    assert PLATEAU > 0.98
    assert found > THRESHOLD


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_noise_in_the_place_of_a_score_stays_below_the_threshold(estimator, coin, small, tmp_path):
    run = tmp_path / "run"
    mean_score(coin, small, run, estimator, 0, scores="noise")
    assert share_of_a(run / "export", coin) < THRESHOLD - 0.1
