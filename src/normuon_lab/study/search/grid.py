"""Which learning rates a tuning tries: pure logic over losses, the same budget for every arm.

First every arm gets the same grid. Then, round by round, every arm gets one more rate, so that the
budgets stay equal: an arm whose best rate is at an end of what it tried gets one beyond that end;
any other gets the geometric mean of its best rate and a neighbour. It ends once every arm's best
rate is interior and at least a given number of rounds were made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from normuon_lab.errors import require

# The mean final loss by learning rate; math.inf where a run diverged.
Losses = Mapping[float, float]

EXTENSION_FACTOR = 2.0
# Finer steps than this are lost in the noise between seeds.
_FINEST_RATIO = 2.0**0.25


def check_grid(rates: tuple[float, ...]) -> None:
    """Raise `InputError` unless `rates` are three or more positive numbers, each once."""
    require(len(rates) >= 3, "--lrs needs at least three learning rates")
    require(
        all(math.isfinite(rate) and rate > 0.0 for rate in rates),
        "--lrs must be positive numbers",
    )
    require(len(set(rates)) == len(rates), "--lrs names a learning rate twice")


def best_rate(losses: Losses) -> float:
    """The rate of the lowest loss; the lower rate of two that are equal."""
    return min(sorted(losses), key=lambda rate: losses[rate])


def is_interior(losses: Losses) -> bool:
    """Whether the best rate has a tried rate on both sides.

    >>> is_interior({1.0: 3.0, 2.0: 2.0, 4.0: 2.5})
    True
    >>> is_interior({1.0: 3.0, 2.0: 2.0})
    False
    """
    return min(losses) < best_rate(losses) < max(losses)


def next_rate(losses: Losses) -> float:
    """The one rate to try next for an arm.

    >>> next_rate({1.0: 3.0, 2.0: 2.0})
    4.0
    >>> round(next_rate({1.0: 3.0, 2.0: 2.0, 4.0: 2.5}), 3)  # towards the better neighbour
    2.828
    """
    best = best_rate(losses)
    below = [rate for rate in losses if rate < best]
    above = [rate for rate in losses if rate > best]
    if not below:
        return best / EXTENSION_FACTOR
    if not above:
        return best * EXTENSION_FACTOR
    neighbours = sorted((max(below), min(above)), key=lambda rate: losses[rate])
    for neighbour in neighbours:
        if max(neighbour / best, best / neighbour) > _FINEST_RATIO * 1.01:
            return math.sqrt(best * neighbour)
    # Both neighbours are as near as the noise: one more rate at an end costs the same budget and
    # can only widen what was searched.
    return max(losses) * EXTENSION_FACTOR


def is_done(losses_by_arm: Mapping[str, Losses], *, rounds_made: int, min_rounds: int) -> bool:
    """Whether tuning may stop: every arm interior, and `min_rounds` rounds made."""
    return rounds_made >= min_rounds and all(map(is_interior, losses_by_arm.values()))
