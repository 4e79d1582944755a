"""Everything that `normuon plan` says, as plain values: the plan, its rivals, traffic and memory.

The plan itself is the library's; the page and the text are `page.py`'s and `text.py`'s.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normuon import MatrixView, plan_for
from normuon.distributed.assignment import Balance
from normuon.distributed.balance import makespan_bound
from normuon.distributed.cost import CostModel
from normuon.distributed.layout import Placement, ShardLayout, layout_from_placements
from normuon.distributed.plan import Plan, make_plan
from normuon.distributed.teams import Teams
from normuon_lab.errors import InputError
from normuon_lab.plan.alternatives import (
    Figures,
    compute_everywhere,
    pad_to_world_size,
    reduce_over_shards,
)
from normuon_lab.plan.bounds import packing_bound
from normuon_lab.plan.figures import PlanFigures, figures_of, is_first, owners_in_words
from normuon_lab.plan.mesh import Mesh, placements_in_words
from normuon_lab.plan.model_matrices import ModelParam, ModelShapes

SCHEMA_VERSION = 1
FLOAT32_BYTES = 4
"""Weights, gradients, momentum and second moments are taken to be float32, as in the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What to plan for.

    Attributes:
        mesh: its sizes.
        balance: "flops" or the "paper"'s round-robin.
        bucket_bytes: bound on what a rank packs for one exchange.
        wire_dtype: dtype of matrices on the wire.
        cost_model: rates.
        teams: whether several ranks may divide a matrix.
    """

    mesh: Mesh
    balance: Balance
    bucket_bytes: int
    wire_dtype: str
    cost_model: CostModel
    teams: Teams = "off"


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model with its plan and the paper's, and what both add up to.

    Attributes:
        owners: the plan without teams, whose tasks are whole matrices.
    """

    model: ModelShapes
    request: PlanRequest
    plan: Plan
    figures: PlanFigures
    plan_seconds: float
    owners: Plan
    owners_seconds: float
    round_robin: Plan
    round_robin_figures: PlanFigures
    round_robin_seconds: float


def plan_model(model: ModelShapes, request: PlanRequest) -> PlannedModel:
    """Draw up the plan and, from the same matrices, the paper's.

    Raises:
        InputError: the mesh splits tensors and nothing says how this architecture is split.
    """
    mesh = request.mesh
    if mesh.tp > 1 and not model.has_tp_plan:
        raise InputError(
            f"--mesh: transformers has no tensor-parallel plan for {model.model_type}; leave tp out"
        )

    def planned(teams: Teams) -> tuple[Plan, float]:
        started = time.perf_counter()
        plan = plan_for(
            model.groups,
            mesh_shape=mesh.shape,
            placements=placements_of(model, mesh),
            cost_model=request.cost_model,
            balance=request.balance,
            bucket_bytes=request.bucket_bytes,
            teams=teams,
            wire_dtype=getattr(torch, request.wire_dtype),
        )
        return plan, time.perf_counter() - started

    plan, seconds = planned(request.teams)
    owners, owners_seconds = (plan, seconds) if request.teams == "off" else planned("off")
    started = time.perf_counter()
    round_robin = make_plan(
        owners.tasks,
        world_size=plan.world_size,
        cost_model=plan.cost_model,
        balance="paper",
        bucket_bytes=plan.bucket_bytes,
    )
    round_robin_seconds = time.perf_counter() - started
    return PlannedModel(
        model,
        request,
        plan,
        figures_of(plan),
        seconds,
        owners,
        owners_seconds,
        round_robin,
        figures_of(round_robin),
        round_robin_seconds,
    )


def placements_of(model: ModelShapes, mesh: Mesh) -> Callable[[str, Tensor], tuple[Placement, ...]]:
    """The placements of a model's parameters on a mesh, as `normuon.plan_for` takes them."""
    styles = {param.name: param.tp_style for param in model.params}
    return lambda name, param: mesh.placements(tuple(param.shape), styles[name])


