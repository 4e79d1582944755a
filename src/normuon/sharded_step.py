"""The step of matrices that several ranks share: one owner each, every shard stepped where it lies.

Packs directions for the owners, lets them do what needs whole matrices (`whole_matrix.py`), and
steps this rank's shards with what comes back. The order of the stages is `pipeline`'s, the messages
are `exchange`'s, the owners are the plan's. Shapes as in `rule.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from normuon import rule
from normuon.distributed.agreement import check_agreement
from normuon.distributed.assignment import Balance
from normuon.distributed.exchange import BucketRoutes, Slots, bucket_routes
from normuon.distributed.pipeline import NUM_SLOTS, run_pipeline
from normuon.distributed.plan import make_plan
from normuon.distributed.region import Region
from normuon.distributed.routes import Direction, Route
from normuon.distributed.task import MatrixTask
from normuon.matrix_step import matrices_per_batch
from normuon.matrix_tasks import as_matrices, as_native
from normuon.options import MatrixOptions
from normuon.orthogonalize import Workspace
from normuon.sharded_params import (
    GRADIENT,
    NO_GRADIENT,
    NONFINITE,
    ShardedParam,
    cost_model_for,
    flag_nonfinite,
    idle_second_moment_axes,
    local_tensor,
)
from normuon.whole_matrix import update_whole_matrices

UNTOUCHED = -1.0
"""Returned as a matrix's scale when the step must leave it and its state alone; scales are >= 0."""


@dataclass(slots=True)
class LocalStep:
    """One parameter's local tensors and options for the step at hand.

    Args:
        deferred: whether the momentum can only be advanced once the owner has spoken: there is no
            gradient here, or another rank's may be non-finite.
    """

    entry: ShardedParam
    options: MatrixOptions
    weight: Tensor
    grad: Tensor | None
    momentum: Tensor
    v: Tensor | None
    deferred: bool


