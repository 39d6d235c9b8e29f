"""Shapes of scores and replies: by hand, against slower ways, over a resume."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from ppomax.eval.statistics import clustered_standard_error
from ppomax.train.observe import score_metrics
from ppomax.train.shape import (
    FIT,
    ScoreShape,
    clustered_error,
    correlation,
    excess_kurtosis,
    skewness,
    top_opening_share,
    wasserstein_1,
)


class Holder:
    """Stands for a record that has just these fields."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


def numbers(seed, count):
    return torch.from_numpy(np.random.default_rng(seed).gamma(2.0, size=count))


def test_kurtosis_is_scipys():
    x = numbers(0, 50)
    assert excess_kurtosis(x) == pytest.approx(scipy.stats.kurtosis(x.numpy()))
    assert excess_kurtosis(torch.ones(5, dtype=torch.float64)) == 0.0


def test_skewness_is_scipys_by_the_same_moments_as_kurtosis():
    x = numbers(0, 8)
    expected = scipy.stats.skew(x.numpy())
    assert skewness(x) == pytest.approx(expected)
    assert score_metrics(x)["reward/score_skew"] == pytest.approx(expected)
    assert skewness(torch.ones(5, dtype=torch.float64)) == 0.0


@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 7), (5, 12), (40, 3)])
def test_the_distance_of_two_score_distributions_is_scipys(m, n):
    a, b = numbers(1, m), numbers(2, n) + 0.5
    expected = scipy.stats.wasserstein_distance(a.numpy(), b.numpy())
    assert wasserstein_1(a, b) == pytest.approx(expected)
    assert wasserstein_1(b, a) == pytest.approx(expected)
    assert wasserstein_1(a, a) == 0.0


def test_a_shift_is_the_distance():
    a = numbers(3, 20)
    assert wasserstein_1(a, a + 2.5) == pytest.approx(2.5)


def test_correlation_of_score_and_length():
    x, y = numbers(4, 30), numbers(5, 30)
    assert correlation(x, y) == pytest.approx(np.corrcoef(x.numpy(), y.numpy())[0, 1])
    assert correlation(x, torch.ones_like(x)) == 0.0


def test_the_most_frequent_opening():
    assert top_opening_share([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 9], [1, 2]]) == 0.5


def test_the_error_of_k1_is_that_of_responses_not_of_tokens():
    lengths = [3, 5, 1, 4]
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    logprobs = torch.from_numpy(np.random.default_rng(6).normal(size=(4, 5)).astype("float32"))
    ref = torch.zeros_like(logprobs)
    found = clustered_error(Holder(logprobs=logprobs, ref_logprobs=ref, mask=mask))
    clusters = [row for row, n in enumerate(lengths) for _ in range(n)]
    flat = logprobs[mask].double().numpy()
    assert found == pytest.approx(clustered_standard_error(flat, clusters), rel=1e-5)
    garbage = torch.where(mask, logprobs, torch.nan)
    assert found == clustered_error(Holder(logprobs=garbage, ref_logprobs=ref, mask=mask))


def experience(seed, responses=((1, 2), (3, 4, 5), (6,))):
    lengths = torch.tensor([len(r) for r in responses])
    mask = torch.arange(3)[None] < lengths[:, None]
    scored = Holder(
        mask=mask,
        scores=numbers(seed, len(responses)).float(),
        logprobs=torch.zeros(mask.shape),
        ref_logprobs=torch.zeros(mask.shape),
    )
    return Holder(scored=scored, rollout=Holder(responses=[list(r) for r in responses]))


def rows(shape, span):
    found = []
    for i in span:
        values = {"kl/ref_sequence": 0.1 * i, "reward/score_mean": math.sin(i)}
        found.append(shape.measure(experience(i), values, unchanged=i < 2))
    return found


def test_the_residual_is_the_score_less_the_line_through_the_rows_before():
    found = rows(ScoreShape(), range(15))
    x = np.sqrt(0.1 * np.arange(15))
    y = np.sin(np.arange(15))
    for i, row in enumerate(found):
        if i < FIT:
            assert "reward/sqrt_kl_residual" not in row
        else:
            slope, level = np.polyfit(x[:i], y[:i], 1)
            assert row["reward/sqrt_kl_residual"] == pytest.approx(y[i] - slope * x[i] - level)


def test_scores_are_compared_with_those_of_the_unchanged_policy():
    shape = ScoreShape()
    found = rows(shape, range(4))
    assert found[0]["reward/score_w1"] == 0.0
    first = torch.cat([experience(i).scored.scores for i in (0, 1)])
    assert found[3]["reward/score_w1"] == pytest.approx(
        scipy.stats.wasserstein_distance(experience(3).scored.scores, first)
    )


def test_a_resumed_shape_measures_the_same():
    whole, part = ScoreShape(), ScoreShape()
    expected = rows(whole, range(15))
    found = rows(part, range(6))
    again = ScoreShape()
    again.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert found + rows(again, range(6, 15)) == expected


def test_a_reply_set_aside_counts_nowhere():
    one = experience(3)
    one.scored.mask[1] = False
    one.scored.scores[1] = torch.nan
    values = {"kl/ref_sequence": 0.0, "reward/score_mean": 0.0}
    found = ScoreShape().measure(one, values, unchanged=True)
    assert all(math.isfinite(value) for value in found.values())
    assert found["response/top_opening_share"] == 0.5
