"""The packing bound never exceeds the best makespan and settles what the makespan bound leaves."""

from __future__ import annotations

import random

from normuon.distributed.balance import makespan_bound
from normuon_lab.plan.bounds import packing_bound


def best_makespan(costs: list[int], world_size: int) -> int:
    """By trying everything, each load once."""
    best = sum(costs)

    def place(rest: list[int], loads: list[int]) -> None:
        nonlocal best
        if max(loads) >= best:
            return
        if not rest:
            best = max(loads)
            return
        for load in set(loads):
            taken = list(loads)
            taken[loads.index(load)] += rest[0]
            place(rest[1:], taken)

    place(sorted(costs, reverse=True), [0] * world_size)
    return best


def test_it_lies_between_the_makespan_bound_and_the_best_makespan():
    choose = random.Random(0)
    num_tight = 0
    for _ in range(500):
        world_size = choose.randint(1, 4)
        costs = choose.choices([1, 2, 3, 5, 7, 11, 13, 20], k=choose.randint(1, 9))
        best = best_makespan(costs, world_size)
        bound = packing_bound(costs, world_size=world_size)
        assert makespan_bound(costs, world_size=world_size) <= bound <= best, (costs, world_size)
        num_tight += bound == best
    assert num_tight > 450


def test_one_large_cost_on_every_rank_leaves_a_smaller_packing():
    """Mixtral 8x7B on 256 ranks: each has one gate_up and one down, so some have a q or o too."""
    gate_up, down, q_or_o, k_or_v = 122_880, 65_536, 24_576, 1_152
    costs = [gate_up] * 256 + [down] * 256 + [q_or_o] * 64 + [k_or_v] * 64
    assert makespan_bound(costs, world_size=256) == 194_848
    assert packing_bound(costs, world_size=256) == gate_up + down + q_or_o