class ShardedStep:
    """Steps the matrices that the ranks of one group share, by a plan drawn up once."""

    def __init__(
        self, params: Sequence[ShardedParam], *, balance: Balance, bucket_bytes: int
    ) -> None:
        """Draws up the plan, proves that all ranks drew up the same, and lays out the messages.

        Raises:
            ValueError: ranks differ in their parameters or options; on every rank.
        """
        self.params = list(params)
        self.group = params[0].shards.group
        self.device = local_tensor(params[0].param).device
        self.rank = dist.get_rank(self.group)
        # For each of the plan's tasks, the parameter it is part of and its place there.
        self.places: list[tuple[int, int]] = []
        tasks: list[MatrixTask] = []
        for number, entry in enumerate(self.params):
            found = entry.tasks()
            tasks += found
            self.places += [(number, index) for index in range(len(found))]
        self.plan = make_plan(
            tasks,
            world_size=dist.get_world_size(self.group),
            cost_model=cost_model_for(self.params),
            balance=balance,
            bucket_bytes=bucket_bytes,
        )
        check_agreement(self.group, self.plan.canonical(), device=self.device)
        self.gathers = self._bucket_routes("gather")
        self.returns = self._bucket_routes("return")
        self.idle_axes = [idle_second_moment_axes(entry) for entry in self.params]
        self.steps: list[LocalStep] = []
        self.skipped: Tensor | None = None
        self.workspace = Workspace()

    def _bucket_routes(self, direction: Direction) -> list[BucketRoutes]:
        return bucket_routes(
            self.plan,
            group=self.group,
            direction=direction,
            device=self.device,
            num_slots=NUM_SLOTS,
        )

    def step_(self) -> None:
        """Lines 2 to 7 for every matrix of the group. Every rank calls it at every step."""
        groups = {id(entry.group): entry.group for entry in self.params}
        options = {key: MatrixOptions.from_group(group) for key, group in groups.items()}
        self.steps = [_local_step(entry, options[id(entry.group)]) for entry in self.params]
        counts = any(step.options.skip_nonfinite for step in self.steps)
        self.skipped = (
            torch.zeros(len(self.plan.tasks), dtype=torch.int32, device=self.device)
            if counts
            else None
        )
        for step in self.steps:
            if step.grad is not None and not step.deferred:
                rule.update_momentum_(
                    step.momentum, _ascending(step), momentum_beta=step.options.momentum
                )
        run_pipeline(self, len(self.plan.buckets))
        self._share_idle_second_moments()
        self._count_skipped()
        self.steps = []

    # The stages of one bucket, called by the pipeline.

    def start_gather(self, bucket: int) -> None:
        routes = self.gathers[bucket]
        for route, slots in routes.outgoing:
            self._pack(route, slots)
        if routes.exchange is not None:
            routes.exchange.start()

    def finish_gather(self, bucket: int) -> None:
        _finish(self.gathers[bucket])

    def compute(self, bucket: int) -> None:
        arrived: dict[int, list[tuple[Route, Slots]]] = {}
        for route, slots in self.gathers[bucket].incoming:
            arrived.setdefault(route.task, []).append((route, slots))
        for route in self.gathers[bucket].local:
            slots = _empty_slots(route, self.plan.tasks[route.task], self.device)
            self._pack(route, slots)
            arrived.setdefault(route.task, []).append((route, slots))
        returned: dict[int, list[tuple[Route, Slots]]] = {}
        for route, slots in self.returns[bucket].outgoing:
            returned.setdefault(route.task, []).append((route, slots))
        kept: list[tuple[Route, Slots]] = []
        for route in self.returns[bucket].local:
            slots = _empty_slots(route, self.plan.tasks[route.task], self.device)
            kept.append((route, slots))
            returned.setdefault(route.task, []).append((route, slots))
        for batch in self._batches(bucket):
            self._compute_batch(batch, arrived, returned)
        self._apply(kept)

    def start_return(self, bucket: int) -> None:
        exchange = self.returns[bucket].exchange
        if exchange is not None:
            exchange.start()

    def finish_return(self, bucket: int) -> None:
        _finish(self.returns[bucket])

    def apply(self, bucket: int) -> None:
        self._apply(self.returns[bucket].incoming)

    # To the owners.

    def _step_of(self, task: int) -> LocalStep:
        return self.steps[self.places[task][0]]

    def _pack(self, route: Route, slots: Slots) -> None:
        """Fills in a piece's direction (line 2 done), its rows of v, and its flag."""
        step = self._step_of(route.task)
        at = step.entry.shards.local_slices(route.region)
        momentum = step.momentum[at]
        grad = None if step.grad is None else _ascending(step, at)
        if step.deferred:
            momentum = _advanced(momentum, grad, step.options)
        direction = momentum
        if step.options.nesterov:
            seen = torch.zeros_like(momentum) if grad is None else grad
            direction = rule.nesterov_direction(momentum, seen, momentum_beta=step.options.momentum)
        slots.elements.view(route.region.shape).copy_(direction)
        if route.num_neurons:
            assert step.v is not None
            v = step.v[step.entry.second_moment_slices(route.region)]
            slots.neurons.copy_(v.reshape(-1))
        if route.num_scalars:
            _write_flag(slots.scalars, grad, step.options)

    # At the owners.

    def _batches(self, bucket: int) -> Iterator[tuple[int, ...]]:
        for batch in self.plan.batches(self.rank, bucket):
            step = self._step_of(batch[0])
            task = self.plan.tasks[batch[0]]
            limit = matrices_per_batch(
                task.rows,
                task.cols,
                ns_dtype=step.entry.ns_dtype,
                param_dtype=step.weight.dtype,
                device_type=self.device.type,
                max_scratch_bytes=step.options.max_scratch_bytes,
            )
            for start in range(0, len(batch), limit):
                yield batch[start : start + limit]

    def _compute_batch(
        self,
        batch: tuple[int, ...],
        arrived: dict[int, list[tuple[Route, Slots]]],
        returned: dict[int, list[tuple[Route, Slots]]],
    ) -> None:
        """Lines 3, 4 and 6 for whole matrices of one shape, from their pieces and back."""
        first = self.plan.tasks[batch[0]]
        step = self._step_of(batch[0])
        entry = step.entry
        neuron_shape = first.region.along(first.neuron_dims).shape
        side = torch.empty(0, dtype=entry.side_dtype, device=self.device)
        direction = torch.empty(
            (len(batch), *first.region.shape), dtype=entry.wire_dtype, device=self.device
        )
        v = side.new_empty((len(batch), *neuron_shape)) if first.neuron_dims else None
        flags = side.new_empty(len(batch))
        for index, number in enumerate(batch):
            _assemble(self.plan.tasks[number], arrived[number], direction[index], v, index, flags)
        moves_B = flags == GRADIENT
        v_BV = None if v is None else v.flatten(1).to(entry.stats_dtype)
        matrices = as_matrices(direction, entry.view, first.rows, first.cols)
        update = update_whole_matrices(
            matrices,
            v_BV,
            options=step.options,
            ns_dtype=entry.ns_dtype,
            stats_dtype=entry.stats_dtype,
            workspace=self.workspace,
            scratch=matrices if matrices.is_contiguous() else None,
        )
        o = as_native(update.o_BMN, entry.view, first.region.shape)
        scale_B = torch.where(moves_B, update.scale_B.to(flags.dtype), UNTOUCHED)
        if v is not None and update.v_BV is not None and v_BV is not None:
            v = torch.where(moves_B[:, None], update.v_BV, v_BV).view(v.shape)
        if self.skipped is not None and step.options.skip_nonfinite:
            for index, number in enumerate(batch):
                self.skipped[number].copy_(flags[index] == NONFINITE)
        for index, number in enumerate(batch):
            task = self.plan.tasks[number]
            for route, slots in returned.get(number, ()):
                inside = route.region.relative_to(task.region)
                slots.elements.view(route.region.shape).copy_(o[index][inside.slices()])
                if route.num_neurons and v is not None:
                    rows = v[index][inside.along(task.neuron_dims).slices()]
                    slots.neurons.copy_(rows.reshape(-1))
                if route.num_scalars:
                    slots.scalars.copy_(scale_B[index : index + 1])

    # Back at the shards.

    def _apply(self, routes: Sequence[tuple[Route, Slots]]) -> None:
        """Lines 5 and 7 for the pieces that this rank stores."""
        scales: dict[int, Tensor] = {}
        for route, slots in routes:
            step = self._step_of(route.task)
            if route.num_scalars:
                scales[route.task] = slots.scalars[0].to(step.entry.stats_dtype)
            if route.num_neurons and step.v is not None:
                rows = step.v[step.entry.second_moment_slices(route.region)]
                rows.copy_(slots.neurons.view(rows.shape))
        for route, slots in routes:
            self._apply_piece(route, slots.elements, scales[route.task])

    def _apply_piece(self, route: Route, elements: Tensor, scale: Tensor) -> None:
        step, task = self._step_of(route.task), self.plan.tasks[route.task]
        options, lr = step.options, step.entry.group["lr"]
        at = step.entry.shards.local_slices(route.region)
        moves = scale != UNTOUCHED if step.deferred else None
        if step.v is None:
            factor = scale * lr
        else:
            factor = rule.neuron_factor(
                _along_neurons(step, task, route.region), scale, lr=lr, eps=options.eps
            )
        if moves is not None:
            momentum = step.momentum[at]
            grad = None if step.grad is None else _ascending(step, at)
            momentum.copy_(torch.where(moves, _advanced(momentum, grad, options), momentum))
        weight = step.weight[at]
        work_dtype = step.entry.stats_dtype
        o = elements.view(route.region.shape).to(work_dtype)
        moved = o * factor.to(work_dtype)
        if moves is not None:
            moved = torch.where(moves, moved, 0.0)  # Chosen, not multiplied: O may hold NaN.
        rule.apply_step_(
            weight,
            moved,
            decay=lr * step.entry.group["weight_decay"],
            cautious=options.cautious_weight_decay,
            moves=moves,
        )

    def _share_idle_second_moments(self) -> None:
        """Copies v to ranks whose shard is empty, so that their replica of it is no other."""
        for entry, axes in zip(self.params, self.idle_axes, strict=True):
            for axis in axes:
                assert isinstance(entry.param, DTensor)
                v = local_tensor(entry.state["second_momentum_buffer"])
                if v.numel():
                    group = entry.param.device_mesh.get_group(axis)
                    dist.broadcast(v, group=group, group_src=0)

    def _count_skipped(self) -> None:
        if self.skipped is None:
            return
        # An owner counts once: one owner per replica would count a matrix several times.
        dist.all_reduce(self.skipped, op=dist.ReduceOp.MAX, group=self.group)
        for (number, index), count in zip(self.places, self.skipped, strict=True):
            state = self.params[number].state
            if "skipped_steps" in state:
                local_tensor(state["skipped_steps"])[index].add_(count)


