"""Chooses the matrices that teams divide, and the ranks of each team."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from normuon.distributed.assignment import assign_owners, is_free
from normuon.distributed.balance import TOLERANCE
from normuon.distributed.cost import CostModel
from normuon.distributed.slabs import Team
from normuon.distributed.task import MatrixTask
from normuon.distributed.tiling import tiling_of

Teams: TypeAlias = Literal["off", "auto"]

LARGEST_TEAM = 8
"""Ranks that divide a matrix at the most: those of one node, commonly."""

SLACK = (1.0, 1.06, 1.12, 1.25, 1.5)
"""Busiest ranks that are tried, over the least that the sum of all costs allows."""


def with_teams(
    tasks: Sequence[MatrixTask], *, world_size: int, cost_model: CostModel
) -> list[MatrixTask]:
    """The matrices, the costliest of them in slabs where that shortens the predicted step.

    A matrix is divided among as few ranks as bring each member below a target, which is first the
    mean over all ranks. Members' costs are their FLOPs and what they exchange, in the units of
    FLOPs. Teams are placed on the least loaded ranks of one node, costliest first; single owners
    then fill what is left.

    Args:
        tasks: whole matrices.
        world_size: ranks of the group.
        cost_model: rates; what members exchange goes at that of a node.

    Returns:
        The tasks in the same order, some of them replaced by their slabs.
    """
    if world_size == 1 or not tasks:
        return list(tasks)
    owners = assign_owners(tasks, world_size=world_size, cost_model=cost_model, balance="flops")
    loads = [0] * world_size
    for task, of_task in zip(tasks, owners.owners, strict=True):
        for owner in of_task:
            loads[owner] += task.flops
    if max(loads) <= TOLERANCE * sum(loads) / world_size:
        return list(tasks)
    free = [is_free(task, world_size, cost_model) for task in tasks]
    fixed = sum(
        task.flops * len(of_task)
        for task, of_task, may_move in zip(tasks, owners.owners, free, strict=True)
        if not may_move
    )
    kinds: dict[object, _Kind] = {}
    for task, may_move in zip(tasks, free, strict=True):
        if may_move:
            kind = kinds.setdefault(_key(task), _Kind(task, world_size, cost_model))
            kind.count += 1
    least = _least_target(list(kinds.values()), fixed, world_size, max(loads))
    best, best_busiest = list(tasks), max(loads)
    for slack in SLACK:
        target = least * slack
        chosen = {key: kind.team_within(target) for key, kind in kinds.items()}
        divided, team_loads = _placed(tasks, free, kinds, chosen, world_size, cost_model)
        busiest = _busiest(divided, team_loads, world_size, cost_model)
        if busiest < best_busiest:
            best, best_busiest = divided, busiest
    return best


def _key(task: MatrixTask) -> object:
    return (task.rows, task.cols, task.flops, task.split, task.largest_team, _is_on_one_rank(task))


def _is_on_one_rank(task: MatrixTask) -> bool:
    """Whether a rank has all of the matrix, and sends nothing unless others compute it."""
    tiling = tiling_of(task)
    return tiling.is_stored_whole and len(tiling.whole_ranks) < task.layout.world_size


class _Kind:
    """Equal matrices, and what dividing one costs each member, in FLOPs."""

    def __init__(self, task: MatrixTask, world_size: int, cost_model: CostModel) -> None:
        self.task, self.count = task, 0
        self._cost_model = cost_model
        self._largest = min(LARGEST_TEAM, world_size, task.largest_team)

    @cached_property
    def teams(self) -> list[tuple[int, Team]]:
        """For each size, the cost of a member of the better of both kinds of team."""
        found = [(self.task.flops, Team(1, shares_products=False))]
        for size in range(2, self._largest + 1):
            both = (Team(size, shares) for shares in (True, False))
            found.append(min((self.cost(team), team) for team in both))
        return found

    def cost(self, team: Team) -> int:
        """Of the busiest member."""
        if team.size == 1:
            return self.task.flops
        split = self.task.split
        assert split is not None
        longest = -(-self.task.largest_team // team.size) * split.long // self.task.largest_team
        model = self._cost_model
        seconds = model.swap_seconds(
            split.swapped_bytes(team, 0), num_swaps=split.num_swaps(team), num_ranks=team.size
        )
        if _is_on_one_rank(self.task):
            seconds += model.send_seconds(2 * self.task.matrix_bytes, num_messages=2)
        return split.flops(team, 0, longest) + round(seconds * model.flops_per_second)

    def team_within(self, target: float) -> Team:
        """The smallest team whose members cost no more than a target, or the cheapest."""
        for cost, team in self.teams:
            if cost <= target:
                return team
        return min(self.teams)[1]


def _least_target(kinds: Sequence[_Kind], fixed: int, world_size: int, busiest: int) -> float:
    """The least target that all ranks together have room for, by bisection."""

    def fits(target: float) -> bool:
        total = fixed
        for kind in kinds:
            team = kind.team_within(target)
            total += kind.count * team.size * kind.cost(team)
        return total <= world_size * target

    low, high = 0.0, float(busiest)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


@dataclass(order=True, slots=True)
class _Node:
    """Ranks near each other, ordered by how loaded the fullest of the team's would be."""

    load: int
    first: int
    size: int


def _placed(
    tasks: Sequence[MatrixTask],
    free: Sequence[bool],
    kinds: dict[object, _Kind],
    chosen: dict[object, Team],
    world_size: int,
    cost_model: CostModel,
) -> tuple[list[MatrixTask], list[int]]:
    """The tasks with slabs for those whose kind is divided, and what teams cost each rank.

    A team goes to the node whose ranks are the least loaded.
    """
    waiting: dict[tuple[int, int], list[int]] = {}
    for index, task in enumerate(tasks):
        team = chosen[_key(task)] if free[index] else None
        if team is not None and team.size > 1:
            cost = kinds[_key(task)].cost(team)
            waiting.setdefault((-cost, team.size), []).append(index)
    loads = [0] * world_size
    slabs: dict[int, list[MatrixTask]] = {}
    for (negative, size), indices in sorted(waiting.items()):
        width = max(size, min(cost_model.ranks_per_node, world_size))
        firsts = range(0, world_size - width + 1, width)
        nodes = [_Node(_nth_load(loads, first, width, size), first, width) for first in firsts]
        heapq.heapify(nodes)
        for index in indices:
            node = nodes[0]
            members = range(node.first, node.first + width)
            ranks = sorted(sorted(members, key=lambda rank: (loads[rank], rank))[:size])
            for rank in ranks:
                loads[rank] -= negative
            node.load = _nth_load(loads, node.first, width, size)
            heapq.heapreplace(nodes, node)
            slabs[index] = tasks[index].slabs(chosen[_key(tasks[index])], ranks)
    return [part for i, task in enumerate(tasks) for part in slabs.get(i, [task])], loads


def _nth_load(loads: Sequence[int], first: int, width: int, size: int) -> int:
    return sorted(loads[first : first + width])[size - 1]


def _busiest(
    tasks: Sequence[MatrixTask], loads: Sequence[int], world_size: int, cost_model: CostModel
) -> int:
    """The cost of the busiest rank once single owners are placed beside the teams."""
    owners = assign_owners(tasks, world_size=world_size, cost_model=cost_model, balance="flops")
    costs = list(loads)
    for task, of_task in zip(tasks, owners.owners, strict=True):
        for owner in of_task if task.slab is None else ():
            costs[owner] += task.flops
    return max(costs)
