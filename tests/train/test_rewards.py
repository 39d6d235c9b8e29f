"""Scores from Python functions: sync and async, None, wrong answers, retries, the clock."""

import asyncio
import json
import math
import sys
import threading
import time
from collections import deque

import numpy as np
import pytest
import torch

from ppomax.errors import ConfigError, TrainingError
from ppomax.train.estimates import normalised_scores
from ppomax.train.ppo import train_ppo
from ppomax.train.ppo_config import RewardSettings
from ppomax.train.rewards import call, load_callable

PROMPTS = [({"role": "user", "content": "a"},), ({"role": "user", "content": "b"},)]


def ask(scorer, timeout=5.0, retries=0, responses=("one", "three")):
    return call(
        scorer,
        PROMPTS,
        list(responses),
        ["p1", "p2"],
        [{"lang": "en"}, {}],
        timeout=timeout,
        retries=retries,
    )


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of reward functions and return its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text, name="rewards_in_test"):
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        return name

    yield write
    sys.modules.pop("rewards_in_test", None)


# --- one call


def test_it_gets_lists_of_messages_texts_ids_and_metadata():
    seen = {}

    def scorer(prompts, responses, *, ids, metadata):
        seen.update(prompts=prompts, responses=responses, ids=ids, metadata=metadata)
        return [float(len(text)) for text in responses]

    assert ask(scorer) == [3.0, 5.0]
    assert seen == {
        "prompts": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]],
        "responses": ["one", "three"],
        "ids": ["p1", "p2"],
        "metadata": [{"lang": "en"}, {}],
    }


def test_it_may_be_async():
    async def scorer(prompts, responses, *, ids, metadata):
        await asyncio.sleep(0)
        return [1, 2]

    assert ask(scorer) == [1.0, 2.0]


def test_none_becomes_nan():
    found = ask(lambda *_, **__: [None, 2.5])
    assert math.isnan(found[0])
    assert found[1] == 2.5


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([1.0], "2 scores wanted, found 1"),
        ([1.0, 2.0, 3.0], "2 scores wanted, found 3"),
        (None, "2 scores wanted, found NoneType"),
        (1.0, "2 scores wanted, found float"),
        ([math.inf, 0.0], "infinite"),
        (["good", 0.0], "could not convert"),
        ("ab", "2 scores wanted, found str"),
        ({"p1": 1.0, "p2": 2.0}, "2 scores wanted, found dict"),
        (np.ones((2, 1)), "one number each wanted for scores"),
        (torch.tensor(1.0), "2 scores wanted, found Tensor"),
        ([1e39, 0.0], "infinite"),
        ([10**400, 0.0], "too large"),
    ],
    ids=str,
)
def test_what_is_not_one_number_per_reply_stops_the_run(answer, text):
    with pytest.raises(TrainingError, match=text) as caught:
        ask(lambda *_, **__: answer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        (1, 2.5),
        np.array([1, 2.5], dtype=np.float32),
        torch.tensor([1, 2.5], requires_grad=True),
        torch.tensor([1, 2.5], dtype=torch.bfloat16),
        [np.float64(1), torch.tensor(2.5)],
        deque([True, 2.5]),
        {1: 1.0, 2: 2.5}.values(),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_any_sequence_of_numbers_is_an_answer(answer):
    assert ask(lambda *_, **__: answer) == [1.0, 2.5]


def test_nan_in_an_array_sets_a_reply_aside_as_none_does():
    found = ask(lambda *_, **__: np.array([np.nan, 2.0]))
    assert math.isnan(found[0])
    assert found[1] == 2.0


def test_it_is_tried_again_after_an_error_and_no_more_than_asked():
    tries = []

    def fails(times):
        def scorer(prompts, responses, *, ids, metadata):
            tries.append(1)
            if len(tries) <= times:
                raise ConnectionError("line busy")
            return [0.0, 1.0]

        return scorer

    assert ask(fails(2), retries=2) == [0.0, 1.0]
    assert len(tries) == 3
    tries.clear()
    with pytest.raises(
        TrainingError, match=r"last: ConnectionError: line busy \(.*test_rewards\.py:\d+\)"
    ):
        ask(fails(9), retries=2)
    assert len(tries) == 3


def test_the_clock_ends_a_call_and_no_thread_keeps_the_process_alive():
    before = {thread for thread in threading.enumerate() if not thread.daemon}
    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"failed 1 times, last: no answer within 0\.1 s"):
        ask(lambda *_, **__: time.sleep(20), timeout=0.1)
    assert time.monotonic() - began < 5
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= before


def test_a_call_that_does_not_end_is_not_called_again_beside_itself():
    tries = []

    def scorer(prompts, responses, *, ids, metadata):
        tries.append(1)
        time.sleep(20)

    with pytest.raises(
        TrainingError, match=r"still running 0\.1 s later; it is abandoned, and not"
    ):
        ask(scorer, timeout=0.1, retries=3)
    assert len(tries) == 1


def test_a_slow_try_may_be_followed_by_a_good_one_once_it_has_ended():
    running, most = [], []

    def scorer(prompts, responses, *, ids, metadata):
        running.append(1)
        most.append(len(running))
        if len(most) == 1:
            time.sleep(0.6)
        running.pop()
        return [0.0, float(len(most))]

    assert ask(scorer, timeout=0.4, retries=1) == [0.0, 2.0], "the late answer is not used"
    assert most == [1, 1]


