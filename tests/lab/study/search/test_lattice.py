"""The lattice search finds bowls' bottoms, stays within equal budgets and ends interior."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_lab.study.search import lattice
from normuon_lab.study.search.lattice import best_place, is_interior, next_places, next_round
from normuon_lab.study.search.searching import Place

LossOf = Callable[[Place], float]


def bowl(*bottom: float) -> LossOf:
    return lambda place: sum((k - b) ** 2 for k, b in zip(place, bottom, strict=True))


def search(
    loss_of: dict[str, LossOf], start: Place, *, min_trials: int, max_trials: int = 60
) -> dict[str, dict[Place, float]]:
    tried: dict[str, dict[Place, float]] = {arm: {} for arm in loss_of}
    starts = dict.fromkeys(loss_of, start)
    for _ in range(200):
        wanted = next_round(tried, starts, min_trials=min_trials, max_trials=max_trials)
        if not wanted:
            return tried
        for arm, places in wanted.items():
            for place in places:
                assert place not in tried[arm], "no place is tried twice"
                tried[arm][place] = loss_of[arm](place)
    raise AssertionError("the search does not end")


@given(
    bottoms=st.lists(st.tuples(*[st.floats(-4, 4)] * 3), min_size=1, max_size=3),
    min_trials=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_every_bowl_is_found_within_half_a_step_and_budgets_are_equal(
    bottoms: list[tuple[float, float, float]], min_trials: int
) -> None:
    arms = {f"arm{i}": bowl(*bottom) for i, bottom in enumerate(bottoms)}
    # Without ties, which may leave a place of nearly the least loss a little farther away.
    with patch.object(lattice, "TIE", 0.0):
        tried = search(arms, (0.0, 0.0, 0.0), min_trials=min_trials)
        best = {arm: best_place(losses) for arm, losses in tried.items()}
        interior = {arm: is_interior(losses) for arm, losses in tried.items()}
    assert len({len(losses) for losses in tried.values()}) == 1
    for (arm, losses), bottom in zip(tried.items(), bottoms, strict=True):
        assert len(losses) >= min_trials
        assert interior[arm]
        distance = [abs(k - b) for k, b in zip(best[arm], bottom, strict=True)]
        assert max(distance) <= 0.5 + 1e-9


def test_a_tie_keeps_the_place_tried_first_though_another_is_a_little_better() -> None:
    tried = search({"a": bowl(0.0, 1.5001)}, (0.0, 0.0), min_trials=1)["a"]
    assert tried[0.0, 2.0] < tried[0.0, 1.0]
    assert best_place(tried) == (0.0, 1.0)
    assert is_interior(tried)


def test_a_search_starts_where_it_is_told() -> None:
    assert next_places({}, (3.0, 1.0)) == [(3.0, 1.0)]


def test_the_grid_is_extended_beyond_a_best_place_at_its_end() -> None:
    losses = {(0.0,): 3.0, (1.0,): 2.0, (2.0,): 1.0}
    assert not is_interior(losses)
    assert next_places(losses, (0.0,)) == [(3.0,)]


def test_a_flat_axis_is_not_followed() -> None:
    def loss_of(place: Place) -> float:
        return 2.0 + place[0] ** 2 + 1e-4 * place[1]

    tried = search({"a": loss_of}, (1.0, 0.0), min_trials=3, max_trials=30)
    assert is_interior(tried["a"])
    assert best_place(tried["a"])[0] == 0.0
    assert len(tried["a"]) < 12


def test_all_diverged_places_leave_the_first_as_the_best() -> None:
    assert best_place({(3.0,): math.inf, (2.0,): math.inf}) == (3.0,)


def test_a_diverged_neighbour_bounds_the_grid() -> None:
    losses = {(0.0,): 2.0, (1.0,): math.inf, (-1.0,): 2.5}
    assert is_interior(losses)
    assert next_places(losses, (0.0,)) == [(-0.5,)]


def test_a_search_that_never_turns_ends_at_the_most_trials() -> None:
    tried = search({"a": lambda place: -place[0]}, (0.0,), min_trials=3, max_trials=7)
    assert len(tried["a"]) == 7
    assert not is_interior(tried["a"])


def test_an_arm_that_is_done_waits_for_one_that_needs_more() -> None:
    tried = search({"near": bowl(0.0), "far": bowl(9.0)}, (0.0,), min_trials=3)
    assert len(tried["near"]) == len(tried["far"]) > 10
    assert best_place(tried["far"]) == (9.0,)


@pytest.mark.parametrize("min_trials", [20, 30])
def test_trials_that_are_left_refine_to_half_steps(min_trials: int) -> None:
    tried = search({"a": bowl(0.4, -0.6, 0.1)}, (0.0, 0.0, 0.0), min_trials=min_trials)
    assert best_place(tried["a"]) == (0.5, -0.5, 0.0)
    assert len(tried["a"]) == min_trials
