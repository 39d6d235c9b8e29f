"""Schedules worked by hand, AdamW against its formula, settings that make no sense refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from ppomax.train.optim import OptimSettings, build_optimizer, learning_rate, set_learning_rate

SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")


def settings(**changes):
    return OptimSettings(**{"lr": 1.0, **changes})


def test_warm_up_rises_in_a_straight_line_to_the_peak():
    # 10 steps, 40% warm-up: 1/4, 2/4, 3/4, 4/4, then flat
    rates = [learning_rate(settings(warmup=0.4), step, 10) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_and_cosine_go_to_the_floor():
    linear = settings(schedule="linear", floor=0.2)
    assert [learning_rate(linear, step, 4) for step in range(4)] == pytest.approx(
        [1.0, 0.8, 0.6, 0.4]
    )
    cosine = settings(schedule="cosine", floor=0.2)
    # 0.2 + 0.8 (1 + cos(pi/4 k)) / 2
    assert [learning_rate(cosine, step, 4) for step in range(4)] == pytest.approx(
        [1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5))]
    )


def test_inverse_sqrt_is_the_peak_after_warm_up_and_half_of_it_at_four_times_that_step():
    inverse = settings(schedule="inverse_sqrt", warmup=0.1)
    assert learning_rate(inverse, 9, 100) == 1.0
    assert learning_rate(inverse, 39, 100) == pytest.approx(0.5)
    assert learning_rate(settings(schedule="inverse_sqrt"), 3, 100) == pytest.approx(0.5)


@given(
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.floats(0, 0.99),
    floor=st.floats(0, 1),
    total=st.integers(1, 400),
    step=st.integers(0, 2000),
)
def test_a_rate_is_never_negative_nor_above_the_peak_however_long_a_critic_trains(
    schedule, warmup, floor, total, step
):
    chosen = settings(
        schedule=schedule, warmup=warmup, floor=floor if schedule in ("linear", "cosine") else 0.0
    )
    rate = learning_rate(chosen, step, total)
    assert 0 <= rate <= 1 + 1e-12
    if step > total:  # past the end nothing rises again
        assert rate <= learning_rate(chosen, max(step - 1, total), total) + 1e-12
        assert rate >= chosen.floor - 1e-12


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"warmup": 1.0},
        {"floor": 1.5},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"betas": (0.9,)},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"grad_clip": 0.0},
        {"schedule": "step"},
        {"floor": 0.1},
        {"floor": 0.1, "schedule": "inverse_sqrt"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_or_have_no_effect_are_refused(change):
    with pytest.raises(ValidationError):
        settings(**change)


def test_the_first_step_is_adamws_and_frozen_parameters_are_left_alone():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(requires_grad=False)
    before = model.weight.detach().clone()
    chosen = settings(lr=0.1, eps=1e-3, weight_decay=0.5, betas=(0.9, 0.95))
    optimizer = build_optimizer(model, chosen)
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(1, 2)]
    gradient = torch.tensor([[0.3, -0.002]])
    model.weight.grad = gradient.clone()
    set_learning_rate(optimizer, 0.2)
    optimizer.step()
    # bias correction makes the first step g / (|g| + eps); decay is decoupled
    expected = before * (1 - 0.2 * 0.5) - 0.2 * gradient / (gradient.abs() + 1e-3)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_moments_are_fp32_whatever_the_models_dtype_is_not():
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, settings())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    kinds = {v.dtype for state in optimizer.state.values() for v in state.values()}
    assert kinds == {torch.float32}
