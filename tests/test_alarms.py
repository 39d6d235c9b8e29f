"""Numerical alarms: each on its own row, none on a healthy one, once while it stands."""

import json
import math

import pytest

from ppomax.alarms import DEAD, LEAST, NumericalAlarms

HEALTHY = {
    "policy/loss": -0.01,
    "value/loss": 0.5,
    "policy/grad_norm": 1.0,
    "value/grad_norm": 2.0,
    "kl/ref_k1": 0.01,
    "kl/ref_k1_se": 0.005,
    "policy/ratio_max": 1.6,
    "policy/clip_fraction": 0.1,
    "engine/logprob_gap_mean": 1e-4,
    "engine/logprob_gap_max": 0.02,
    "value/explained_variance": 0.4,
}


def ready(plain=True):
    alarms = NumericalAlarms(plain=plain)
    for i in range(LEAST + 2):
        assert alarms.update(HEALTHY | {"value/loss": 0.5 + 0.1 * (i % 3)}) == []
    return alarms


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"reward/score_mean": math.nan}, "non_finite"),
        ({"policy/ratio_mean": math.inf}, "non_finite"),
        ({"value/loss": 6.1}, "spike_value_loss"),
        ({"policy/loss": -0.11}, "spike_policy_loss"),
        ({"policy/grad_norm": 10.1}, "spike_policy_grad_norm"),
        ({"value/grad_norm": 20.1}, "spike_value_grad_norm"),
        ({"kl/ref_k1": -0.0201}, "negative_kl"),
        ({"policy/ratio_max": 10.1}, "ratio_outlier"),
        ({"policy/clip_fraction": 0.81}, "clip_fraction"),
        ({"engine/logprob_gap_mean": 0.051}, "engine_gap"),
        ({"engine/logprob_gap_max": 1.01}, "engine_gap"),
    ],
)
def test_each_alarm_has_its_row_and_is_given_once(row, name):
    alarms = ready()
    assert [alarm.name for alarm in alarms.update(HEALTHY | row)] == [name]
    assert alarms.update(HEALTHY | row) == []  # it stands
    assert alarms.update(HEALTHY) == []
    assert [alarm.name for alarm in alarms.update(HEALTHY | row)] == [name]  # again


@pytest.mark.parametrize(
    "row",
    [
        {"value/loss": 4.9},
        {"policy/loss": 0.09},
        {"kl/ref_k1": -0.0199},
        {"policy/ratio_max": 10.0},
        {"value/explained_variance": -3.0},
    ],
)
def test_what_is_within_bounds_raises_nothing(row):
    assert ready().update(HEALTHY | row) == []


def test_with_another_sampler_any_negative_kl_is_a_mismatch():
    assert [a.name for a in ready(plain=False).update(HEALTHY | {"kl/ref_k1": -1e-6})] == [
        "sampler_mismatch"
    ]
    assert ready(plain=True).update(HEALTHY | {"kl/ref_k1": -1e-6}) == []


def test_a_critic_is_dead_after_many_rows_in_a_row():
    alarms = ready()
    dead = HEALTHY | {"value/explained_variance": -0.1}
    names = [[a.name for a in alarms.update(dead)] for _ in range(DEAD)]
    assert names == [[]] * (DEAD - 1) + [["dead_critic"]]
    alarms = ready()
    for i in range(3 * DEAD):
        assert alarms.update(HEALTHY if i % DEAD == DEAD - 1 else dead) == []


def test_a_spike_is_measured_by_the_rows_before_it():
    alarms = NumericalAlarms(plain=True)
    assert alarms.update({"value/loss": 1.0}) == []
    assert alarms.update({"value/loss": 100.0}) == []  # too few rows to say what is usual


def test_alarms_go_on_after_a_resume():
    alarms = ready()
    alarms.update(HEALTHY | {"policy/ratio_max": 11.0})
    again = NumericalAlarms(plain=True)
    again.load_state_dict(json.loads(json.dumps(alarms.state_dict())))
    rows = [HEALTHY | {"policy/ratio_max": 11.0}, HEALTHY | {"value/loss": 6.1}]
    assert [again.update(row) for row in rows] == [alarms.update(row) for row in rows]
