"""The monitors of a run: alarms with evidence, stop, rollback, tracking, what is exported."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ppomax.checkpoint import path_of, verify
from ppomax.data.template import ChatTemplate
from ppomax.errors import ConfigError
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.train import ppo, ppo_export, tracking
from ppomax.train.monitor_settings import MonitorSettings
from ppomax.train.ppo import train_ppo
from ppomax.train.tracking import against, load_tracked
from ppomax.train.watching import Watch

TIMES = ("time", "throughput/", "memory/")
RED = {"max_kl": 1e-9}
"""The first iteration's KL is 0, every later one's is above."""
RED_AT_ONCE = {"max_length_share": 0.01}


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(run):
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMES)}
        for row in jsonl(run / "metrics.jsonl")
    ]


def events(run, kind):
    return [row for row in jsonl(run / "events.jsonl") if row["kind"] == kind]


def exported(run):
    return load_policy(str(run / "export")).state_dict()


def weights(run, number):
    return load_file(run / "checkpoints" / f"step-{number:06d}" / "policy.safetensors")


def same(exported, saved):
    return all(
        torch.equal(value, exported[name.removeprefix("lm.")]) for name, value in saved.items()
    )


def second_by_length(prompts, responses, *, ids, metadata):
    """A second scorer that likes the short."""
    return [-float(len(text)) for text in responses]


@pytest.mark.slow
def test_an_alarm_is_an_event_with_its_evidence_and_training_goes_on(small, tmp_path):
    change = {"iterations": 4, "monitor": RED}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    (alarm,) = events(run, "alarm_red")
    assert (alarm["step"], alarm["before"], alarm["level"]) == (2, "green", "red")
    assert "max_kl" in alarm["limits"][0]
    assert [row["step"] for row in alarm["samples_before"]] == [1] * 4
    assert [row["step"] for row in alarm["samples_now"]] == [2] * 4
    assert all("response" in row for row in alarm["samples_now"])
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_stop_ends_there_and_exports_the_last_green_state(small, tmp_path):
    change = {"iterations": 6, "monitor": RED | {"action": "stop"}, "checkpoint": {"every": 1}}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    assert [row["step"] for row in rows(run)] == [1, 2]
    assert events(run, "monitor_stop")[0]["step"] == 2
    assert events(run, "export")[0]["checkpoint"] == 1
    assert same(exported(run), weights(run, 1))
    assert not same(exported(run), weights(run, 2))
    assert train_ppo(small("ppo", tmp_path / "run", change), resume=True) == run
    assert len(rows(run)) == 2  # the end stays the end


@pytest.mark.slow
def test_a_rollback_restores_raises_the_constraint_and_does_not_repeat_itself(small, tmp_path):
    change = {
        "iterations": 5,
        "kl": {"coef": 0.03},
        "monitor": RED
        | {"action": "rollback", "max_rollbacks": 2, "lr_factor": 0.5, "kl_factor": 3.0},
        "checkpoint": {"every": 1, "keep_last": 1},
    }
    run = train_ppo(small("ppo", tmp_path / "run", change))
    found = rows(run)
    # 1 is green, 2 is red: back to the checkpoint of 1; then 2 again as a new attempt
    assert [(row["attempt"], row["step"]) for row in found] == [(0, 1), (0, 2), (1, 2), (2, 2)]
    back = events(run, "rollback")
    assert [(e["step"], e["to"], e["rollbacks"], e["left"]) for e in back] == [
        (2, 1, 1, 1),
        (2, 1, 2, 0),
    ]
    assert [row["kl/coef"] for row in found] == pytest.approx([0.03, 0.03, 0.09, 0.27])
    rates = [row["policy/lr"] for row in found]
    assert rates == pytest.approx([rates[0], rates[0], rates[0] / 2, rates[0] / 4])
    # the same policy and prompts, other replies
    assert found[1]["reward/score_mean"] != found[2]["reward/score_mean"]
    assert len(events(run, "monitor_stop")) == 1
    assert same(exported(run), weights(run, 1))


@pytest.mark.slow
def test_a_coefficient_of_zero_rises_to_the_least(small, tmp_path):
    change = {
        "iterations": 2,
        "kl": {"coef": 0.0},
        "monitor": RED | {"action": "rollback", "max_rollbacks": 1},
    }
    run = train_ppo(small("ppo", tmp_path / "run", change))
    assert [row["kl/coef"] for row in rows(run)] == pytest.approx([0.0, 0.0, 0.05, 0.05])
    assert events(run, "rollback")[0]["to"] == 0  # nothing green later: the beginning
    (export,) = events(run, "export")
    assert (export["checkpoint"], export["why"]) == (
        0,
        "last green one; it is still the policy PPO began with",
    )
    assert same(exported(run), weights(run, 0))


@pytest.mark.slow
def test_a_run_killed_after_a_rollback_goes_on_as_if_it_had_not_been(small, tmp_path, monkeypatch):
    """The state gone back to is the critic's, and holds what the detector learned of SFT."""
    monkeypatch.setitem(sys.modules, "tests_second", sys.modules[__name__])
    track = {"every": 1, "callable": "tests_second:second_by_length"}
    change = {
        "iterations": 5,
        "heldout": 0.6,
        "critic_pretraining": {"max_rollouts": 1},
        "monitor": RED_AT_ONCE | {"action": "rollback", "max_rollbacks": 2, "track": track},
        "checkpoint": {"every": 1},
    }
    whole = train_ppo(small("ppo", tmp_path / "whole", change))
    plain = ppo.collect

    def dies(state, stage, step):
        if state.run.attempt == 1:
            raise KeyboardInterrupt
        return plain(state, stage, step)

    config = small("ppo", tmp_path / "killed", change)
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "collect", dies)
        with pytest.raises(KeyboardInterrupt):
            train_ppo(config)
    killed = train_ppo(config, resume=True)
    assert rows(killed) == rows(whole)
    assert same(exported(killed), exported(whole))
    assert events(whole, "rollback")[0]["to"] == 0
    tracked = jsonl(killed / "heldout.jsonl")
    assert [row["step"] for row in tracked] == [0, 1, 1, 1]  # SFT once, then three attempts
    number = events(whole, "rollback")[0]["checkpoint"]
    state = verify(path_of(whole / "checkpoints", number)).state
    learned = state["watch"]["detector"]["rows"]
    assert len(learned) == len(tracked[0]["baseline"]) + 1, "held-out replies, a critic's rollout"
    for row in rows(killed)[1:]:
        pairs = list(
            zip(tracked[row["attempt"] + 1]["seconds"], tracked[0]["seconds"], strict=True)
        )
        assert row["heldout/win"] == sum(a > b for a, b in pairs) / len(pairs)
        assert row["heldout/score_w1"] > 0  # against itself it would be 0


