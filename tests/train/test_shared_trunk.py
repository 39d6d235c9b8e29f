"""Frozen blocks computed once for all roles: a run is the same to the bit, and less is computed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ppomax.models.trunk import Trunk, Trunks
from ppomax.train import actors, ppo_state, update
from ppomax.train.ppo import train_ppo
from ppomax.train.reward import train_reward

TIMES = ("time", "throughput/", "memory/")


def rows(run):
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)}
        for line in lines
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"epochs": 2, "minibatch_size": 2, "micro_tokens": 50},
        {"lora": {"rank": 2}, "gradient_checkpointing": True},
        {"kl": {"where": "loss", "estimator": "exact", "coef": 0.5, "exact_replies": 2}},
        {"dtype": "bfloat16", "buffer_iterations": 2},
    ],
    ids=str,
)
def test_with_and_without_a_shared_trunk_a_run_is_the_same_to_the_bit(
    change, small, tmp_path, monkeypatch
):
    reward = train_reward(small("reward", tmp_path / "reward", {"freeze_layers": 1}))
    change |= {"optim": {"lr": 1e-2}, "freeze_layers": 1}
    change |= {"reward": {"model": str(reward / "export")}, "critic": "reward"}
    roles, plain = [], Trunks.add

    def add(self, model):
        roles.append(self)
        plain(self, model)

    monkeypatch.setattr(Trunks, "add", add)
    shared = train_ppo(small("ppo", tmp_path / "shared", change))
    trunks, count = roles[0].each, len(roles)
    monkeypatch.setattr(actors, "Trunks", lambda _: Trunks(0))
    apart = train_ppo(small("ppo", tmp_path / "apart", change))
    assert rows(shared) == rows(apart)
    files = [load_file(run / "export" / "model.safetensors") for run in (shared, apart)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert count == (3 if change.get("lora") else 4)
    assert len(trunks) == (2 if change.get("dtype") == "bfloat16" else 1)
    assert all(len(trunk) for trunk in trunks), "nothing was remembered"


@pytest.mark.slow
def test_what_one_iteration_remembers_is_gone_in_the_next(small, tmp_path, monkeypatch):
    kept = []
    forget = Trunk.forget

    def spy(trunk):
        kept.append(len(trunk))
        forget(trunk)

    monkeypatch.setattr(Trunk, "forget", spy)
    train_ppo(small("ppo", tmp_path / "run", {"freeze_layers": 1, "iterations": 4}))
    assert kept[0] == 0
    assert max(kept) == max(kept[1:3]), "it grows from iteration to iteration"


def test_memory_that_runs_out_is_not_held_by_what_is_remembered(small, tmp_path, monkeypatch):
    kept, plain = [], update.clipped_policy_loss
    state = ppo_state.PPOState.fitted

    def fitted(self, step, work):
        def watched():
            kept.append((self.run.micro_tokens, sum(map(len, self.actors.trunks.each))))
            return work()

        return state(self, step, watched)

    def once(*args, **kwargs):
        monkeypatch.setattr(update, "clipped_policy_loss", plain)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ppo_state.PPOState, "fitted", fitted)
    monkeypatch.setattr(update, "clipped_policy_loss", once)
    train_ppo(small("ppo", tmp_path / "run", {"freeze_layers": 1, "micro_tokens": 64}))
    first = next(index for index, (micro, _) in enumerate(kept) if micro == 32)
    assert kept[first - 1][1] > 0
    assert kept[first] == (32, 0)
