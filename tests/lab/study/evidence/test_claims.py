"""Complete schedules are added, rung by rung, until every target is bracketed."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_lab.study.evidence.running import HIGHEST_RUNG, LOWEST_RUNG, missing_rungs


def run_out(offsets: dict[str, float], slope: float) -> dict[str, dict[int, float]]:
    """Follows the rule to its end on losses that fall by `slope` per rung."""
    means: dict[str, dict[int, float]] = {}
    for _ in range(100):
        wanted = missing_rungs(means, list(offsets))
        if not wanted:
            return means
        for arm, rung in wanted:
            assert rung not in means.get(arm, {}), "nothing is run twice"
            means.setdefault(arm, {})[rung] = 2.0 + offsets[arm] - slope * rung
    raise AssertionError("the rule does not end")


@given(
    muon=st.floats(-0.5, 0.2),
    normuon=st.floats(-0.5, 0.2),
    dion=st.floats(-0.5, 0.2),
    slope=st.floats(0.05, 0.2),
)
@settings(max_examples=100, deadline=None)
def test_every_target_ends_between_neighbouring_lengths_or_out_of_reach(
    muon: float, normuon: float, dion: float, slope: float
) -> None:
    offsets = {"adamw": 0.0, "muon": muon, "normuon": normuon, "dion": dion}
    means = run_out(offsets, slope)
    assert set(means["adamw"]) == {0}
    for arm, baseline in (
        *(("muon", "adamw"), ("normuon", "adamw"), ("dion", "adamw")),
        *(("muon", "normuon"), ("normuon", "muon")),
    ):
        by_rung, target = means[arm], means[baseline][0]
        rungs = sorted(by_rung)
        assert rungs == list(range(rungs[0], rungs[-1] + 1)), "no rung is left out"
        reached = [rung for rung in rungs if by_rung[rung] <= target]
        if not reached:
            assert rungs[-1] == HIGHEST_RUNG
        elif min(reached) == rungs[0]:
            assert rungs[0] == LOWEST_RUNG


def test_the_full_length_comes_first_for_every_arm() -> None:
    assert missing_rungs({"adamw": {0: 2.0}}, ["adamw", "muon"]) == [("muon", 0)]


def test_the_worse_of_muon_and_normuon_is_run_longer() -> None:
    means = {"adamw": {0: 2.0}, "muon": {0: 1.9, -1: 2.1}, "normuon": {0: 1.8, -1: 2.1}}
    assert missing_rungs(means, list(means)) == [("muon", 1)]


def test_the_options_are_held_against_muon_with_the_same_options() -> None:
    both, control = "normuon-heads-equilibrated", "muon-heads-equilibrated"
    means = {"adamw": {0: 2.0}, "muon": {0: 1.9}, control: {0: 1.7}, both: {0: 1.8, -1: 2.1}}
    assert missing_rungs(means, [both]) == [(both, 1)]
    means[both][1] = 1.6
    assert missing_rungs(means, [both]) == []


def test_adamw_that_is_better_than_an_arm_is_still_no_arm_of_its_own() -> None:
    means = {"adamw": {0: 1.0}, "muon": {0: 1.2}}
    assert missing_rungs(means, list(means)) == [("muon", 1)]


def test_a_diverged_schedule_is_above_every_target_and_no_target() -> None:
    means = {"adamw": {0: math.inf}, "muon": {0: 1.2}}
    assert missing_rungs(means, list(means)) == []
    means = {"adamw": {0: 2.0}, "muon": {0: 1.2, -1: math.inf}}
    assert missing_rungs(means, list(means)) == []
