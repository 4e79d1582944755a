"""Balances jobs over ranks: longest processing time, its refinement, and a bound to measure by."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

TOLERANCE = 1.01
"""The busiest rank may exceed the makespan bound by this factor before MULTIFIT is tried too."""


@dataclass(frozen=True, slots=True)
class Job:
    """One orthogonalisation to place.

    Args:
        cost: FLOPs.
        name: breaks ties, so that every rank decides alike; jobs whose names follow one another
            go to one rank together where their costs are equal.
        candidates: the ranks that may take it, ascending; None for every rank.
        preferred: ranks that store some of the matrix, most first: among equally loaded candidates
            the first of these wins, then the lowest rank.
    """

    cost: int
    name: tuple[Any, ...]
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
    bound = makespan_bound([job.cost for job in jobs], world_size=world_size)
    if base_load + max(loads) > TOLERANCE * (base_load + bound):
        packed = multifit(jobs, ranks, world_size=world_size, upper=max(loads), lower=bound)
        if packed is not None:
            ranks = packed
            loads = loads_of(jobs, ranks, world_size=world_size)
    return _put_neighbours_together(jobs, ranks, world_size), loads


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


def _put_neighbours_together(
    jobs: Sequence[Job], ranks: Sequence[int], world_size: int
) -> list[int]:
    """The same loads, with jobs of one cost dealt out in their order.

    What a rank takes of a parameter's equal matrices is then one stretch, and one view.
    """
    free: dict[int, list[int]] = {}
    for index in sorted(range(len(jobs)), key=lambda i: jobs[i].name):
        if jobs[index].candidates is None:
            free.setdefault(jobs[index].cost, []).append(index)
    packed = [[0] * len(free) for _ in range(world_size)]
    for kind, indices in enumerate(free.values()):
        for index in indices:
            packed[ranks[index]][kind] += 1
    return _deal(jobs, ranks, packed, list(free.values()))


def _deal(
    jobs: Sequence[Job], ranks: Sequence[int], packed: list[list[int]], by_kind: list[list[int]]
) -> list[int]:
    """Give every rank as many jobs of each kind as `packed` says, preferring ranks that store."""
    dealt = list(ranks)
    for kind, indices in enumerate(by_kind):
        open_slots = [taken[kind] for taken in packed]
        in_order = tuple(range(len(packed)))
        # Slots only close, so for each order of preference the search goes on where it stopped.
        reached: dict[int, int] = {}
        for index in indices:
            for order in (jobs[index].preferred, in_order):
                place = reached.get(id(order), 0)
                while place < len(order) and not open_slots[order[place]]:
                    place += 1
                reached[id(order)] = place
                if place < len(order):
                    break
            rank = order[place]
            dealt[index] = rank
            open_slots[rank] -= 1
    return dealt


def round_robin(
    num_elements: Sequence[int], *, world_size: int, names: Sequence[tuple[Any, ...]]
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
