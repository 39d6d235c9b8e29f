"""What an evaluation claims, on preferences whose true score function is known."""

import numpy as np
import pytest

from ppomax.eval.preference import evaluate_pairs
from ppomax.report import write_preference_report
from ppomax.report.page import MAX_BYTES
from ppomax.report.verdict import preference_verdict


def judged(gap, good_length, bad_length, text="word ", **more):
    n = len(gap)
    return evaluate_pairs(
        gap,
        np.zeros(n),
        good_length,
        bad_length,
        [{"kind": ("a", "b")[i % 2]} for i in range(n)],
        ids=[f"pair-{i}" for i in range(n)],
        prompts=[[{"role": "user", "content": f"question {i} {text}"}] for i in range(n)],
        chosen=[text] * n,
        rejected=[text + "other"] * n,
        **more,
    )


def preferences(seed, n=1500):
    """True quality gaps and lengths of pairs, turned so that the preferred answer comes first.

    People prefer by sigmoid(quality); longer answers are better a little more often.
    """
    generator = np.random.default_rng(seed)
    quality = 1.5 * generator.normal(size=n)
    length = np.exp(0.25 * quality + 0.6 * generator.normal(size=n))
    sign = np.where(generator.random(n) < 1 / (1 + np.exp(-quality)), 1, -1)
    first, second = np.round(40 * length) + 1, np.full(n, 41.0)
    swap = sign < 0
    return quality * sign, np.where(swap, second, first), np.where(swap, first, second)


@pytest.mark.slow
def test_after_temperature_a_model_of_the_truth_is_calibrated_within_the_noise():
    inside, before = 0, 0
    for seed in range(20):
        gap, *_ = preferences(seed)
        found = judged(3 * gap, np.full(len(gap), 9.0), np.full(len(gap), 9.0))["calibration"]
        assert found["temperature"] == pytest.approx(3, rel=0.25)
        inside += found["ece_at_temperature"] <= found["ece_at_temperature_noise_p95"]
        before += found["ece"] <= found["ece_noise_p95"]
    assert inside >= 17, "the band holds 95% of what perfect calibration shows"
    assert before == 0, "three times too sure is outside it"


@pytest.mark.slow
def test_a_model_that_learned_only_length_is_shown_as_such(tmp_path):
    _, good, bad = preferences(0)
    found = judged(0.05 * (good - bad), good, bad)
    verdict = preference_verdict(found)
    assert verdict["tone"] != "good"
    assert found["accuracy"]["ci95"][0] > 0.5, "though it beats a coin"
    assert verdict["warnings"][0].startswith("It follows length: it prefers the longer answer in")
    assert (
        "Not shown to be better than the rule alone that the longer answer wins"
        in (verdict["warnings"])
    )
    page = write_preference_report(found, tmp_path / "report.html").read_text()
    assert "It follows length" in page
    rates = {row["longer"]: row["accuracy"] for row in found["length"]["when"]}
    assert (rates["preferred answer"], rates["other answer"]) == (1, 0)
    assert found["length"]["given_preference_correlation"] > 0.99
    shorter = preference_verdict(judged(0.05 * (bad - good), good, bad))
    assert "prefers the shorter answer" in shorter["warnings"][0]
    assert shorter["tone"] == "bad"


def test_a_model_that_learned_the_truth_is_called_good():
    gap, good, bad = preferences(0)
    found = judged(gap, good, bad, likelihoods=(-good, -bad))
    verdict = preference_verdict(found)
    assert verdict["tone"] == "good"
    assert verdict["warnings"] == []
    assert len(verdict["points"]) == 4, "each rule with the difference and its interval"
    assert all("right more often by" in point for point in verdict["points"])
    noted = preference_verdict(found | {"notes": ["No likelihood baseline"]})
    assert (noted["tone"], noted["points"][-1]) == ("good", "No likelihood baseline")
    fed = preference_verdict(found | {"warnings": ["12 pairs were trained on"]})
    assert (fed["tone"], fed["warnings"]) == ("unclear", ["12 pairs were trained on"])


def test_a_likelihood_per_token_is_of_the_tokens_of_the_model_that_gave_it():
    gap, good, bad = preferences(0)
    likelihoods = (-3.0 * good, -bad)
    own = judged(gap, good, bad, likelihoods=likelihoods, likelihood_tokens=(good * 4, bad))
    plain = judged(gap, good, bad, likelihoods=likelihoods)
    told = [one["baselines"]["likelier per token wins"]["accuracy"] for one in (own, plain)]
    assert told == [1.0, 0.0]  # -3/4 of a nat against -1, and -3


@pytest.mark.slow
def test_a_page_of_long_texts_needs_nothing_else_and_keeps_to_its_size(tmp_path):
    gap, good, bad = preferences(1, n=60)
    one = judged(gap, good, bad, text="很长的文字 <b>" * 40_000) | {"model": "one"}
    report = {"kind": "comparison", "models": [one, one | {"model": "two"}], "comparisons": []}
    for found in (one, report):
        page = write_preference_report(found, tmp_path / "report.html").read_bytes()
        assert len(page) <= MAX_BYTES < 5 * 2**20
        text = page.decode()
        assert not any(word in text for word in ("http://www.w3.org/1999/xlink", "<script", "src="))
        assert "@media print" in text
        assert "<pattern" in text, "histograms differ in hatching, not in colour alone"