def plan_contents(planned: PlannedModel) -> dict[str, Any]:
    """What `--json` prints; docs/lab/plan-schema.md says what each value is."""
    model, plan, request = planned.model, planned.plan, planned.request
    figures, costs = planned.figures, planned.owners.flops_by_matrix
    once = makespan_bound(costs, world_size=plan.world_size)
    packing = packing_bound(costs, world_size=plan.world_size)
    return {
        "kind": "normuon plan",
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": model.name,
            "model_type": model.model_type,
            "num_parameters": model.num_parameters,
            "num_hidden_parameters": model.num_hidden_parameters,
            "num_matrices": len(planned.owners.tasks),
            "split_heads": model.split_heads,
        },
        "mesh": dict(
            zip(("dp_replicate", "dp_shard", "tp"), request.mesh.shape, strict=True),
            world_size=plan.world_size,
        ),
        "settings": {
            "balance": request.balance,
            "teams": request.teams,
            "bucket_bytes": request.bucket_bytes,
            "wire_dtype": request.wire_dtype,
            "flops_per_second": plan.cost_model.flops_per_second,
            "bytes_per_second": plan.cost_model.bytes_per_second,
            "latency_seconds": plan.cost_model.latency_seconds,
            "node_bytes_per_second": plan.cost_model.node_bytes_per_second
            or plan.cost_model.bytes_per_second,
            "node_latency_seconds": plan.cost_model.node_latency_seconds,
            "ranks_per_node": plan.cost_model.ranks_per_node,
        },
        "digest": plan.digest(),
        "makespan_bound": once,
        "packing_bound": packing,
        "mean_flops": plan.mean_flops,
        **_scheme(plan, figures, once, packing, planned.plan_seconds),
        "alternatives": _alternatives(planned, once, packing),
        "traffic": traffic(model, request.mesh, plan, figures),
        "memory": memory(model, request.mesh, figures),
        "kinds": _kinds(planned),
        "buckets": [
            {
                "num_matrices": bucket.num_matrices,
                "compute_seconds": plan.cost_model.compute_seconds(bucket.flops),
                "gather_seconds": _exchange_seconds(plan, bucket.gather_bytes),
                "return_seconds": _exchange_seconds(plan, bucket.return_bytes),
                "team_seconds": bucket.team_seconds,
            }
            for bucket in figures.buckets
        ],
        "matrices": [
            {
                "name": task.name,
                "index": task.index,
                "rows": task.matrix_shape[0],
                "cols": task.matrix_shape[1],
                "owners": owners_in_words(plan, number),
            }
            for number, task in enumerate(plan.tasks)
            if is_first(task)
        ],
    }


def _scheme(
    plan: Plan, figures: PlanFigures, once: int, packing: int, plan_seconds: float
) -> dict[str, Any]:
    """The values that every way of distributing has, of one that is a plan."""
    busiest = max(plan.flops_by_rank)
    return {
        "num_orthogonalisations": sum(
            len(owners)
            for task, owners in zip(plan.tasks, plan.owners, strict=True)
            if is_first(task)
        ),
        "flops_by_rank": plan.flops_by_rank,
        "flops_by_matrix": plan.flops_by_matrix,
        "imbalance": busiest / once,
        "packing_imbalance": busiest / packing,
        "busiest_over_mean": busiest / plan.mean_flops,
        "bytes_sent_total": figures.bytes_sent_total,
        "bytes_least_total": figures.bytes_least_total,
        "bytes_sent_by_rank": figures.bytes_sent_by_rank,
        "bytes_sent_busiest": max(figures.bytes_sent_by_rank),
        "scratch_bytes_max": figures.scratch_bytes_max,
        "num_buckets": len(plan.buckets),
        "predicted_step_seconds": figures.predicted_step_seconds,
        "plan_seconds": plan_seconds,
    }


