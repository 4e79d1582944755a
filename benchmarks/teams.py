"""A matrix divided among ranks, beside one owner: FLOPs by rank, and time.

Ranks are Gloo processes with one thread each, which hold one large matrix sharded by rows. FLOPs
are counted by torch's FLOP counter and compared with the plan's. Steps of both kinds take turns in
one run; the ratio is of their medians.

    python benchmarks/teams.py --out benchmarks/results/teams.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from normuon import NorMuon
from normuon.distributed.cost import CostModel
from normuon.step.shared_params import SharedParams
from normuon_lab.machine import describe_machine, utc_now

COMMAND = "python benchmarks/teams.py --out benchmarks/results/teams.json"
SHAPES = ((4096, 1024), (2048, 2048))
COUNTED_ON = (4, 8)
TIMED_ON = 2
FREE = CostModel(
    flops_per_second=1.0, bytes_per_second=1e18, latency_seconds=0.0, node_latency_seconds=0.0
)
"""Rates by which all ranks divide the matrix, whatever the machine's own would advise."""


def main() -> None:
    """Measure, print, and write where told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each kind")
    parser.add_argument("--port", type=int, default=29571)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "command": COMMAND,
        "created": utc_now(),
        "machine": describe_machine(num_workers=1),
        "flops": [],
        "seconds": [],
    }
    for shape in SHAPES:
        for world_size in COUNTED_ON:
            rows = on_ranks(world_size, arguments.port, shape, 0)
            record["flops"] += [{"shape": shape, "ranks": world_size, "by_rank": rows}]
            equal = all(row["counted"] == row["planned"] for row in rows)
            most, whole = max(row["counted"] for row in rows), rows[0]["whole"]
            print(
                f"{shape[0]} x {shape[1]} on {world_size} ranks: FLOPs by rank "
                f"{'equal' if equal else 'DIFFER FROM'} the plan's; the busiest rank has "
                f"{most / whole:.3f} of one owner's, 1 / ranks is {1 / world_size:.3f}",
                flush=True,
            )
    for shape in SHAPES:
        (row, *_) = on_ranks(TIMED_ON, arguments.port, shape, arguments.repeats)
        medians = {kind: statistics.median(row[kind]) for kind in ("team", "owner")}
        row |= {"shape": shape, "ranks": TIMED_ON, "ratio": medians["team"] / medians["owner"]}
        record["seconds"].append(row)
        print(
            f"{shape[0]} x {shape[1]} on {TIMED_ON} ranks: {1e3 * medians['team']:.0f} ms divided, "
            f"{1e3 * medians['owner']:.0f} ms by one owner, ratio {row['ratio']:.3f}",
            flush=True,
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def on_ranks(world_size: int, port: int, shape: tuple[int, int], repeats: int) -> list[Any]:
    """What every rank has measured: FLOPs where nothing is repeated, seconds otherwise."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(run_rank, (world_size, port, shape, repeats, queue), nprocs=world_size)
    rows = dict(queue.get() for _ in range(world_size))
    return [rows[rank] for rank in range(world_size)]


def run_rank(
    rank: int, world_size: int, port: int, shape: tuple[int, int], repeats: int, queue: Any
) -> None:
    """One rank: builds both optimizers, counts or times their steps, and reports."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    weight, gradient = torch.randn(shape), torch.randn(shape)
    steps: dict[str, Callable[[], None]] = {}
    plans = {}
    for kind, teams in (("team", "auto"), ("owner", "off")):
        param = nn.Parameter(distribute_tensor(weight.clone(), mesh, [Shard(0)]))
        param.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        optimizer = NorMuon([param], lr=1e-3, ns_dtype=torch.float32, teams=teams)
        with mock.patch.object(SharedParams, "cost_model", return_value=FREE):
            optimizer.step()
        (planned,) = optimizer._planned_steps()
        plans[kind] = planned.plan
        steps[kind] = optimizer.step
    assert all(task.slab is not None for task in plans["team"].tasks)
    if not repeats:
        with FlopCounterMode(display=False) as counted:
            steps["team"]()
        row: dict[str, Any] = {
            "counted": counted.get_total_flops(),
            "planned": plans["team"].flops_by_rank[rank],
            "whole": plans["owner"].tasks[0].flops,
        }
    else:
        row = {kind: [] for kind in steps}
        for step in steps.values():
            step()
        for _ in range(repeats):
            for kind, step in steps.items():
                dist.barrier()
                started = time.perf_counter()
                step()
                dist.barrier()  # The step ends when the last rank has what it stores.
                row[kind].append(time.perf_counter() - started)
    queue.put((rank, row))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
