"""Steps to a target and intervals, against cases worked by hand and against scipy."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from normuon_lab.study.statistics.curves import compare_arms, points_between, steps_to_target
from normuon_lab.study.statistics.estimates import t_interval
from normuon_lab.train.runs.records import RunRecord

Curve = tuple[tuple[int, ...], tuple[float, ...]]


def runs_of(curves: dict[str, dict[int, Curve]]) -> list[RunRecord]:
    """Finished runs, by arm and seed: steps, and the losses after them."""
    return [
        RunRecord(
            arm=arm,
            seed=seed,
            learning_rate=0.01,
            num_parameters=1,
            eval_steps=list(steps),
            eval_losses=list(losses),
            final_loss=losses[-1],
        )
        for arm, by_seed in curves.items()
        for seed, (steps, losses) in by_seed.items()
    ]


def test_interval_by_hand() -> None:
    # mean 2, s = 1, n = 3, t(0.975, 2) = 4.302653: 2 +- 4.302653 / sqrt(3)
    estimate = t_interval([1.0, 2.0, 3.0])
    assert estimate.mean == 2.0
    assert estimate.low == pytest.approx(2.0 - 4.302653 / math.sqrt(3), rel=1e-6)
    assert estimate.high == pytest.approx(2.0 + 4.302653 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize("values", [[0.1, 0.4], [3.0, 1.0, 4.0, 1.5, 9.0]])
def test_interval_equals_scipys(values: list[float]) -> None:
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    estimate = t_interval(values)
    # Both are double precision sums of a few terms.
    assert estimate.low == pytest.approx(expected.low, rel=1e-12)
    assert estimate.high == pytest.approx(expected.high, rel=1e-12)


def test_one_value_has_a_mean_and_no_interval() -> None:
    estimate = t_interval([5.0])
    assert (estimate.mean, estimate.low, estimate.high) == (5.0, None, None)


def test_no_value_has_no_mean() -> None:
    assert t_interval([]).mean is None


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    import random

    draw = random.Random(0)
    trials = 2000
    covered = 0
    for _ in range(trials):
        estimate = t_interval([draw.gauss(1.0, 2.0) for _ in range(4)])
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 1.0 <= estimate.high
    # Binomial: standard deviation sqrt(0.95 * 0.05 / 2000) = 0.005; four of them.
    assert covered / trials == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (3.0, 10.0),  # on a point
        (2.5, 15.0),  # half-way
        (6.0, 0.0),  # below from the start
        (1.9, None),  # never
        (2.0, 20.0),  # at the end
    ],
)
def test_steps_to_target(target: float, expected: float | None) -> None:
    assert steps_to_target([0, 10, 20], [5.0, 3.0, 2.0], target) == expected


def test_the_first_crossing_counts_when_a_curve_turns_up_again() -> None:
    assert steps_to_target([0, 10, 20, 30], [4.0, 2.0, 5.0, 1.0], 3.0) == 5.0


def test_efficiency_by_hand() -> None:
    steps = (0, 50, 100)
    curves = {
        "adamw": {
            0: (steps, (5.0, 3.0, 2.0)),
            1: (steps, (5.0, 3.0, 2.2)),
        },
        "normuon": {
            0: (steps, (5.0, 2.0, 1.5)),  # reaches 2.0 at 50: 50% fewer
            1: (steps, (5.0, 2.4, 1.9)),  # reaches 2.2 at 70: 30% fewer
        },
    }
    comparison = compare_arms("normuon", "adamw", runs_of(curves))
    assert comparison.fewer_steps_percent.values == pytest.approx((50.0, 30.0))
    assert comparison.fewer_steps_percent.mean == pytest.approx(40.0)
    assert comparison.loss_difference.values == pytest.approx((-0.5, -0.3))
    # The target is the baseline's loss of the same seed: with seed 0's 2.0 for both, seed 1 would
    # need 95 steps.


def test_points_between_two_arms_are_paired_by_seed() -> None:
    steps = (0, 100)

    def straight_line(final: float) -> Curve:
        return (steps, (10.0, final))

    # From 10 down to f, a straight line reaches 6 after 400 / (10 - f) steps.
    curves = {
        "adamw": {seed: straight_line(6.0) for seed in (0, 1)},
        "muon": {0: straight_line(5.0), 1: straight_line(2.0)},  # 20% and 50% fewer
        "normuon": {0: straight_line(2.0), 1: straight_line(0.0)},  # 50% and 60% fewer
    }
    muon, normuon = (compare_arms(arm, "adamw", runs_of(curves)) for arm in ("muon", "normuon"))
    difference = points_between(normuon, muon)
    assert (difference.arm, difference.baseline, difference.reference) == (
        "normuon",
        "muon",
        "adamw",
    )
    assert difference.points.values == pytest.approx((30.0, 10.0))
    curves["muon"][1] = straight_line(7.0)
    unreached = compare_arms("muon", "adamw", runs_of(curves))
    assert points_between(normuon, unreached).points.mean is None


def test_a_seed_that_never_reaches_the_target_leaves_no_mean() -> None:
    steps = (0, 100)
    curves = {
        "adamw": dict.fromkeys((0, 1), (steps, (5.0, 2.0))),
        "muon": {
            0: (steps, (5.0, 1.0)),
            1: (steps, (5.0, 2.1)),
        },
    }
    comparison = compare_arms("muon", "adamw", runs_of(curves))
    assert comparison.seeds_not_reached == (1,)
    assert comparison.fewer_steps_percent.mean is None
    assert comparison.loss_difference.mean == pytest.approx(-0.45)


def test_only_seeds_that_both_arms_finished_are_paired() -> None:
    steps = (0, 100)
    curve = (steps, (5.0, 2.0))
    comparison = compare_arms(
        "muon", "adamw", runs_of({"adamw": {0: curve, 1: curve}, "muon": {1: curve}})
    )
    assert comparison.seeds == (1,)
