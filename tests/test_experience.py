"""Scores and log-probs to per-token rewards; KL estimates and coefficients."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from ppomax.errors import ConfigError
from ppomax.experience import (
    AdaptiveKL,
    AdaptivePenalty,
    FixedKL,
    ensemble_mean,
    ensemble_mean_minus_variance,
    ensemble_min,
    ensemble_std,
    kl_penalty,
    missing_eos_scores,
    perplexity,
    reparameterize_scores,
    reparameterize_steps,
    sequence_kl,
    token_rewards,
    weighted_scores,
)

examples = settings(max_examples=20, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 5))
NAN = math.nan
ESTIMATORS = ("k1", "k2", "k3")


def _case(seed: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, log-probs, reference log-probs and a prefix mask (empty rows included)."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, ref = -5 * torch.rand((2, *size), generator=generator, dtype=torch.float64)
    scores = torch.randn(size[0], generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, size[1] + 1, (size[0],), generator=generator)
    return scores, logprobs, ref, torch.arange(size[1]) < lengths[:, None]


# --- KL estimates


def test_three_estimates_of_one_log_ratio():
    # r = ref - logp = -1 - (-3) = 2: k1 = -2, k2 = 2, k3 = e^2 - 3; the second token is padding
    logprobs, ref = tensor([[-3.0, NAN]]), tensor([[-1.0, -1.0]])
    mask = tensor([[True, False]])
    expected = {"k1": -2.0, "k2": 2.0, "k3": math.e**2 - 3}
    for estimator, number in expected.items():
        result = kl_penalty(logprobs, ref, mask, estimator=estimator)
        torch.testing.assert_close(result, tensor([[number, 0.0]]))


def test_k3_keeps_its_digits_near_zero():
    # e^r - 1 - r = r^2 / 2 + r^3 / 6 + ...; computed as it is written, float32 has no digit right
    r = tensor([[1e-4, -1e-4, 1e-6, 0.0]])
    k3 = kl_penalty(-r, torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), estimator="k3")
    assert torch.all(k3 >= 0)
    torch.testing.assert_close(k3[0, :2], tensor([5.00017e-9, 4.99983e-9]), rtol=2e-2, atol=0)
    assert k3[0, 3] == 0


@examples
@given(seeds, sizes)
def test_estimates_agree_with_plain_python_and_two_are_never_negative(seed: int, size):
    _, logprobs, ref, mask = _case(seed, size)
    ratios = (ref - logprobs).tolist()
    oracles = {
        "k1": lambda r: -r,
        "k2": lambda r: r**2 / 2,
        "k3": lambda r: math.exp(r) - 1 - r,
    }
    for estimator, oracle in oracles.items():
        result = kl_penalty(logprobs, ref, mask, estimator=estimator)
        expected = tensor([[oracle(r) for r in row] for row in ratios], dtype=torch.float64)
        torch.testing.assert_close(result, torch.where(mask, expected, 0.0))
        assert estimator == "k1" or torch.all(result >= 0)


def test_the_estimate_is_k1_unless_said():
    logprobs, ref, mask = tensor([[-3.0]]), tensor([[-1.0]]), tensor([[True]])
    assert kl_penalty(logprobs, ref, mask).tolist() == [[-2.0]]


def test_the_gradient_of_each_estimate():
    # d/dlogp: k1 1, k2 -r, k3 1 - e^r, at r = 2; nothing at padding
    for estimator, slope in {"k1": 1.0, "k2": -2.0, "k3": 1 - math.e**2}.items():
        logprobs = tensor([[-3.0, NAN]], requires_grad=True)
        mask = tensor([[True, False]])
        kl_penalty(logprobs, tensor([[-1.0, NAN]]), mask, estimator=estimator).sum().backward()
        torch.testing.assert_close(logprobs.grad, tensor([[slope, 0.0]]))


def test_an_unknown_estimator_is_refused_outside_of_tests_too():
    unchecked = getattr(kl_penalty, "__wrapped__", kl_penalty)
    with pytest.raises(ConfigError, match="k4"):
        unchecked(torch.zeros(1, 1), torch.zeros(1, 1), tensor([[True]]), estimator="k4")


def test_sequence_kl_adds_up_each_response():
    logprobs = tensor([[-1.0, -2.0, NAN], [NAN] * 3])
    ref = tensor([[-2.0, -4.0, 0.0], [0.0] * 3])
    mask = tensor([[True, True, False], [False] * 3])
    assert sequence_kl(logprobs, ref, mask).tolist() == [3.0, 0.0]  # (2 - 1) + (4 - 2)


def test_perplexity_is_the_exponential_of_the_mean_nll_of_response_tokens():
    # log-probs ln 1/2 and ln 1/8: geometric mean 1/4
    logprobs = tensor([[math.log(1 / 2), math.log(1 / 8), NAN]])
    assert perplexity(logprobs, tensor([[True, True, False]])).item() == pytest.approx(4)
    assert perplexity(logprobs, tensor([[False] * 3])).item() == 1


# --- scores


def test_scores_are_normalised_then_clipped():
    # (5 - 1) / 2 = 2, (-9 - 1) / 2 = -5 -> -3, (11 - 1) / 2 = 5 -> 3
    scores = tensor([5.0, -9.0, 11.0])
    assert reparameterize_scores(scores, mean=1, std=2, clip=3).tolist() == [2.0, -3.0, 3.0]
    assert reparameterize_scores(scores, mean=1, std=2, clip=None).tolist() == [2.0, -5.0, 5.0]


def test_each_part_of_the_reparameterization_can_be_off():
    scores = tensor([5.0, -9.0])
    assert reparameterize_scores(scores).tolist() == [5.0, -9.0]
    assert reparameterize_scores(scores, mean=None, std=2.0, clip=None).tolist() == [2.5, -4.5]
    assert reparameterize_scores(scores, mean=1.0, std=None, clip=None).tolist() == [4.0, -10.0]
    assert reparameterize_scores(scores, mean=None, std=None, clip=6.0).tolist() == [5.0, -6.0]
    assert reparameterize_scores(scores, mean=0.0, std=1.0, clip=0.5).tolist() == [0.5, -0.5]


@examples
@given(seeds, st.floats(-5, 5), st.floats(0.1, 5), st.floats(0.1, 3))
def test_reparameterized_scores_agree_with_plain_python(seed: int, mean, std, clip):
    scores, *_ = _case(seed, (4, 1))
    expected = [max(-clip, min((score - mean) / std, clip)) for score in scores.tolist()]
    result = reparameterize_scores(scores, mean=mean, std=std, clip=clip)
    torch.testing.assert_close(result, tensor(expected, dtype=torch.float64))


def test_scaled_step_rewards_are_clipped_one_by_one_and_never_shifted():
    steps = tensor([[4.0, 0.0, -9.0]])
    assert reparameterize_steps(steps, std=2, clip=3).tolist() == [[2.0, 0.0, -3.0]]
    assert reparameterize_steps(steps, std=2).tolist() == [[2.0, 0.0, -4.5]]
    assert reparameterize_steps(steps, clip=5.0).tolist() == [[4.0, 0.0, -5.0]]
    assert reparameterize_steps(steps).tolist() == [[4.0, 0.0, -9.0]]


def test_scores_of_several_sources_are_added_up_by_weight():
    # 2 * 1 - 3 and 2 * -1 - 5; one source that sets a reply aside does so for all
    scores = tensor([[1.0, -1.0, NAN], [3.0, 5.0, 1.0]])
    found = weighted_scores(scores, tensor([2.0, -1.0]))
    assert found[:2].tolist() == [-1.0, -7.0]
    assert torch.isnan(found[2])


def test_an_ensemble_of_two_members():
    # means 2 and 5, variances ((1 - 2)² + (3 - 2)²) / 2 = 1 and 0
    scores = tensor([[1.0, 5.0], [3.0, 5.0]])
    assert ensemble_mean(scores).tolist() == [2.0, 5.0]
    assert ensemble_min(scores).tolist() == [1.0, 5.0]
    assert ensemble_mean_minus_variance(scores, coef=0.25).tolist() == [1.75, 5.0]
    assert ensemble_std(scores).tolist() == [1.0, 0.0]


ENSEMBLES = {
    "mean": (ensemble_mean, lambda x, mean, var: mean),
    "min": (ensemble_min, lambda x, mean, var: min(x)),
    "penalised": (
        lambda scores: ensemble_mean_minus_variance(scores, coef=0.7),
        lambda x, mean, var: mean - 0.7 * var,
    ),
    "std": (ensemble_std, lambda x, mean, var: math.sqrt(var)),
}


@pytest.mark.parametrize("kind", ENSEMBLES)
@examples
@given(seed=seeds, size=sizes)
def test_an_ensemble_agrees_with_plain_python_in_any_order_of_members(kind, seed, size):
    formula, oracle = ENSEMBLES[kind]
    scores = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = []
    for column in scores.T.tolist():
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        expected.append(oracle(column, mean, variance))
    wanted = tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(formula(scores), wanted)
    torch.testing.assert_close(formula(scores.flip(0)), wanted)
    scores[-1, -1] = NAN
    assert torch.isnan(formula(scores)).tolist() == [False] * (size[1] - 1) + [True]


def test_a_reply_that_never_ended_pays_the_penalty():
    scores, truncated = tensor([1.0, 2.0]), tensor([True, False])
    assert missing_eos_scores(scores, truncated, penalty=3.0).tolist() == [-2.0, 2.0]
    assert missing_eos_scores(scores, truncated, penalty=None).tolist() == [1.0, 2.0]


# --- rewards


def test_rewards_of_a_full_a_short_and_an_empty_row():
    # -0.5 * (logp - ref): -0.5 * 1 and -0.5 * -2, the score on top of the last response token
    logprobs = tensor([[-1.0, -3.0], [-1.0, NAN], [NAN, NAN]])
    ref = tensor([[-2.0, -1.0], [-2.0, NAN], [NAN, NAN]])
    mask = tensor([[True, True], [True, False], [False, False]])
    rewards = token_rewards(tensor([10.0, 20.0, NAN]), logprobs, ref, mask, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 11.0], [19.5, 0.0], [0.0, 0.0]]


def test_step_rewards_are_added_token_by_token():
    zeros, mask = torch.zeros(1, 3), tensor([[True, True, False]])
    step = tensor([[1.0, 2.0, NAN]])
    rewards = token_rewards(tensor([10.0]), zeros, zeros, mask, kl_coef=0.1, step_rewards=step)
    assert rewards.tolist() == [[1.0, 12.0, 0.0]]


def test_without_a_reference_the_coefficient_must_be_zero():
    logprobs, mask = torch.full((1, 2), -7.0), tensor([[True, True]])
    rewards = token_rewards(tensor([3.0]), logprobs, None, mask, kl_coef=0)
    assert rewards.tolist() == [[0.0, 3.0]]
    for kl_coef in (0.05, -0.05, 1):
        with pytest.raises(ConfigError, match="kl_coef"):
            token_rewards(tensor([3.0]), logprobs, None, mask, kl_coef=kl_coef)


@examples
@given(seeds, sizes, st.floats(0, 1))
def test_rewards_agree_with_plain_python(seed: int, size: tuple[int, int], kl_coef: float):
    scores, logprobs, ref, mask = _case(seed, size)
    expected = torch.zeros(size, dtype=torch.float64)
    for row in range(size[0]):
        length = int(mask[row].sum())
        for t in range(length):
            expected[row, t] = -kl_coef * (logprobs[row, t] - ref[row, t])
            expected[row, t] += scores[row] if t == length - 1 else 0
    rewards = token_rewards(scores, logprobs, ref, mask, kl_coef=kl_coef)
    torch.testing.assert_close(rewards, expected)


def test_rewards_are_constants():
    one, mask = torch.ones(1, 1, requires_grad=True), tensor([[True]])
    assert not token_rewards(one[0], one, one, mask, kl_coef=0.1).requires_grad


# --- coefficients


def test_an_adaptive_coefficient_moves_towards_its_target():
    # kl 1.1 of 1.0: error 0.1; 500 of 1000 replies: 2 * (1 + 0.1 / 2) = 2.1
    controller = AdaptiveKL(2.0, target_per_token=1.0, horizon=1000)
    controller.update(1.1, 500)
    assert controller.coef == pytest.approx(2.1)
    controller.update(0.9, 500)
    assert controller.coef == pytest.approx(2.1 * 0.95)


def test_one_update_changes_the_coefficient_by_a_fifth_at_most():
    for kl, factor in ((100.0, 1.2), (-100.0, 0.8), (0.0, 0.8)):
        for num_steps in (1000, 100_000):
            controller = AdaptiveKL(1.0, target_per_sequence=4, horizon=1000)
            controller.update(kl, num_steps)
            assert controller.coef == pytest.approx(factor)


def test_a_kl_on_target_leaves_the_coefficient_alone():
    controller = AdaptiveKL(0.05, target_per_sequence=6.0)
    controller.update(6, 64)
    assert controller.coef == 0.05


def test_the_target_is_a_number_in_the_unit_its_name_says():
    token, sequence = AdaptiveKL(1.0, target_per_token=0.02), AdaptiveKL(1, target_per_sequence=6)
    assert (token.unit, token.target) == ("token", 0.02)
    assert (sequence.unit, sequence.target) == ("sequence", 6)


def test_the_horizon_is_ten_thousand_replies_unless_said():
    controller = AdaptiveKL(1.0, target_per_token=1.0)
    controller.update(2.0, 100)
    assert controller.coef == pytest.approx(1 + 0.2 / 100, rel=1e-12)


@pytest.mark.parametrize(
    "targets",
    [
        {},
        {"target_per_token": 1.0, "target_per_sequence": 1.0},
        {"target_per_token": 0.0},
        {"target_per_sequence": -1.0},
    ],
)
def test_no_target_two_targets_or_one_not_above_zero_are_refused(targets: dict[str, float]):
    with pytest.raises(ConfigError, match="kl target"):
        AdaptiveKL(1.0, **targets)


def test_a_controller_s_state_went_through_json_and_goes_on():
    for make in (lambda: AdaptiveKL(0.1, target_per_token=0.02), lambda: FixedKL(0.1)):
        controller, resumed = make(), make()
        controller.update(0.5, 300)
        resumed.coef = 77.0
        resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
        assert resumed.coef == controller.coef
        assert controller.state_dict() == {"coef": controller.coef}


def test_a_fixed_coefficient_stays():
    controller = FixedKL(0.05)
    controller.update(100.0, 10_000)
    assert controller.coef == 0.05


# --- the coefficient of PPO-penalty


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.059, 1.5), (0.0599999, 1.5), (0.0600001, 3.0), (0.1349, 3.0), (0.1351, 6.0), (9.0, 6.0)],
)
def test_the_penalty_halves_below_two_thirds_of_its_target_and_doubles_above_three_halves(
    kl, expected
):
    penalty = AdaptivePenalty(3.0, target=0.09)
    penalty.update(kl)
    assert penalty.coef == expected


def test_a_penalty_without_a_target_stays_and_its_state_comes_back():
    penalty = AdaptivePenalty(3.0)
    penalty.update(1e9)
    penalty.update(0.0)
    assert penalty.state_dict() == {"coef": 3.0}
    other = AdaptivePenalty(1.0, target=0.5)
    other.load_state_dict({"coef": 0.25})
    assert (other.coef, other.target) == (0.25, 0.5)


@pytest.mark.parametrize("kl", [1.0, 1.5, 2.25])
def test_at_the_edges_of_its_band_and_inside_the_penalty_stays(kl):
    penalty = AdaptivePenalty(3.0, target=1.5)  # numbers that 1.5 divides and multiplies exactly
    penalty.update(kl)
    assert penalty.coef == 3.0
