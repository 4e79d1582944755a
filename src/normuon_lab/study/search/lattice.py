"""Chooses the settings that a sweep tries next, from the places tried and their losses.

A coordinate search on a lattice. Axis by axis, the best place gets its two neighbours; whenever
one of them is better, it is the new best place, with neighbours of its own. So every grid is
extended until the best place is interior: worse neighbours on both sides along every axis. The
remaining trials refine it by half a step along each axis, towards the better neighbour. A place is
better if its loss is lower by a thousandth; otherwise the place tried first stays.

Every arm gets the same number of trials: at least `min_trials`, more as long as the best place of
any arm is not interior, and then for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from normuon_lab.study.search.searching import Place

Losses = Mapping[Place, float]
"""The mean objective by place, in the order of trials; math.inf where a run diverged."""

TIE = 1e-3
"""Objectives that differ by less, relatively, are equal: seeds differ by ten times as much."""


def best_place(losses: Losses) -> Place:
    """The place of the lowest loss; of several within `TIE`, the first tried.

    Along a flat axis, such as a weight decay that does nothing, a search would otherwise follow
    noise to ever smaller values.

    >>> best_place({(0.0,): 2.0, (1.0,): 1.9999, (2.0,): 2.5})
    (0.0,)
    """
    least = min(losses.values())
    return next(place for place, loss in losses.items() if loss <= least + TIE * abs(least))


def is_interior(losses: Losses) -> bool:
    """Whether the best whole-step place has tried neighbours on both sides along every axis.

    >>> is_interior({(0.0,): 3.0, (1.0,): 2.0, (2.0,): 2.5})
    True
    >>> is_interior({(0.0,): 3.0, (1.0,): 2.0})
    False
    """
    return not _missing_neighbours(losses)


def next_places(losses: Losses, start: Place) -> list[Place]:
    """The places to try next: one axis' missing neighbours of the best place, or a refinement.

    Example:
        >>> next_places({}, (3.0, 0.0))
        [(3.0, 0.0)]
        >>> next_places({(3.0, 0.0): 2.0}, (3.0, 0.0))
        [(2.0, 0.0), (4.0, 0.0)]
        >>> next_places({(3.0,): 2.0, (2.0,): 2.5, (4.0,): 2.1}, (3.0,))  # towards the better
        [(3.5,)]
    """
    if not losses:
        return [start]
    return _missing_neighbours(losses) or _refinement(losses)


def next_round(
    losses_by_arm: Mapping[str, Losses],
    starts: Mapping[str, Place],
    *,
    min_trials: int,
    max_trials: int,
) -> dict[str, list[Place]]:
    """The places that each arm tries next; empty once all are interior with equal trials.

    At `max_trials` an arm stops, even if its best place is not interior.
    """
    budget = max(min_trials, *(len(losses) for losses in losses_by_arm.values()))
    wanted: dict[str, list[Place]] = {}
    for arm, losses in losses_by_arm.items():
        places = next_places(losses, starts[arm])
        if len(losses) >= max_trials or (losses and is_interior(losses)):
            places = places[: budget - len(losses)]
        if places:
            wanted[arm] = places
    return wanted


def _whole(losses: Losses) -> dict[Place, float]:
    return {place: loss for place, loss in losses.items() if all(k == round(k) for k in place)}


def _missing_neighbours(losses: Losses) -> list[Place]:
    best = best_place(_whole(losses))
    for axis in range(len(best)):
        missing = [place for place in _beside(best, axis, 1.0) if place not in losses]
        if missing:
            return missing
    return []


def _refinement(losses: Losses) -> list[Place]:
    """The next half step: the nearest untried one, towards the better neighbours first."""
    best = best_place(losses)
    for axis in range(len(best)):
        tried = [place for place in _beside(best, axis, 0.5) if place in losses]
        if not tried:
            neighbours = _beside(best, axis, 1.0)
            better = min(neighbours, key=lambda place: losses.get(place, math.inf))
            return [tuple((a + b) / 2 for a, b in zip(best, better, strict=True))]
    for axis in range(len(best)):
        untried = [place for place in _beside(best, axis, 0.5) if place not in losses]
        if untried:
            return untried[:1]
    return [_nearest_untried(losses, best)]


def _nearest_untried(losses: Losses, best: Place) -> Place:
    """Where all half steps were tried: along the diagonals, then further out."""
    for reach in range(1, 100):
        for signs in itertools.product((-1.0, 1.0), repeat=len(best)):
            place = tuple(k + 0.5 * reach * sign for k, sign in zip(best, signs, strict=True))
            if place not in losses:
                return place
    raise AssertionError("a hundred places along every diagonal were tried")


def _beside(place: Place, axis: int, distance: float) -> list[Place]:
    return [
        (*place[:axis], place[axis] + sign * distance, *place[axis + 1 :]) for sign in (-1.0, 1.0)
    ]