def _local_step(entry: ShardedParam, options: MatrixOptions) -> LocalStep:
    grad = entry.local_gradient()
    v = entry.state.get("second_momentum_buffer")
    return LocalStep(
        entry=entry,
        options=options,
        weight=local_tensor(entry.param),
        grad=grad,
        momentum=local_tensor(entry.state["momentum_buffer"]),
        v=None if v is None else local_tensor(v),
        deferred=grad is None or options.skip_nonfinite,
    )


def _ascending(step: LocalStep, at: tuple[slice, ...] = ()) -> Tensor:
    """The local gradient, or a piece of it, in the direction that the step goes against."""
    assert step.grad is not None
    grad = step.grad[at] if at else step.grad
    return -grad if step.options.maximize else grad


def _advanced(momentum: Tensor, grad: Tensor | None, options: MatrixOptions) -> Tensor:
    """Line 2 beside the momentum; a missing gradient counts as zero."""
    advanced = momentum.clone()
    seen = torch.zeros_like(momentum) if grad is None else grad
    rule.update_momentum_(advanced, seen, momentum_beta=options.momentum)
    return advanced


def _write_flag(flag: Tensor, grad: Tensor | None, options: MatrixOptions) -> None:
    flag.fill_(NO_GRADIENT if grad is None else GRADIENT)
    if grad is not None and options.skip_nonfinite:
        flag.copy_(flag_nonfinite(flag, grad))


