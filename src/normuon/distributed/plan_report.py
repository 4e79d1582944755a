"""A plan's figures as JSON for programs and as a table for people.

Decides nothing; every number is the plan's own.
"""

from __future__ import annotations

import json
import math
from typing import Any

from normuon.distributed.cost import format_bytes
from normuon.distributed.plan_record import PlanRecord


def plan_to_json(plan: PlanRecord, *, digest: str) -> str:
    """Figures, owners and buckets as JSON with sorted keys; says nothing that varies between runs.

    Owners of a matrix are one rank, a list with one rank per replica, or "everywhere".
    """
    content: dict[str, Any] = {
        "digest": digest,
        "world_size": plan.world_size,
        "balance": plan.balance,
        "bucket_bytes": plan.bucket_bytes,
        "num_matrices": len(plan.tasks),
        "flops_total": sum(plan.flops_by_rank),
        "flops_busiest": max(plan.flops_by_rank),
        "makespan_bound": plan.makespan_bound,
        "packing_bound": plan.packing_bound,
        "imbalance": plan.imbalance,
        "bytes_sent_total": plan.bytes_sent_total,
        "bytes_least_total": plan.bytes_least_total,
        "bytes_sent_busiest": max(plan.bytes_sent_by_rank),
        "bytes_received_busiest": max(plan.bytes_received_by_rank),
        "scratch_bytes_max": plan.scratch_bytes_max,
        "predicted_step_seconds": plan.predicted_step_seconds,
        "matrices": [
            {
                "name": task.name,
                "index": task.index,
                "rows": task.rows,
                "cols": task.cols,
                "flops": plan.flops_by_matrix[index],
                "owners": owners_in_words(plan, index),
                "reason": plan.reasons[index],
            }
            for index, task in enumerate(plan.tasks)
        ],
        "buckets": [
            {
                "matrices": bucket.tasks,
                "flops_busiest": bucket.flops,
                "gather_bytes_busiest": bucket.gather_bytes,
                "return_bytes_busiest": bucket.return_bytes,
                "scratch_bytes": bucket.scratch_bytes,
            }
            for bucket in plan.buckets
        ],
    }
    return json.dumps(content, sort_keys=True)


def owners_in_words(plan: PlanRecord, task: int) -> int | str | list[int]:
    """One rank, "everywhere", or one rank per replica."""
    owners = plan.owners[task]
    if len(owners) == 1:
        return owners[0]
    return "everywhere" if len(owners) == plan.world_size else list(owners)


def describe_plan(plan: PlanRecord, *, digest: str, num_buckets: int = 8) -> str:
    """The plan as text: totals, one line per kind of matrix, one per bucket.

    Args:
        plan: what to describe.
        digest: the plan's, of which the first 16 digits are shown.
        num_buckets: how many buckets to list.
    """
    lines = [*_totals(plan, digest), "", *_kinds(plan), "", *_bucket_lines(plan, num_buckets)]
    return "\n".join(lines)


def _totals(plan: PlanRecord, digest: str) -> list[str]:
    busiest, mean = max(plan.flops_by_rank), sum(plan.flops_by_rank) / plan.world_size
    idle = sum(load == 0 for load in plan.flops_by_rank)
    overhead = plan.bytes_sent_total - plan.bytes_least_total
    return [
        f"{len(plan.tasks)} matrices on {plan.world_size} ranks, balance={plan.balance}, "
        f"{len(plan.buckets)} buckets of at most {format_bytes(plan.bucket_bytes)}",
        f"compute   busiest rank {busiest / 1e9:.4g} GFLOP, mean {mean / 1e9:.4g}, "
        f"{plan.imbalance:.3f} of the makespan bound, {plan.packing_imbalance:.3f} of the packing "
        f"bound, {idle} ranks idle",
        f"traffic   {format_bytes(plan.bytes_sent_total)} sent in all, of which "
        f"{format_bytes(overhead)} second moments, flags and scales; busiest rank sends "
        f"{format_bytes(max(plan.bytes_sent_by_rank))}",
        f"memory    {format_bytes(plan.scratch_bytes_max)} for one bucket on the fullest owner",
        f"predicted {1e3 * plan.predicted_step_seconds:.3g} ms a step; "
        f"planned in {1e3 * plan.plan_seconds:.0f} ms; digest {digest[:16]}",
    ]


def _kinds(plan: PlanRecord) -> list[str]:
    groups: dict[tuple[int, int, str], list[int]] = {}
    for index, task in enumerate(plan.tasks):
        groups.setdefault((task.rows, task.cols, plan.reasons[index]), []).append(index)
    lines = [f"{'matrices':>8}  {'shape':>14}  {'GFLOP each':>10}  {'owners':<14}  why"]
    for (rows, cols, reason), indices in groups.items():
        owners = sorted({owner for index in indices for owner in plan.owners[index]})
        is_everywhere = len(plan.owners[indices[0]]) == plan.world_size > 1
        where = "everywhere" if is_everywhere else f"{len(owners)} ranks"
        gigaflops = plan.flops_by_matrix[indices[0]] / 1e9
        cells = f"{len(indices):>8}  {f'{rows} x {cols}':>14}  {gigaflops:>10.4g}  {where:<14}"
        lines.append(f"{cells}  {reason}")
    return lines


def _bucket_lines(plan: PlanRecord, num_buckets: int) -> list[str]:
    header = ("bucket", "matrices", "GFLOP busiest", "gather busiest", "return busiest", "memory")
    lines = ["  ".join(f"{word:>{max(8, len(word))}}" for word in header)]
    for number, bucket in enumerate(plan.buckets[:num_buckets]):
        cells = (
            str(number),
            str(len(bucket.tasks)),
            f"{bucket.flops / 1e9:.4g}",
            format_bytes(bucket.gather_bytes),
            format_bytes(bucket.return_bytes),
            format_bytes(bucket.scratch_bytes),
        )
        pairs = zip(header, cells, strict=True)
        lines.append("  ".join(f"{cell:>{max(8, len(word))}}" for word, cell in pairs))
    left = len(plan.buckets) - num_buckets
    if left > 0:
        rest = math.fsum(bucket.flops for bucket in plan.buckets[num_buckets:]) / 1e9
        lines.append(f"... and {left} more with {rest:.4g} GFLOP on their busiest ranks")
    return lines
