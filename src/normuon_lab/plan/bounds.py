"""A tighter bound on the busiest rank than `normuon.distributed.balance.makespan_bound`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normuon.distributed.balance import makespan_bound


def packing_bound(costs: Sequence[int], *, world_size: int) -> int:
    """A tighter bound than `makespan_bound`: the least capacity that passes a bin-packing test.

    A makespan is a sum of costs, so a multiple of their greatest common divisor. Capacity C needs,
    for any a <= C / 2, a bin for each cost above C - a, a bin for each other cost above C / 2, and
    bins for what of the costs in [a, C / 2] does not fit beside the latter: more than W bins means
    that C is impossible (Martello and Toth's L2). When W costs exceed C / 2, each bin has one, and
    the rest is tested again with what the smallest of them leaves. For Llama-3-70B and for Mixtral
    8x7B on 256 ranks `makespan_bound` leaves it open whether 17% and 9% are lost; this bound shows
    that nothing is.

    Args:
        costs: positive costs in any order.
        world_size: W.

    Returns:
        The bound, at least `makespan_bound`; 0 without jobs.

    Example:
        >>> costs = [16] * 4 + [6] * 4
        >>> makespan_bound(costs, world_size=5), packing_bound(costs, world_size=5)
        (18, 22)
    """
    if not costs:
        return 0
    unit = math.gcd(*costs)
    numbers: dict[int, int] = {}
    for cost in costs:
        numbers[cost // unit] = numbers.get(cost // unit, 0) + 1
    kinds = sorted(numbers.items())
    low = -(-makespan_bound(costs, world_size=world_size) // unit)
    # Each failed test proves `low`; `high` only guides the search, the test being no monotone one.
    high = low + max(numbers)
    while low < high:
        capacity = (low + high) // 2
        if not _may_fit(kinds, capacity, world_size):
            low = capacity + 1
        else:
            high = capacity
    return low * unit


def _may_fit(kinds: list[tuple[int, int]], capacity: int, num_bins: int) -> bool:
    """Whether nothing proves that (cost, number) pairs sorted by cost cannot fit.

    Where there are as many costs above C / 2 as bins, each bin has one of them, and the rest must
    fit into what the smallest of them leaves.
    """
    while kinds:
        if kinds[-1][0] > capacity or _bins_needed(kinds, capacity) > num_bins:
            return False
        large = [kind for kind in kinds if 2 * kind[0] > capacity]
        if sum(number for _, number in large) < num_bins:
            return True
        capacity -= large[0][0]
        kinds = kinds[: -len(large)]
    return True


def _bins_needed(kinds: list[tuple[int, int]], capacity: int) -> int:
    """The L2 bound on bins of `capacity` for (cost, number) pairs sorted by cost."""
    bins = 0
    for threshold in [0, *(cost for cost, _ in kinds if 2 * cost <= capacity)]:
        alone = sum(number for cost, number in kinds if cost > capacity - threshold)
        large = [kind for kind in kinds if capacity < 2 * kind[0] <= 2 * (capacity - threshold)]
        room = sum(number * (capacity - cost) for cost, number in large)
        small = sum(n * cost for cost, n in kinds if threshold <= cost and 2 * cost <= capacity)
        shared = sum(number for _, number in large) + max(0, -(-(small - room) // capacity))
        bins = max(bins, alone + shared)
    return bins