def _assemble(
    task: MatrixTask,
    pieces: Sequence[tuple[Route, Slots]],
    direction: Tensor,
    v: Tensor | None,
    index: int,
    flags: Tensor,
) -> None:
    """Puts a matrix's pieces together, as matrix ``index`` of a batch."""
    for route, slots in pieces:
        inside = route.region.relative_to(task.region)
        direction[inside.slices()].copy_(slots.elements.view(route.region.shape))
        if route.num_neurons and v is not None:
            rows = v[index][inside.along(task.neuron_dims).slices()]
            rows.copy_(slots.neurons.view(rows.shape))
    flags[index] = torch.cat([slots.scalars for _, slots in pieces]).amax()


def _along_neurons(step: LocalStep, task: MatrixTask, region: Region) -> Tensor:
    """The second moments of a region's neurons, shaped to broadcast over the region."""
    assert step.v is not None
    rows = step.v[step.entry.second_moment_slices(region)]
    return rows.reshape(
        [size if dim in task.neuron_dims else 1 for dim, size in enumerate(region.shape)]
    )


def _empty_slots(route: Route, task: MatrixTask, device: torch.device) -> Slots:
    wire, side = getattr(torch, task.wire_dtype), getattr(torch, task.neuron_dtype)
    return Slots(
        torch.empty(route.num_elements, dtype=wire, device=device),
        torch.empty(route.num_neurons, dtype=side, device=device),
        torch.empty(route.num_scalars, dtype=side, device=device),
    )


def _finish(routes: BucketRoutes) -> None:
    if routes.exchange is not None:
        routes.exchange.finish()
