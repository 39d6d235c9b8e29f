"""The forward that scoring keeps for the update: one less, and nothing else is different."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ppomax.models.heads import ScalarModel
from ppomax.models.language import LanguageModel
from ppomax.train import ppo, trainable
from ppomax.train.ppo import train_ppo

TIMES = ("time", "throughput/", "memory/")
EXACT = {"where": "loss", "estimator": "exact", "coef": 0.5}


def rows(run):
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)}
        for line in lines
    ]


@pytest.fixture
def graphs(monkeypatch):
    """Whether gradients were on in each forward of the policy, and in each of the critic."""
    seen = {LanguageModel: [], ScalarModel: []}
    for kind in seen:

        def spy(self, *args, kind=kind, plain=kind.forward, **kwargs):
            if any(p.requires_grad for p in self.parameters()):
                seen[kind].append(torch.is_grad_enabled())
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", spy)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"minibatch_size": 4},
        {"micro_tokens": 50, "epochs": 2},
        {"minibatch_size": 4, "freeze_layers": 1, "loss": {"entropy_coef": 0.1}},
        {"minibatch_size": 4, "lora": {"rank": 2}, "gradient_checkpointing": True},
        {"buffer_iterations": 2, "critic_pretraining": {"max_rollouts": 1}},
        {"kl": EXACT},
        {"minibatch_size": 4, "dtype": "bfloat16"},
        {"minibatch_size": 4, "epochs": 2, "buffer_iterations": 2},
        {"minibatch_size": 4, "kl": EXACT},
    ],
    ids=str,
)
def test_with_and_without_the_kept_forward_a_run_is_the_same_to_the_bit(
    change, small, tmp_path, monkeypatch, graphs
):
    change = {"optim": {"lr": 1e-2}} | change
    monkeypatch.setattr(ppo, "CHECKED_EVERY", 1)
    kept = train_ppo(small("ppo", tmp_path / "kept", change))
    every = {kind: len(seen) for kind, seen in graphs.items()}
    if change.get("minibatch_size") == 4 and "epochs" not in change:
        assert sum(graphs[ScalarModel]) == 2  # graphs, of one step in each of two iterations
    for seen in graphs.values():
        seen.clear()
    monkeypatch.setattr(trainable.Trainable, "keep", lambda *_: None)
    again = train_ppo(small("ppo", tmp_path / "again", change))
    assert rows(kept) == rows(again)
    assert all(row.get("policy/first_ratio_error", 0.0) == 0 for row in rows(again))
    files = [load_file(run / "export" / "model.safetensors") for run in (kept, again)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    saved = 0 if change.get("kl") else 2  # one in each of two iterations
    assert len(graphs[LanguageModel]) - every[LanguageModel] == saved
    whole = change.get("minibatch_size") == 4  # all replies, in one micro-batch
    assert len(graphs[ScalarModel]) - every[ScalarModel] == (saved if whole else 0)


@pytest.mark.slow
def test_a_forward_is_kept_for_its_rows_alone_and_given_once(small, tmp_path):
    seen = []
    config = small("ppo", tmp_path / "run", {"critic_pretraining": {"max_rollouts": 1}})
    plain, fitted = ppo.update, ppo.fit_critic

    def holds(state):
        return state.actors.policy._kept is not None

    def update(state, *args):
        seen.append(holds(state))
        plain(state, *args)
        seen.append(holds(state))

    def fit_critic(state, *args):
        seen.append(holds(state))
        fitted(state, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "CHECKED_EVERY", 2)
        patch.setattr(ppo, "update", update)
        patch.setattr(ppo, "fit_critic", fit_critic)
        train_ppo(config)
    assert seen == [False, False, False, True, False]  # the first iteration's is computed twice


def test_what_is_kept_goes_with_the_gradients():
    model = trainable.Trainable(
        "policy",
        torch.nn.Linear(2, 1),
        trainable.OptimSettings(lr=0.1),
        1,
        trainable.World(0, 1, torch.device("cpu")),
    )
    model.keep([1, 2], "found")
    assert model.kept([2, 1]) is None
    assert model.kept([1, 2]) == "found"
    assert model.kept([1, 2]) is None
    model.keep([1, 2], "found")
    model.drop_gradients()
    assert model.kept([1, 2]) is None