@pytest.mark.slow
def test_tracked_prompts_are_answered_first_by_sft_then_every_few_iterations(small, tmp_path):
    change = {
        "iterations": 5,
        "heldout": 0.6,
        "monitor": {
            "track": {"every": 2, "callable": "tests_second:second_by_length"},
        },
        "checkpoint": {"every": 1},
    }
    sys.modules["tests_second"] = sys.modules[__name__]
    run = train_ppo(small("ppo", tmp_path / "run", change))
    tracked = jsonl(run / "heldout.jsonl")
    assert [row["step"] for row in tracked] == [0, 2, 4, 5]
    keys = [{key for key in row if key.startswith("heldout/")} for row in rows(run)]
    assert [bool(found) for found in keys] == [False, True, False, True, True]
    last = rows(run)[-1]
    pairs = list(zip(tracked[-1]["seconds"], tracked[0]["seconds"], strict=True))
    assert last["heldout/win"] == sum(a > b for a, b in pairs) / len(pairs)
    assert last["heldout/win"] + last["heldout/tie"] + last["heldout/lose"] == pytest.approx(1)
    means = {row["step"]: sum(row["seconds"]) / len(pairs) for row in tracked[1:]}
    best = max(means, key=lambda step: (means[step], step))
    assert same(exported(run), weights(run, best))


@pytest.mark.slow
def test_a_run_killed_after_sft_answered_the_tracked_prompts_asks_it_once(
    small, tmp_path, monkeypatch
):
    change = {
        "iterations": 1,
        "heldout": 0.6,
        "critic_pretraining": {"max_rollouts": 1},
        "monitor": {"track": {"every": 1}},
    }
    whole = train_ppo(small("ppo", tmp_path / "whole", change))
    plain = ppo.begin

    def dies(state, stage, step):
        if stage == "ppo":
            raise KeyboardInterrupt
        return plain(state, stage, step)

    config = small("ppo", tmp_path / "killed", change)
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "begin", dies)
        with pytest.raises(KeyboardInterrupt):
            train_ppo(config)
    assert len(jsonl(config.out / "heldout.jsonl")) == 1
    killed = train_ppo(config, resume=True)
    assert jsonl(killed / "heldout.jsonl") == jsonl(whole / "heldout.jsonl")
    assert rows(killed) == rows(whole)
    assert [row["kind"] for row in jsonl(killed / "events.jsonl")] == [
        row["kind"] for row in jsonl(whole / "events.jsonl")
    ]


