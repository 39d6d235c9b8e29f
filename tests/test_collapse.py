"""The collapse detector: deviations by hand, levels with hysteresis, limits, resume."""

import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppomax.collapse import (
    CAP,
    SIGNALS,
    CollapseDetector,
    DetectorSettings,
    deviation,
    nth_largest,
)

HEALTHY = {
    "policy/perplexity": 4.0,
    "kl/ref_k3": 0.0,
    "response/length_mean": 20.0,
    "reward/score_skew": 0.0,
    "response/distinct_2": 0.9,
    "response/repetition_4": 0.05,
    "response/truncated_share": 0.0,
}
COLLAPSED = {
    "policy/perplexity": 1.2,
    "kl/ref_k3": 1.0,
    "response/length_mean": 60.0,
    "reward/score_skew": 3.0,
    "response/distinct_2": 0.3,
    "response/repetition_4": 0.6,
    "response/truncated_share": 0.8,
}


def ready(**changes):
    detector = CollapseDetector(DetectorSettings(baseline=4, **changes), max_new_tokens=64)
    for wobble in (-0.5, 0.5, -0.5, 0.5):
        detector.update(HEALTHY | {"response/length_mean": 20.0 + wobble})
    return detector


def test_a_deviation_by_hand():
    # median 20, absolute deviations 0 1 1 2 4: MAD 1, so one deviation is 1.4826
    assert deviation(26.0, [18, 19, 20, 21, 24], 0.0) == pytest.approx(6 / 1.4826)
    # a floor of 3, or of a fifth of the median, is larger than the spread
    assert deviation(26.0, [18, 19, 20, 21, 24], 3.0) == pytest.approx(2.0)
    assert deviation(26.0, [18, 19, 20, 21, 24], 3.0, 0.2) == pytest.approx(1.5)


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=12), st.floats(-100, 100))
def test_one_wild_row_moves_the_yardstick_little(known, value):
    plain = deviation(value, [*known, statistics.median(known)], 1.0)
    wild = deviation(value, [*known, 1e9], 1.0)
    assert abs(wild) <= abs(plain) + abs(value) + 200  # bounded whatever the outlier: no mean in it


def test_signals_count_in_the_direction_that_is_bad():
    detector = ready()
    assert all(z > 8 for z in detector.deviations(COLLAPSED).values())
    mirrored = {key: 2 * HEALTHY[key] - value for key, value in COLLAPSED.items()}
    assert all(z < -8 for z in detector.deviations(mirrored).values())
    assert set(detector.deviations(COLLAPSED)) == {signal.key for signal in SIGNALS}


def test_the_score_is_the_deviation_that_enough_signals_reach():
    assert nth_largest([1.0, 9.0, 5.0, 7.0], 3) == 5.0
    assert nth_largest([1.0, 9.0], 3) == 0.0


def test_red_needs_several_signals_and_several_rows():
    detector = ready(votes=3, patience=3)
    two = HEALTHY | {"response/length_mean": 60.0, "kl/ref_k3": 1.0}
    assert {detector.update(two).level for _ in range(10)} == {"green"}
    levels = [detector.update(COLLAPSED).level for _ in range(4)]
    assert levels == ["green", "green", "red", "red"]


def test_a_level_is_harder_to_leave_than_to_enter():
    detector = ready(votes=1, amber=4, red=8, patience=1, calm=2, release=0.5)

    def row(z):  # one deviation of the length is 5% of 20 tokens
        return HEALTHY | {"response/length_mean": 20.0 + z}

    seen = [detector.update(row(z)).level for z in (3, 5, 3, 3, 3, 9, 5, 5, 3, 3, 1, 1)]
    assert seen == [
        *("green", "amber", "amber", "amber", "amber"),  # 3 is below 4 but not below 2
        *("red", "red", "red"),  # 5 is not below 4
        *("red", "amber", "amber", "green"),
    ]
    assert detector.level == "green"


def test_the_judgement_says_when_the_level_rose():
    detector = ready(patience=1)
    first, second = detector.update(COLLAPSED), detector.update(COLLAPSED)
    assert (first.before, first.level, first.rose) == ("green", "red", True)
    assert (second.before, second.rose) == ("red", False)


def test_rows_of_the_beginning_are_the_baseline_and_are_not_judged():
    detector = CollapseDetector(DetectorSettings(baseline=3), max_new_tokens=64)
    for _ in range(3):
        found = detector.update(COLLAPSED)
        assert (found.level, found.deviations) == ("green", {})
    assert detector.update(COLLAPSED).score == 0.0


def test_later_rows_never_enter_a_full_baseline():
    detector = ready()
    rows = [dict(row) for row in detector.rows]
    for _ in range(20):
        detector.update(COLLAPSED)
    assert detector.rows == rows


@pytest.mark.parametrize(
    ("limit", "row", "word"),
    [
        ({"max_kl": 0.3}, {"kl/ref_k3": 0.31}, "max_kl"),
        ({"max_kl": 0.3}, {"kl/ref_k3": float("nan")}, "max_kl"),
        ({"max_length_share": 0.5}, {"response/length_mean": 32.5}, "max_length_share"),
    ],
)
def test_a_hard_limit_is_red_at_once_even_without_a_baseline(limit, row, word):
    detector = CollapseDetector(DetectorSettings(**limit), max_new_tokens=64)
    assert detector.update(HEALTHY).level == "green"
    found = detector.update(HEALTHY | row)
    assert found.level == "red"
    assert word in found.limits[0]
    assert len(detector.rows) == 1  # nothing beyond a limit is normal


def test_what_is_not_finite_is_as_far_out_as_can_be():
    detector = ready()
    assert detector.deviations({"policy/perplexity": float("nan")}) == {"policy/perplexity": CAP}


def test_a_resumed_detector_judges_as_one_that_never_stopped():
    rows = [HEALTHY | {"response/length_mean": 20.0 + i % 5} for i in range(6)]
    rows += [COLLAPSED] * 3 + [HEALTHY] * 6
    for cut in range(len(rows)):
        whole, first = (
            CollapseDetector(DetectorSettings(baseline=4), max_new_tokens=64) for _ in range(2)
        )
        expected = [whole.update(row) for row in rows]
        found = [first.update(row) for row in rows[:cut]]
        second = CollapseDetector(DetectorSettings(baseline=4), max_new_tokens=64)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert found + [second.update(row) for row in rows[cut:]] == expected


def test_red_must_lie_above_amber():
    with pytest.raises(ValueError, match="red 3 must be above amber 4"):
        DetectorSettings(amber=4, red=3)
