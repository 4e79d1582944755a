"""Steps saved by complete schedules: by hand, by properties, and against a known truth."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from normuon_lab.study.statistics import estimates
from normuon_lab.study.statistics.estimates import bootstrap_interval, paired_test
from normuon_lab.study.statistics.schedules import (
    StepsSaved,
    falling_fit,
    steps_saved_by_schedules,
    steps_saved_to_threshold,
    steps_to_reach,
)

LENGTHS = [250, 315, 400, 500, 630]
losses = st.lists(st.floats(1.0, 5.0), min_size=2, max_size=6)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (3.0, 100.0),  # on a point
        (2.5, 200.0),  # half-way in log(steps): sqrt(100 * 400)
        (1.5, 800.0),
        (1.0, 1600.0),
        (3.1, -math.inf),  # the shortest is below already
        (0.9, math.inf),  # never
    ],
)
def test_crossing_by_hand(target: float, expected: float) -> None:
    found = float(steps_to_reach([100, 400, 1600], np.array([3.0, 2.0, 1.0]), target))
    assert found == pytest.approx(expected, rel=1e-12)


@given(losses)
def test_the_falling_fit_is_scipys_isotonic_regression(values: list[float]) -> None:
    expected = isotonic_regression(values, increasing=False).x
    # Both are means of a few doubles.
    assert falling_fit(np.array(values)) == pytest.approx(expected, rel=1e-9)


def test_a_falling_sequence_is_its_own_fit() -> None:
    values = np.array([[3.0, 2.5, 2.5, 1.0], [5.0, 4.0, 3.0, 2.0]])
    assert (falling_fit(values) == values).all()


@given(losses, st.floats(0.5, 5.5), st.floats(0.0, 1.0))
def test_a_harder_target_needs_no_shorter_schedule(
    values: list[float], target: float, harder: float
) -> None:
    lengths = [100 * 2**i for i in range(len(values))]
    steps = steps_to_reach(lengths, np.array([values, values]), np.array([target, target - harder]))
    # exp(log n) may round a last bit away.
    assert steps[1] >= steps[0] * (1 - 1e-12)
    inside = steps[np.isfinite(steps)]
    assert ((inside >= 100 * (1 - 1e-12)) & (inside <= lengths[-1] * (1 + 1e-12))).all()


def arm_of(curve: dict[int, float], offsets: list[float]) -> dict[int, dict[int, float | None]]:
    return {
        n: {seed: loss + offset for seed, offset in enumerate(offsets)} for n, loss in curve.items()
    }


def test_steps_saved_by_hand() -> None:
    offsets = [-0.1, 0.0, 0.1]
    arm = arm_of({125: 3.0, 500: 2.0}, offsets)
    baseline = arm_of({500: 2.5}, offsets)[500]
    saved = steps_saved_by_schedules(arm, baseline, full_steps=500)
    # The mean meets 2.5 half-way in log(steps), at 250, and so does every seed with its own target.
    assert saved.percent == pytest.approx(50.0)
    assert saved.by_seed.values == pytest.approx((50.0, 50.0, 50.0))
    assert saved.seeds == (0, 1, 2)
    assert saved.test is not None
    assert saved.test.mean_difference == pytest.approx(-0.5)
    assert saved.notes == ()


def test_an_arm_that_needs_more_steps_saves_less_than_nothing() -> None:
    arm = arm_of({500: 2.5, 2000: 1.5}, [0.0, 0.1])
    baseline = arm_of({500: 2.0}, [0.0, 0.1])[500]
    saved = steps_saved_by_schedules(arm, baseline, full_steps=500)
    assert saved.percent == pytest.approx(-100.0)


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        ({250: 1.9, 500: 1.5}, "the shortest schedule, 250 steps, .* more than 50.0% saved"),
        ({500: 2.4, 630: 2.1}, "the longest schedule, 630 steps, .* less than -26.0% saved"),
        ({500: 1.5}, "the shortest schedule, 500 steps, .* more than 0.0% saved"),
    ],
)
def test_what_is_not_bracketed_is_not_extrapolated(curve: dict[int, float], reason: str) -> None:
    baseline = arm_of({500: 2.0}, [0.0, 0.1])[500]
    saved = steps_saved_by_schedules(arm_of(curve, [0.0, 0.1]), baseline, full_steps=500)
    assert saved.percent is None
    assert saved.interval is None
    assert (saved.at_least is None) == (curve[500] > 2.0)
    assert (saved.at_most is None) == (curve[500] < 2.0)
    assert saved.reason is not None
    assert re.search(reason, saved.reason)
    assert saved.test is not None


def test_a_diverged_run_leaves_no_figure() -> None:
    arm = arm_of({250: 2.2, 500: 1.8}, [0.0, 0.1])
    arm[250][1] = None
    baseline = arm_of({500: 2.0}, [0.0, 0.1])[500]
    saved = steps_saved_by_schedules(arm, baseline, full_steps=500)
    assert (saved.percent, saved.reason) == (None, "1 of 2 runs over 250 steps diverged")


def test_lengths_that_lack_seeds_are_left_out_and_named() -> None:
    arm = arm_of({250: 2.2, 400: 2.1, 500: 1.8}, [0.0, 0.1, 0.2])
    del arm[400][2]
    baseline = arm_of({500: 2.0}, [0.0, 0.1, 0.2])[500]
    saved = steps_saved_by_schedules(arm, baseline, full_steps=500)
    assert saved.percent is not None
    assert saved.notes == ("schedules of 400 steps left out: without seeds 2",)


def test_a_curve_that_turns_up_is_pooled_and_said_so() -> None:
    arm = arm_of({250: 3.0, 315: 2.0, 400: 2.2, 500: 1.0}, [0.0, 0.0])
    baseline = {0: 2.05, 1: 2.05}
    saved = steps_saved_by_schedules(arm, baseline, full_steps=500)
    # 2.0 and 2.2 pool to 2.1, so that 2.05 is met between 400 (2.1) and 500 (1.0).
    share = (2.1 - 2.05) / (2.1 - 1.0)
    assert saved.percent == pytest.approx(100 * (1 - 0.8 ** (1 - share)))
    assert "isotonic regression" in saved.notes[0]


def test_ends_of_an_interval_that_leave_the_lengths_run_are_open() -> None:
    arm = arm_of({400: 2.1, 500: 1.9}, [0.0] * 4)
    baseline: dict[int, float | None] = {0: 1.8, 1: 2.2, 2: 1.91, 3: 1.95}
    saved = steps_saved_by_schedules(arm, baseline, full_steps=500)
    assert saved.percent is not None
    assert saved.interval is not None
    assert saved.interval.low is None
    assert saved.by_seed.mean is None
    assert "seeds 0, 1" in saved.notes[-1]


def test_nothing_shared_is_said() -> None:
    assert steps_saved_by_schedules({500: {0: 1.0}}, {1: 1.0}, full_steps=500).reason is not None
    one = steps_saved_by_schedules({250: {0: 3.0}, 500: {0: 1.0}}, {0: 2.0}, full_steps=500)
    assert one.percent is not None
    assert (one.interval, one.test) == (None, None)


def test_steps_to_a_threshold_by_hand() -> None:
    saved = steps_saved_to_threshold({0: 50.0, 1: 70.0}, {0: 100.0, 1: 100.0})
    assert saved.percent == pytest.approx(40.0)
    assert saved.by_seed.values == pytest.approx((50.0, 30.0))
    assert saved.seeds == (0, 1)
    assert steps_saved_to_threshold({0: 50.0}, {1: 100.0}).reason == "no seed was run with both"


def test_the_bootstrap_resamples_seeds_together() -> None:
    # The values differ wildly between seeds, but their paired difference does not.
    values = np.array([[1.0, 2.0], [11.0, 12.0], [101.0, 102.0], [5.0, 6.0]])
    interval = bootstrap_interval(
        lambda drawn: values[drawn, 1].mean(-1) - values[drawn, 0].mean(-1), 4
    )
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((1.0, 1.0))
    # All resamples are equal: BCa does not exist.
    assert interval.method == "percentile"


def test_paired_tests_against_counting() -> None:
    first, second = [1.0, 2.0, 3.0, 5.0, 4.0, 2.0], [2.0, 2.5, 3.2, 5.1, 4.9, 3.0]
    test = paired_test(first, second)
    assert test is not None
    # All differences are negative: of 64 sign patterns only this one and its mirror are as extreme.
    assert test.sign_flip_p_value == test.smallest_sign_flip_p_value == 2 / 64
    same = paired_test(first, first)
    assert same is not None
    assert (same.p_value, same.sign_flip_p_value) == (1.0, 1.0)
    assert paired_test([1.0], [2.0]) is None


def experiment(draw: random.Random) -> StepsSaved:
    """Six seeds of a power law with a known saving; seeds differ more than arms do."""
    seeds = range(6)
    hardness = [draw.gauss(0.0, 0.02) for _ in seeds]

    def final(steps: int, gap: float) -> dict[int, float | None]:
        return {
            seed: 1.8 + gap - SLOPE * math.log(steps / 500) + hardness[seed] + draw.gauss(0, 0.006)
            for seed in seeds
        }

    arm = {n: final(n, 0.0) for n in LENGTHS}
    return steps_saved_by_schedules(arm, final(500, GAP), full_steps=500)


SLOPE, GAP = 0.25, 0.06
TRUTH = 100 * (1 - math.exp(-GAP / SLOPE))


def test_intervals_cover_a_known_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "NUM_RESAMPLES", 999)
    draw = random.Random(0)
    trials = [experiment(draw) for _ in range(200)]
    intervals = [(trial.interval, trial.by_seed) for trial in trials]
    bootstrap = student = 0
    for interval, by_seed in intervals:
        assert interval is not None
        assert interval.method == "BCa"
        assert interval.low is not None
        assert interval.high is not None
        assert by_seed.low is not None
        assert by_seed.high is not None
        bootstrap += interval.low <= TRUTH <= interval.high
        student += by_seed.low <= TRUTH <= by_seed.high
    # Binomial over 200: standard deviations 0.015 and 0.025; three of them.
    assert student / 200 == pytest.approx(0.955, abs=0.045)
    assert bootstrap / 200 == pytest.approx(0.85, abs=0.075)
    mean = math.fsum(trial.percent or math.nan for trial in trials) / 200
    # One experiment's error is about 2 points: the mean of 200 is off by 0.15.
    assert mean == pytest.approx(TRUTH, abs=0.5)
