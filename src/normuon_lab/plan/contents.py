"""The output of `normuon plan` as plain values: the plan, alternatives, traffic, memory."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from normuon import plan_for
from normuon.distributed.assignment import Balance
from normuon.distributed.balance import makespan_bound
from normuon.distributed.cost import CostModel
from normuon.distributed.layout import ShardLayout, layout_from_placements
from normuon.distributed.plan import Plan, make_plan
from normuon.distributed.teams import Teams
from normuon_lab.errors import InputError
from normuon_lab.plan.alternatives import ALTERNATIVES
from normuon_lab.plan.bounds import packing_bound
from normuon_lab.plan.figures import (
    Figures,
    exchange_seconds,
    figures_of,
    is_first,
    owners_in_words,
)
from normuon_lab.plan.mesh import Mesh, placements_in_words
from normuon_lab.plan.model_matrices import ModelParam, ModelShapes

SCHEMA_VERSION = 1
FLOAT32_BYTES = 4
"""Weights, gradients, momentum and second moments are taken to be float32, as in the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What to plan for, in the words of `normuon.plan_for`."""

    mesh: Mesh
    balance: Balance
    bucket_bytes: int
    wire_dtype: str
    cost_model: CostModel
    teams: Teams = "off"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A plan, its totals, and the seconds that planning took."""

    plan: Plan
    figures: Figures
    seconds: float


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model with its plan and others from the same matrices.

    Attributes:
        model: its parameters.
        request: what was asked.
        asked: the plan that was asked for.
        owners: the plan without teams, whose tasks are whole matrices.
        round_robin: the paper's plan, from the tasks of `owners`.
    """

    model: ModelShapes
    request: PlanRequest
    asked: Drawn
    owners: Drawn
    round_robin: Drawn


def plan_model(model: ModelShapes, request: PlanRequest) -> PlannedModel:
    """Make the plan and, from the same matrices, the paper's.

    Raises:
        InputError: the mesh splits tensors, but this architecture has no tensor-parallel plan.
    """
    mesh = request.mesh
    if mesh.tp > 1 and not model.has_tp_plan:
        raise InputError(
            f"--mesh: transformers has no tensor-parallel plan for {model.model_type}; leave tp out"
        )

    def drawn(make: Callable[..., Plan], *given: Any, **options: Any) -> Drawn:
        started = time.perf_counter()
        plan = make(
            *given,
            cost_model=request.cost_model,
            bucket_bytes=request.bucket_bytes,
            **options,
        )
        seconds = time.perf_counter() - started
        return Drawn(plan, figures_of(plan), seconds)

    styles = {param.name: param.tp_style for param in model.params}
    by_library = partial(
        drawn,
        plan_for,
        model.groups,
        mesh_shape=mesh.shape,
        placements=lambda name, param: mesh.placements(tuple(param.shape), styles[name]),
        balance=request.balance,
        wire_dtype=getattr(torch, request.wire_dtype),
    )
    asked = by_library(teams=request.teams)
    owners = asked if request.teams == "off" else by_library(teams="off")
    round_robin = drawn(make_plan, owners.plan.tasks, world_size=mesh.world_size, balance="paper")
    return PlannedModel(model, request, asked, owners, round_robin)


def plan_contents(planned: PlannedModel) -> dict[str, Any]:
    """What `--json` prints; docs/lab/plan-schema.md says what each value is."""
    model, request = planned.model, planned.request
    plan, figures = planned.asked.plan, planned.asked.figures
    costs = planned.owners.plan.flops_by_matrix
    bound = makespan_bound(costs, world_size=plan.world_size)
    packing = packing_bound(costs, world_size=plan.world_size)
    scheme = partial(_scheme, bound=bound, packing=packing, least=figures.bytes_least_total)
    return {
        "kind": "normuon plan",
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": model.name,
            "model_type": model.model_type,
            "num_parameters": model.num_parameters,
            "num_hidden_parameters": model.num_hidden_parameters,
            "num_matrices": len(planned.owners.plan.tasks),
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
        "makespan_bound": bound,
        "packing_bound": packing,
        "mean_flops": plan.mean_flops,
        **scheme(planned.asked),
        "alternatives": _alternatives(planned, scheme),
        "traffic": traffic(model, request.mesh, plan, figures),
        "memory": memory(model, request.mesh, figures),
        "kinds": _kinds(planned),
        "buckets": [
            {
                "num_matrices": bucket.num_matrices,
                "compute_seconds": plan.cost_model.compute_seconds(bucket.flops),
                "gather_seconds": exchange_seconds(plan.cost_model, bucket.gather_bytes),
                "return_seconds": exchange_seconds(plan.cost_model, bucket.return_bytes),
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
    drawn: Drawn, *, bound: int, packing: int, least: int, description: str | None = None
) -> dict[str, Any]:
    """The values that every way of distributing has; `least` is the same bound for all."""
    figures, plan = drawn.figures, drawn.plan
    busiest = max(figures.flops_by_rank)
    by_rank = figures.bytes_sent_by_rank
    evenly = -(-figures.bytes_sent_total // plan.world_size)
    values = {
        "num_orthogonalisations": figures.num_orthogonalisations,
        "flops_by_rank": figures.flops_by_rank,
        "flops_by_matrix": plan.flops_by_matrix,
        "imbalance": busiest / bound,
        "packing_imbalance": busiest / packing,
        "busiest_over_mean": busiest / plan.mean_flops,
        "bytes_sent_total": figures.bytes_sent_total,
        "bytes_least_total": least,
        "bytes_sent_by_rank": by_rank,
        "bytes_sent_busiest": evenly if by_rank is None else max(by_rank),
        "scratch_bytes_max": figures.scratch_bytes_max,
        "num_buckets": None if by_rank is None else len(plan.buckets),
        "predicted_step_seconds": figures.predicted_step_seconds,
        "plan_seconds": drawn.seconds,
        "description": description,
    }
    return {name: value for name, value in values.items() if value is not None}


def _alternatives(
    planned: PlannedModel, scheme: Callable[..., dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    found = {
        "round_robin": scheme(
            planned.round_robin,
            description="sorted by element count, dealt round-robin (the paper)",
        )
    }
    if planned.request.teams != "off":
        found["owners"] = scheme(planned.owners, description="one owner for each matrix")
    plan = planned.owners.plan
    for name, (description, count) in ALTERNATIVES.items():
        started = time.perf_counter()
        figures = count(plan)
        drawn = Drawn(plan, figures, time.perf_counter() - started)
        found[name] = scheme(drawn, description=description)
    return found


def traffic(model: ModelShapes, mesh: Mesh, plan: Plan, figures: Figures) -> dict[str, Any]:
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


def memory(model: ModelShapes, mesh: Mesh, figures: Figures) -> dict[str, Any]:
    """Optimizer state of the fullest rank in float32, beside AdamW's, and scratch of a step.

    Hidden matrices keep the momentum and one number per neuron (m n + m), the rest AdamW's two
    moments. Neurons are replicated where columns are split.
    """
    kinds: Counter[tuple[ShardLayout, tuple[int, ...] | None]] = Counter()
    for param in model.params:
        placements = mesh.placements(param.shape, param.tp_style)
        layout = layout_from_placements(param.shape, mesh_shape=mesh.shape, placements=placements)
        view = param.view
        neurons = None if view is None else view.vector_dims(param.shape, lambda m, n: -2)
        kinds[layout, neurons] += 1
    state, adamw = [0] * mesh.world_size, [0] * mesh.world_size
    for (layout, dims), count in kinds.items():
        for rank in range(mesh.world_size):
            shape = layout.local_shape(rank)
            numel = math.prod(shape)
            own = 2 * numel if dims is None else numel + math.prod(shape[dim] for dim in dims)
            state[rank] += FLOAT32_BYTES * count * own
            adamw[rank] += FLOAT32_BYTES * count * 2 * numel
    return {
        "state_bytes_max": max(state),
        "state_bytes_total": sum(state),
        "adamw_state_bytes_max": max(adamw),
        "adamw_state_bytes_total": sum(adamw),
        "scratch_bytes_max": figures.scratch_bytes_max,
    }


def _kinds(planned: PlannedModel) -> list[dict[str, Any]]:
    """Matrices of one shape, placement and reason together."""
    plan, mesh = planned.asked.plan, planned.request.mesh
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
            "team_size": 1 if (slab := plan.tasks[numbers[0]].slab) is None else slab.team.size,
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