def test_tracked_prompts_come_from_every_file_alike(tiny, tmp_path):
    files = []
    for name in "ab":
        files.append(tmp_path / f"{name}.jsonl")
        lines = [json.dumps({"id": f"{name}{i}", "prompt": f"{name} {i}?"}) for i in range(60)]
        files[-1].write_text("\n".join(lines) + "\n")
    data = [{"path": str(file)} for file in files]
    settings = MonitorSettings(track={"prompts": 10, "data": data}).track
    config = SimpleNamespace(max_bad_rows=0.0, max_prompt=64)
    actors = SimpleNamespace(template=ChatTemplate(load_tokenizer(tiny)))
    found = load_tracked(config, settings, actors)
    assert [prompt.row.id[0] for prompt in found] == ["a"] * 5 + ["b"] * 5
    assert [prompt.index for prompt in found] == list(range(0, 120, 12))


def test_prompts_and_a_second_reward_model_of_ones_own(small, small_data, small_reward, tmp_path):
    track = {"data": small_data["prompts"], "prompts": 3, "model": small_reward}
    change = {"iterations": 1, "monitor": {"track": track}}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    tracked = jsonl(run / "heldout.jsonl")
    assert [len(row["scores"]) for row in tracked] == [3, 3]
    for row in tracked:  # here the second scorer is the proxy itself
        assert row["seconds"] == pytest.approx(row["scores"], abs=1e-5)


class Events:
    """What a watch tells its run."""

    stage = "ppo"

    def __init__(self):
        self.told = []

    def event(self, kind, **fields):
        self.told.append({"kind": kind, **fields})

    def record(self, kind, text, **fields):
        self.event(kind, text=text, **fields)


def watch_of(**changes):
    sampling = SimpleNamespace(max_new_tokens=64, is_plain=True)
    return Watch(SimpleNamespace(sampling=sampling), MonitorSettings(**changes), Events())


WELL = {
    "policy/perplexity": 5.0,
    "kl/ref_k3": 0.01,
    "response/length_mean": 30.0,
    "response/distinct_2": 0.95,
}
COLLAPSED = {
    "policy/perplexity": 1.5,
    "kl/ref_k3": 2.0,
    "response/length_mean": 64.0,
    "response/distinct_2": 0.3,
}


def test_collapsed_rows_that_the_level_has_not_followed_yet_are_neither_good_nor_evidence():
    """`patience` rows pass before the level rises: none of them is a place to go back to."""
    watch = watch_of(action="rollback", keep_green=9)
    for step in range(1, 16):
        row = WELL if step <= 12 else COLLAPSED
        verdict = watch.judge(step, row, [{"step": step, "response": "x"}], unchanged=False)
        if verdict == "go":
            watch.checkpointed(step, None)
    assert (verdict, watch.green[-1]) == ("rollback", 12)
    (alarm,) = [event for event in watch.run.told if event["kind"] == "alarm_red"]
    assert [row["step"] for row in alarm["samples_before"]] == [12]
    assert [row["step"] for row in alarm["samples_now"]] == [15]


@pytest.mark.parametrize(
    ("action", "well", "green", "seconds", "restored", "words"),
    [
        ("stop", True, [3], {}, None, None),
        ("stop", False, [3], {}, 3, "last green one"),
        ("log", False, [3], {}, None, "checkpoint 3 was the last that was"),
        ("log", True, [3], {3: 0.1}, 3, "best by the second scorer"),
        ("stop", False, [2], {}, 2, "last green one; it is still the policy PPO began with"),
        ("rollback", False, [2], {}, 2, "last green one; it is still the policy PPO began with"),
        ("log", False, [2], {}, None, "no green checkpoint of a trained policy was kept"),
        ("stop", False, [], {}, None, "no green checkpoint of a trained policy was kept"),
    ],
)
def test_what_is_exported(action, well, green, seconds, restored, words, monkeypatch):
    """After 2 critic rollouts and 3 iterations; checkpoints are named by the sum."""
    watch = watch_of(action=action)
    watch.well, watch.green, watch.seconds = well, green, seconds
    put = []
    policy = SimpleNamespace(restore=put.append)
    monkeypatch.setattr(ppo_export, "read", lambda state, number: number)
    ppo_export.take_best(
        SimpleNamespace(
            watch=watch,
            config=SimpleNamespace(monitor=watch.settings),
            run=watch.run,
            actors=SimpleNamespace(policy=policy),
            number=5,
            iteration=3,
            critic_rollouts=2,
        )
    )
    assert put == ([] if restored is None else [restored])
    told = " ".join(f"{event.get('why')} {event.get('note')}" for event in watch.run.told)
    assert (words or "") in told
    assert bool(told) == (words is not None)


