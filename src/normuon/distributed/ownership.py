"""Balances matrices over ranks: longest-processing-time, its refinement, and a bound to measure by.

Sees only jobs (a cost, the ranks allowed, the ranks preferred). `plan` makes jobs from layouts;
`buckets` orders what was assigned.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

TOLERANCE = 1.01
"""The busiest rank may exceed the makespan bound by this factor before MULTIFIT is tried too."""


@dataclass(frozen=True, slots=True)
class Job:
    """One orthogonalisation to place.

    Args:
        cost: FLOPs.
        name: breaks ties, so that every rank decides alike.
        candidates: the ranks that may take it, ascending; None for every rank.
        preferred: ranks that store some of the matrix, most first: among equally loaded candidates
            the first of these wins, then the lowest rank.
    """

    cost: int
    name: tuple[str, int]
    candidates: tuple[int, ...] | None = None
    preferred: tuple[int, ...] = ()


def makespan_bound(costs: Sequence[int], *, world_size: int) -> int:
    """A load that the busiest of `world_size` ranks cannot get below, whatever the assignment.

    The largest of: the mean load, rounded up; the largest cost; and for every k, the sum of the
    k + 1 smallest among the k W + 1 largest costs, since W ranks cannot take k W + 1 jobs without
    one of them taking k + 1.

    Args:
        costs: positive costs in any order.
        world_size: W.

    Returns:
        The bound; 0 without jobs.

    Example:
        >>> makespan_bound([3, 3, 3], world_size=2), makespan_bound([9, 1, 1], world_size=2)
        (6, 9)
    """
    if not costs:
        return 0
    ordered = sorted(costs, reverse=True)
    prefix = list(accumulate(ordered, initial=0))
    bound = max(ordered[0], -(-prefix[-1] // world_size))
    for k in range(1, (len(ordered) - 1) // world_size + 1):
        last = k * world_size
        bound = max(bound, prefix[last + 1] - prefix[last - k])
    return bound


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


def balance_jobs(
    jobs: Sequence[Job], *, world_size: int, base_load: int = 0
) -> tuple[list[int], list[int]]:
    """Place every job on a rank: longest processing time, refined where that misses the tolerance.

    Args:
        jobs: what to place.
        world_size: ranks of the group.
        base_load: FLOPs that every rank has already, beside the jobs.

    Returns:
        The rank of each job, and the load of each rank without `base_load`.

    Example:
        >>> jobs = [Job(cost, ("w", i)) for i, cost in enumerate([5, 4, 3, 3, 3])]
        >>> balance_jobs(jobs, world_size=2)
        ([0, 0, 1, 1, 1], [9, 9])
    """
    ranks, loads = longest_processing_time(jobs, world_size=world_size)
    costs = [job.cost for job in jobs]
    bound = makespan_bound(costs, world_size=world_size)
    if base_load + max(loads) <= TOLERANCE * (base_load + bound):
        return ranks, loads
    bound = packing_bound(costs, world_size=world_size)
    packed = multifit(jobs, ranks, world_size=world_size, upper=max(loads), lower=bound)
    if packed is not None:
        ranks = packed
        loads = loads_of(jobs, ranks, world_size=world_size)
    return ranks, loads


def loads_of(jobs: Sequence[Job], ranks: Sequence[int], *, world_size: int) -> list[int]:
    """The summed cost on each rank."""
    loads = [0] * world_size
    for job, rank in zip(jobs, ranks, strict=True):
        loads[rank] += job.cost
    return loads


def longest_processing_time(jobs: Sequence[Job], *, world_size: int) -> tuple[list[int], list[int]]:
    """Give jobs, costliest first, to the least loaded candidate; ties as `Job` says.

    Jobs confined to some ranks go first, so that the free ones fill the gaps. When all are free the
    busiest rank is within 4/3 - 1/(3 W) of the best possible (Graham 1969).

    Returns:
        The rank of each job, and the load of each rank.

    Example:
        >>> jobs = [Job(2, ("a", 0)), Job(2, ("b", 0), preferred=(1,)), Job(3, ("c", 0), (1,))]
        >>> longest_processing_time(jobs, world_size=3)
        ([0, 2, 1], [2, 3, 2])
    """
    loads = [0] * world_size
    ranks = [0] * len(jobs)
    order = sorted(range(len(jobs)), key=lambda i: (-jobs[i].cost, jobs[i].name))
    for index in order:
        candidates = jobs[index].candidates
        if candidates is not None:
            lightest = min(loads[rank] for rank in candidates)
            ranks[index] = _pick(jobs[index], loads, lightest, set(candidates), candidates)
            loads[ranks[index]] += jobs[index].cost
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for index in order:
        job = jobs[index]
        if job.candidates is not None:
            continue
        while heap[0][0] != loads[heap[0][1]]:
            heapq.heappop(heap)  # The rank was loaded through `preferred` since.
        lightest, lowest = heap[0]
        rank = _pick(job, loads, lightest, None, (lowest,))
        ranks[index] = rank
        loads[rank] += job.cost
        heapq.heappush(heap, (loads[rank], rank))
    return ranks, loads


def _pick(
    job: Job, loads: list[int], lightest: int, allowed: set[int] | None, fallback: Sequence[int]
) -> int:
    """The first preferred rank with the lightest load, else the first such one of `fallback`."""
    for rank in job.preferred:
        if loads[rank] == lightest and (allowed is None or rank in allowed):
            return rank
    return next(rank for rank in fallback if loads[rank] == lightest)


def multifit(
    jobs: Sequence[Job],
    ranks: Sequence[int],
    *,
    world_size: int,
    upper: int,
    lower: int,
    num_trials: int = 16,
) -> list[int] | None:
    """MULTIFIT: bisect for the smallest capacity into which first-fit-decreasing packs all jobs.

    Few distinct costs repeat in a model, so ranks are filled one after another by decreasing cost,
    which packs as first-fit-decreasing does and takes time in the number of distinct costs only.

    Args:
        jobs: what to place.
        ranks: a placement already known; jobs that are confined to some ranks stay where it says.
        world_size: ranks of the group.
        upper: the makespan of `ranks`; only a better one is of use.
        lower: a makespan below which none is possible.
        num_trials: bisection steps.

    Returns:
        The rank of each job, or None when no packing beats `upper`.
    """
    fixed = [0] * world_size
    by_cost: dict[int, list[int]] = {}
    for index in sorted(range(len(jobs)), key=lambda i: jobs[i].name):
        if jobs[index].candidates is None:
            by_cost.setdefault(jobs[index].cost, []).append(index)
        else:
            fixed[ranks[index]] += jobs[index].cost
    costs = sorted(by_cost, reverse=True)
    counts = [len(by_cost[cost]) for cost in costs]
    best: list[list[int]] | None = None
    low, high = max(lower, *fixed), upper - 1
    for _ in range(num_trials):
        if low > high:
            break
        capacity = (low + high) // 2
        packed = _first_fit(costs, counts, [capacity - load for load in fixed])
        if packed is None:
            low = capacity + 1
            continue
        best = packed
        makespan = max(
            load + sum(number * cost for number, cost in zip(taken, costs, strict=True))
            for load, taken in zip(fixed, packed, strict=True)
        )
        high = makespan - 1
    if best is None:
        return None
    return _deal(jobs, ranks, best, [by_cost[cost] for cost in costs])


def _first_fit(costs: list[int], counts: list[int], room: list[int]) -> list[list[int]] | None:
    """How many jobs of each cost every rank takes, or None when they do not all fit."""
    left = list(counts)
    packed = []
    for free in room:
        taken = []
        for kind, cost in enumerate(costs):
            number = min(left[kind], free // cost)
            left[kind] -= number
            free -= number * cost
            taken.append(number)
        packed.append(taken)
    return None if any(left) else packed


def _deal(
    jobs: Sequence[Job], ranks: Sequence[int], packed: list[list[int]], by_kind: list[list[int]]
) -> list[int]:
    """Give every rank as many jobs of each kind as `packed` says, preferring ranks that store."""
    dealt = list(ranks)
    for kind, indices in enumerate(by_kind):
        open_slots = [taken[kind] for taken in packed]
        lowest = 0
        for index in indices:
            while not open_slots[lowest]:
                lowest += 1
            rank = next((r for r in jobs[index].preferred if open_slots[r]), lowest)
            dealt[index] = rank
            open_slots[rank] -= 1
    return dealt


def round_robin(
    num_elements: Sequence[int], *, world_size: int, names: Sequence[tuple[str, int]]
) -> list[int]:
    """The paper's ownership (Algorithm 2): sort by element count, deal to ranks in turn.

    Example:
        >>> round_robin([4, 9, 4], world_size=2, names=[("b", 0), ("c", 0), ("a", 0)])
        [0, 0, 1]
    """
    order = sorted(range(len(num_elements)), key=lambda i: (-num_elements[i], names[i]))
    ranks = [0] * len(num_elements)
    for position, index in enumerate(order):
        ranks[index] = position % world_size
    return ranks