def _alternatives(planned: PlannedModel, once: int, packing: int) -> dict[str, dict[str, Any]]:
    least = planned.figures.bytes_least_total
    found = {
        "round_robin": _scheme(
            planned.round_robin,
            planned.round_robin_figures,
            once,
            packing,
            planned.round_robin_seconds,
        )
    }
    found["round_robin"]["description"] = "sorted by element count, dealt round-robin (the paper)"
    # One yardstick for all: what the plan's owners must send.
    found["round_robin"]["bytes_least_total"] = least
    if planned.request.teams != "off":
        owners = planned.owners
        found["owners"] = {
            **_scheme(owners, figures_of(owners), once, packing, planned.owners_seconds),
            "description": "one owner for each matrix",
            "bytes_least_total": least,
        }
    counts: tuple[tuple[str, str, Callable[[Plan, int], Figures]], ...] = (
        ("replicate", "every rank gathers and computes every matrix", compute_everywhere),
        ("padding", "same-shape groups padded to the number of ranks", pad_to_world_size),
        ("all_reduce", "shards stay, one all-reduce of a Gram matrix a step", reduce_over_shards),
    )
    for name, description, count in counts:
        started = time.perf_counter()
        figures = count(planned.owners, once)
        found[name] = {
            "num_orthogonalisations": figures.num_orthogonalisations,
            "flops_by_rank": figures.flops_by_rank,
            "flops_by_matrix": planned.owners.flops_by_matrix,
            "imbalance": figures.imbalance,
            "packing_imbalance": figures.flops_busiest / packing,
            "busiest_over_mean": figures.flops_busiest / planned.plan.mean_flops,
            "bytes_sent_total": figures.bytes_sent_total,
            "bytes_least_total": least,
            "bytes_sent_busiest": -(-figures.bytes_sent_total // planned.plan.world_size),
            "scratch_bytes_max": figures.scratch_bytes_max,
            "predicted_step_seconds": figures.predicted_step_seconds,
            "plan_seconds": time.perf_counter() - started,
            "description": description,
        }
    return found


def _exchange_seconds(plan: Plan, num_bytes: int) -> float:
    return plan.cost_model.send_seconds(num_bytes) if num_bytes else 0.0


def traffic(model: ModelShapes, mesh: Mesh, plan: Plan, figures: PlanFigures) -> dict[str, Any]:
    """A step's bytes beside those of data-parallel training with AdamW, counted in two ways.

    On the wire: float32 weights gathered for forward and for backward and float32 gradients
    reduce-scattered over `dp_shard`, each sending (S - 1) times what is sharded, then averaged over
    `dp_replicate` by a ring, sending 2 (R - 1) times it. Activations are left out.

    As the paper counts, a parameter costs 4 + 4 + 4 = 12 bytes, and a hidden matrix twice the wire
    dtype more, however many ranks receive it.
    """
    shards, replicas = mesh.dp_shard, mesh.dp_replicate
    on_the_wire = 0
    for param in model.params:
        placements = mesh.placements(param.shape, param.tp_style)
        copies = 1 if len(placements[2]) > 1 else mesh.tp
        passes = 3 * (shards - 1) * replicas + 2 * (replicas - 1)
        on_the_wire += FLOAT32_BYTES * param.numel * copies * passes
    extra = 2 * plan.tasks[0].wire_bytes

    def paper(weight_bytes: int) -> dict[str, float]:
        # Gradients travel in float32 either way.
        base = 2 * weight_bytes + FLOAT32_BYTES
        share = model.num_hidden_parameters / model.num_parameters
        return {
            "adamw_bytes_per_parameter": base,
            "normuon_bytes_per_hidden_parameter": base + extra,
            "increase_percent": 100 * extra / base,
            "whole_model_increase_percent": 100 * share * extra / base,
        }

    return {
        "adamw_bytes_sent_total": on_the_wire,
        "normuon_bytes_sent_total": on_the_wire + figures.bytes_sent_total,
        "increase_percent": 100 * figures.bytes_sent_total / on_the_wire if on_the_wire else None,
        "paper_accounting": {"float32_weights": paper(4), "bfloat16_weights": paper(2)},
    }


def memory(model: ModelShapes, mesh: Mesh, figures: PlanFigures) -> dict[str, Any]:
    """Optimizer state of the fullest rank in float32, beside AdamW's, and scratch of a step.

    Hidden matrices keep the momentum and one number per neuron (m n + m), the rest AdamW's two
    moments. Neurons are replicated where columns are split.
    """
    kinds = Counter(
        (_layout(param, mesh), _neuron_dims(param.view, param.shape)) for param in model.params
    )
    state, adamw = [0] * mesh.world_size, [0] * mesh.world_size
    for (layout, dims), count in kinds.items():
        for rank in range(mesh.world_size):
            numel = math.prod(layout.local_shape(rank))
            own = 2 * numel if dims is None else numel + _num_neurons(layout, rank, dims)
            state[rank] += FLOAT32_BYTES * count * own
            adamw[rank] += FLOAT32_BYTES * count * 2 * numel
    return {
        "state_bytes_max": max(state),
        "state_bytes_total": sum(state),
        "adamw_state_bytes_max": max(adamw),
        "adamw_state_bytes_total": sum(adamw),
        "scratch_bytes_max": figures.scratch_bytes_max,
    }


def _layout(param: ModelParam, mesh: Mesh) -> ShardLayout:
    return layout_from_placements(
        param.shape,
        mesh_shape=mesh.shape,
        placements=mesh.placements(param.shape, param.tp_style),
    )


def _neuron_dims(view: MatrixView | None, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return None if view is None else view.vector_dims(shape, lambda m, n: -2)


def _num_neurons(layout: ShardLayout, rank: int, dims: Iterable[int]) -> int:
    shape = layout.local_shape(rank)
    return math.prod(shape[dim] for dim in dims)


def _kinds(planned: PlannedModel) -> list[dict[str, Any]]:
    """Matrices of one shape, placement and reason together."""
    plan, mesh = planned.plan, planned.request.mesh
    params: Mapping[str, ModelParam] = {param.name: param for param in planned.model.params}
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, task in enumerate(plan.tasks):
        placements = mesh.placements(task.layout.global_shape, params[task.name].tp_style)
        shown = placements_in_words(
            [p for p, size in zip(placements, mesh.shape, strict=True) if size > 1]
        )
        leaf = task.name.removesuffix(".weight").rpartition(".")[2]
        rows, cols = task.matrix_shape
        key = (rows, cols, task.layout.global_shape, shown, plan.reasons[number])
        groups.setdefault((leaf, *key), []).append(number)
    return [
        {
            "parameter": leaf,
            "num_matrices": sum(is_first(plan.tasks[number]) for number in numbers),
            "team_size": _team_size(plan, numbers[0]),
            "rows": rows,
            "cols": cols,
            "parameter_shape": shape,
            "placements": shown,
            "flops_each": max(plan.flops_by_matrix[number] for number in numbers),
            "num_owners": len({owner for n in numbers for owner in plan.owners[n]}),
            "reason": reason,
        }
        for (leaf, rows, cols, shape, shown, reason), numbers in groups.items()
    ]


def _team_size(plan: Plan, number: int) -> int:
    slab = plan.tasks[number].slab
    return 1 if slab is None else slab.team.size