def test_the_newest_green_checkpoints_are_kept_and_the_best_one():
    watch = watch_of(keep_green=2)
    seconds = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.2}
    kept = [watch.checkpointed(number, second) for number, second in seconds.items()]
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
    assert watch.exported() == 2
    watch.clean = False
    assert watch.checkpointed(6, 5.0) == [2, 4, 5]  # not green: however good, no candidate
    assert watch.exported() == 2
    watch.went_back(4)
    assert (watch.green, watch.exported()) == ([4], 2)


def test_without_a_second_scorer_the_last_green_checkpoint_is_exported():
    watch = watch_of()
    assert watch.exported() is None
    for number in (1, 2, 3):
        watch.checkpointed(number, None)
    assert watch.exported() == 3


@pytest.mark.slow
def test_the_same_policy_ties_with_itself_on_tracked_prompts(small, tmp_path):
    still = {"lr": 1e-30, "grad_clip": 0.5}
    change = {
        "iterations": 2,
        "heldout": 0.6,
        "optim": still,
        "monitor": {"track": {"every": 1, "callable": "tests_second:second_by_length"}},
    }

    sys.modules["tests_second"] = sys.modules[__name__]
    run = train_ppo(small("ppo", tmp_path / "run", change))
    first, *later = [row["scores"] for row in jsonl(run / "heldout.jsonl")]
    assert all(row == pytest.approx(first, abs=1e-6) for row in later)
    assert rows(run)[-1]["heldout/tie"] == 1.0
    assert rows(run)[-1]["heldout/score_w1"] == pytest.approx(0, abs=1e-6)


def test_a_score_that_is_missing_counts_in_no_comparison():
    nan = float("nan")
    found = against([1.0, nan, 3.0, 2.0], [0.0, 0.0, nan, 2.0], [False] * 4)
    assert found == {
        "heldout/second_mean": 2.0,
        "heldout/win": 0.5,
        "heldout/tie": 0.5,
        "heldout/lose": 0.0,
    }


@pytest.mark.parametrize("kept", [True, False])
def test_replies_are_compared_with_the_sft_models_where_a_checkpoint_has_them(kept):
    tracker = SimpleNamespace(sft={"scores": [1.0, 1.0], "seconds": [1.0, 1.0]})
    if kept:
        tracker.sft["responses"] = [[5, 6], [7]]
    rollout = SimpleNamespace(responses=[[5, 6], [8]])
    found = tracking.Round(rollout, ["a", "b"], [1.0, 1.0], [1.1, 1.1], [2.0, 1.0])
    values = tracking.Tracker.measure(tracker, found)
    assert (values["heldout/win"], values["heldout/tie"]) == ((0.5, 0.5) if kept else (1.0, 0.0))


def test_a_reply_that_is_the_sft_models_own_ties_whatever_its_score_was_rounded_to():
    found = against([1.0, 2.0], [1.0 - 1e-7, 2.0 - 1e-7], [True, False])
    assert (found["heldout/tie"], found["heldout/win"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl_factor": 3.0}, "kl_factor has no effect without action: rollback"),
        ({"action": "rollback", "kl_factor": None}, "needs kl_factor or lr_factor"),
        ({"track": {"model": "a", "callable": "b:c"}}, "not both"),
    ],
)
def test_settings_without_effect_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        MonitorSettings(**settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kl": None, "monitor": {"max_kl": 1.0}}, "max_kl needs the reference"),
        ({"kl": None, "monitor": {"action": "rollback"}}, "kl_factor has no effect"),
        ({"monitor": {"track": {}}}, "needs prompts"),
        ({"heldout": 0.01, "monitor": {"track": {}}}, "held-out prompts found"),
    ],
)
def test_monitors_that_have_nothing_to_work_with_are_refused(small, tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        train_ppo(small("ppo", tmp_path / "run", change))


@pytest.mark.slow
def test_tracked_prompts_are_answered_in_smaller_micro_batches_where_memory_is_short(
    small, tmp_path, monkeypatch
):
    plain, refused = tracking.score_rows, []

    def short(model, rows, pad, config, here):
        if config.micro_tokens > 100:
            refused.append(config.micro_tokens)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, rows, pad, config, here)

    monkeypatch.setattr(tracking, "score_rows", short)
    base = small("ppo", tmp_path / "x")
    track = {"every": 1, "model": base.reward.model}
    change = {"iterations": 1, "heldout": 0.6, "micro_tokens": 200, "monitor": {"track": track}}
    run = train_ppo(small("ppo", tmp_path / "run", change))
    assert refused == [200]
    assert [row["step"] for row in jsonl(run / "heldout.jsonl")] == [0, 1]
    assert events(run, "out_of_memory")[0]["now"] == 100