def test_a_late_coroutine_is_cancelled_and_tried_again():
    seen = []

    async def scorer(prompts, responses, *, ids, metadata):
        seen.append("begun")
        try:
            await asyncio.sleep(0 if seen.count("begun") == 2 else 20)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return [1.0, 2.0]

    assert ask(scorer, timeout=0.3, retries=1) == [1.0, 2.0]
    assert seen == ["begun", "cancelled", "begun"]


def test_a_functions_own_timeout_is_an_error_like_any_other():
    def scorer(prompts, responses, *, ids, metadata):
        raise TimeoutError("the judge's server")

    with pytest.raises(TrainingError, match="last: TimeoutError: the judge's server"):
        ask(scorer)


# --- finding it


def test_it_is_found_by_module_and_function(module):
    name = module("def f(*a, **k): return [1.0]\ndef reward(*a, **k): return [2.0]\nNUMBER = 3\n")
    assert load_callable(f"{name}:f", "s")() == [1.0]
    assert load_callable(name, "s")() == [2.0]


@pytest.mark.parametrize(
    "name",
    ["no_such_module:f", "json:no_such_function", "json:__name__", ":f", "", "a b:c", ".x:f"],
)
def test_one_that_cannot_be_found_is_one_line_that_names_the_setting(name):
    with pytest.raises(ConfigError, match=r"setting ppo\.reward\.callable") as caught:
        load_callable(name, "ppo.reward.callable")
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_python_is_one_line_too(module):
    name = module("def f(:\n")
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_callable(f"{name}:f", "s")


# --- in a run

LOGS = """
import json, pathlib
CALLS = []
def length(prompts, responses, *, ids, metadata):
    CALLS.append((prompts, responses, ids, metadata))
    return [float(len(text)) for text in responses]
async def later(prompts, responses, *, ids, metadata):
    return length(prompts, responses, ids=ids, metadata=metadata)
def second_none(prompts, responses, *, ids, metadata):
    scores = length(prompts, responses, ids=ids, metadata=metadata)
    return [None if i == CALLS[0][2][1] else score for i, score in zip(ids, scores)]
def all_none(prompts, responses, *, ids, metadata):
    return [None] * len(ids)
def broken(prompts, responses, *, ids, metadata):
    raise RuntimeError("no")
"""


def called(small, out, name, **changes):
    change = {"critic": "policy", "reward": {"callable": name, "normalise": None, "clip": None}}
    return small("ppo", out, change | changes)


@pytest.mark.slow
def test_a_run_is_scored_by_it_sync_or_async(module, small, tmp_path):
    name = module(LOGS)
    rows = []
    for function in ("length", "later"):
        out = train_ppo(called(small, tmp_path / function, f"{name}:{function}"))
        found = jsonl(out / "metrics.jsonl")
        rows.append(
            [
                {k: v for k, v in r.items() if not k.startswith(("time", "thr", "mem"))}
                for r in found
            ]
        )
        samples = jsonl(out / "samples.jsonl")
        assert all(row["score"] == len(row["response"]) for row in samples)
    assert rows[0] == rows[1]
    prompts, _, ids, metadata = sys.modules[name].CALLS[0]
    assert prompts[0][-1]["role"] == "user"
    assert metadata[0] in ({"lang": "en"}, {"lang": "zh"})
    assert len(set(ids)) == 4


def test_a_reply_set_aside_teaches_nothing_and_moves_no_moment(module, small, tmp_path):
    name = module(LOGS)
    change = {"iterations": 1, "minibatch_size": 4, "log": {"samples": 4}}
    out = train_ppo(called(small, tmp_path / "run", f"{name}:second_none", **change))
    events = [row for row in jsonl(out / "events.jsonl") if row["kind"] == "quarantined"]
    samples = jsonl(out / "samples.jsonl")
    gone = [row["id"] for row in samples if row["score"] is None]
    assert [row["id"] for row in events] == gone
    assert len(gone) == 1
    assert events[0]["step"] == 1
    kept = [row["score"] for row in samples if row["score"] is not None]
    row = jsonl(out / "metrics.jsonl")[0]
    assert row["reward/score_mean"] == pytest.approx(sum(kept) / 3)
    assert all(math.isfinite(value) for key, value in row.items() if key != "stage")
    state = json.loads((max((out / "checkpoints").iterdir()) / "state.json").read_text())
    assert state["moments"]["count"] == 3
    assert state["moments"]["mean"] == pytest.approx(sum(kept) / 3)


def test_when_every_reply_is_set_aside_the_run_stops_and_says_so(module, small, tmp_path):
    name = module(LOGS)
    with pytest.raises(TrainingError, match="all 4 replies of ppo rollout 1 are set aside"):
        train_ppo(called(small, tmp_path / "run", f"{name}:all_none"))


def test_a_function_that_keeps_failing_stops_the_run_with_its_words(module, small, tmp_path):
    config = called(small, tmp_path / "run", f"{module(LOGS)}:broken")
    with pytest.raises(TrainingError, match="failed 3 times, last: RuntimeError: no"):
        train_ppo(config)
    assert not (tmp_path / "run" / "done.json").exists()


def test_the_missing_eos_penalty_is_taken_after_the_clip():
    from ppomax.normalise import RunningMoments

    moments = RunningMoments()
    scores = torch.tensor([0.0, 2.0, 40.0])
    moments.update(scores)
    settings = RewardSettings(model="m", clip=0.5, missing_eos_penalty=1.0)
    found = normalised_scores(scores, torch.tensor([True, False, True]), moments, settings)
    # mean 14, std 22.5: -0.62, -0.53, 1.15 -> -0.5, -0.5, 0.5 -> minus 1 where truncated
    assert found.tolist() == pytest.approx([-1.5, -0.5, -0.5])
