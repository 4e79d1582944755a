"""The step of matrices that this rank stores whole: nothing is sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from normuon.options import MatrixOptions
from normuon.orthogonalize import Workspace, resolve_ns_dtype, transport_dtype
from normuon.state import compute_device_of
from normuon.step.coded_momenta import count_roundings_
from normuon.step.figures import Rows, RowsOf, nowhere
from normuon.step.fused import Passes, passes_for
from normuon.step.order import (
    Moves,
    WholeUpdate,
    advance_,
    apply_,
    direction_dtype,
    finite_pieces,
    matrices_per_batch,
    orthogonalize_,
    stats_dtype,
    step_dtype,
)
from normuon.step.pieces import MatrixParam, PieceBatch, PieceRun, gradient_of, whole_runs
from normuon.step.staging import Staging, Stagings

MOST_STAGED_BYTES = 64 * 2**20
"""Of the directions of a batch that is taken to another device, unless one matrix has more.

Larger batches would leave less to overlap and pin more host memory; transfers of this size already
run at full speed.
"""


def whole_batches(
    runs: Iterable[tuple[PieceRun, int, int]], options: MatrixOptions
) -> list[PieceBatch]:
    """Equal matrices together, where that is faster and their scratch allows it."""
    equal: dict[tuple[Any, ...], list[PieceRun]] = {}
    for run, m, n in runs:
        param = run.owner.param
        device = compute_device_of(run.owner.label, param, run.owner.group)
        key = (m, n, param.dtype, run.owner.momentum_kind, param.device, device)
        equal.setdefault(key, []).append(run)
    batches = []
    for (m, n, *_, device), alike in equal.items():
        limit = _limit(alike[0].owner, m, n, options, device)
        batches += [PieceBatch(cut, m, n) for cut in _cut(alike, limit)]
    return batches


def _limit(owner: MatrixParam, m: int, n: int, options: MatrixOptions, device: torch.device) -> int:
    dtype = owner.param.dtype
    ns_dtype = resolve_ns_dtype(options.ns_dtype, param_dtype=dtype, device=device)
    limit = matrices_per_batch(
        m,
        n,
        ns_dtype=ns_dtype,
        param_dtype=dtype,
        device_type=device.type,
        max_scratch_bytes=options.max_scratch_bytes,
    )
    if owner.param.device == device:
        return limit
    return min(limit, max(1, MOST_STAGED_BYTES // (m * n * transport_dtype(ns_dtype).itemsize)))


def _cut(runs: Iterable[PieceRun], limit: int) -> Iterator[list[PieceRun]]:
    """Runs of equal matrices in batches of at most ``limit`` matrices, in order."""
    cut: list[PieceRun] = []
    room = limit
    for run in runs:
        start = 0
        while start < run.count:
            taken = min(room, run.count - start)
            cut.append(run.narrow(start, taken))
            start += taken
            room -= taken
            if room == 0:
                yield cut
                cut, room = [], limit
    if cut:
        yield cut


class LocalMatrices:
    """The matrices of one param group that no other rank shares, in batches made once."""

    def __init__(self, owners: Sequence[MatrixParam]) -> None:
        """Takes the parameters.

        Args:
            owners: of one group, all with gradients at every step.
        """
        self._owners = list(owners)
        self._made_for: object = None
        self._batches: list[PieceBatch] = []
        self._devices: list[torch.device] = []

    def are(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters."""
        return len(params) == len(self._owners) and all(
            owner.param is param for owner, param in zip(self._owners, params, strict=True)
        )

    def step_(
        self,
        options: MatrixOptions,
        workspace: Workspace,
        stagings: Stagings,
        rows_of: RowsOf = nowhere,
    ) -> None:
        """Lines 2 to 7 for every matrix; see `step_whole_batch_` for ``rows_of``."""
        for owner in self._owners:
            owner.grad = gradient_of(owner.param)
        moves, staged = self._moves, []
        for batch, device in zip(self._batches_for(options), self._devices, strict=True):
            if device == batch.first.param.device:
                step_whole_batch_(
                    batch, options=options, workspace=workspace, moves=moves, rows_of=rows_of
                )
            else:
                staging = stagings.between(batch.first.param.device, device)
                staged.append((batch, options, staging))
        if staged:
            step_staged_batches_(staged, workspace=workspace, moves=moves, rows_of=rows_of)
        for owner in self._owners:
            owner.grad = None  # Gradients live as long as their parameters say.

    def _batches_for(self, options: MatrixOptions) -> list[PieceBatch]:
        made_for = (
            options.normalizer,
            options.ns_dtype,
            options.compute_device,
            options.max_scratch_bytes,
            [(owner.param.dtype, owner.param.device) for owner in self._owners],
        )
        if made_for != self._made_for:
            runs = (run for owner in self._owners for run in whole_runs(owner, options.normalizer))
            self._batches = whole_batches(runs, options)
            firsts = [batch.first for batch in self._batches]
            self._devices = [compute_device_of(o.label, o.param, o.group) for o in firsts]
            self._made_for = made_for
        return self._batches

    def _moves(self, batch: PieceBatch) -> Tensor | None:
        """Which matrices have finite gradients, counting the others; None where nobody asks."""
        if not batch.first.group["skip_nonfinite"]:
            count_roundings_(batch, None)
            return None
        finite_K = finite_pieces(batch)
        for run, finite in zip(batch.runs, torch.split(finite_K, batch.counts), strict=True):
            run.owner.state["skipped_steps"].narrow(0, run.first, run.count).add_(~finite)
        count_roundings_(batch, finite_K)
        return finite_K


def step_whole_batch_(
    batch: PieceBatch,
    *,
    options: MatrixOptions,
    workspace: Workspace,
    moves: Moves,
    rows_of: RowsOf,
) -> None:
    """Lines 2 to 7 for a batch of matrices that this rank stores whole.

    Args:
        batch: the matrices.
        options: of the group.
        workspace: scratch kept between steps.
        moves: which of them are stepped.
        rows_of: where to note their figures, if anywhere.
    """
    param = batch.first.param
    dtype, device = param.dtype, param.device
    ns_dtype = resolve_ns_dtype(options.ns_dtype, param_dtype=dtype, device=device)
    shape = (batch.count, batch.rows, batch.cols)
    moves_K, rows = moves(batch), rows_of(batch)
    passes = passes_for(batch, options.fused)
    direction_BMN = workspace.empty(
        "direction",
        shape,
        dtype=direction_dtype(batch, passes, ns_dtype=ns_dtype),
        device=device,
    )
    sum_squares_B = advance_(batch, direction_BMN, options=options, passes=passes, moves_K=moves_K)
    state = {}
    for name, dim in options.normalizer.state_dims(batch.rows, batch.cols).items():
        entries = batch.rows if dim == -2 else batch.cols
        vector = torch.empty((batch.count, entries), dtype=stats_dtype(dtype), device=device)
        state[name] = batch.load_vectors(name, vector)
    update = orthogonalize_(
        direction_BMN,
        state,
        options=options,
        ns_dtype=ns_dtype,
        workspace=workspace,
        sum_squares_B=sum_squares_B,
        moves_B=moves_K,
        measures=rows is not None,
    )
    _store_and_apply_(
        batch, update, options=options, workspace=workspace, passes=passes, moves_K=moves_K
    )
    _note_(batch, update, rows)


def _note_(batch: PieceBatch, update: WholeUpdate, rows: Rows | None) -> None:
    if rows is not None:
        assert update.figures is not None, "they were asked for"
        rows.add_(update.figures)
        rows.add_weights_(batch)


def _store_and_apply_(
    batch: PieceBatch,
    update: WholeUpdate,
    *,
    options: MatrixOptions,
    workspace: Workspace,
    passes: Passes | None,
    moves_K: Tensor | None,
) -> None:
    """The new state, and line 7."""
    for name, vector in update.state.items():
        batch.store_vectors_(name, vector)
    o_BMN = update.o_BMN
    wide = step_dtype(batch, passes, o_dtype=o_BMN.dtype)
    if o_BMN.dtype != wide:
        # The direction is spent: its memory serves for the step.
        shape, device = o_BMN.shape, o_BMN.device
        o_BMN = workspace.empty("direction", shape, dtype=wide, device=device).copy_(o_BMN)
    apply_(
        batch,
        o_BMN,
        update.state,
        update.summary,
        shape=(batch.rows, batch.cols),
        options=options,
        passes=passes,
        moves_K=moves_K,
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def step_staged_batches_(
    batches: Iterable[tuple[PieceBatch, MatrixOptions, Staging]],
    *,
    workspace: Workspace,
    moves: Moves,
    rows_of: RowsOf,
) -> None:
    """Lines 2 to 7 for batches on the host whose matrices are orthogonalised on another device.

    While one batch computes there, the next goes up and the last comes down.
    """
    going: list[Iterator[None]] = []
    for number, (batch, options, staging) in enumerate(batches):
        slot = number % NUM_SLOTS
        begun = _staged_step_(
            batch,
            options,
            staging,
            slot=slot,
            workspace=workspace,
            moves=moves,
            rows=rows_of(batch),
        )
        going = _one_stage_further([begun, *going])
    while going:
        going = _one_stage_further(going)


NUM_SLOTS = 2
"""Batches that use host memory of one direction at once."""


def _one_stage_further(newest_first: list[Iterator[None]]) -> list[Iterator[None]]:
    """The steps that have not ended. The newest come first, so that the last wait is for the oldest
    when the device has work."""
    ended = object()
    return [step for step in newest_first if next(step, ended) is not ended]


def _staged_step_(
    batch: PieceBatch,
    options: MatrixOptions,
    staging: Staging,
    *,
    slot: int,
    workspace: Workspace,
    moves: Moves,
    rows: Rows | None,
) -> Iterator[None]:
    """`step_whole_batch_` in three stages: up, on the device and back, on the host."""
    param_dtype = batch.first.param.dtype
    ns_dtype = resolve_ns_dtype(options.ns_dtype, param_dtype=param_dtype, device=staging.device)
    shape = (batch.count, batch.rows, batch.cols)
    moves_K = moves(batch)
    passes = passes_for(batch, options.fused)
    dims = options.normalizer.state_dims(batch.rows, batch.cols)
    lengths = [batch.rows if dim == -2 else batch.cols for dim in dims.values()]
    sizes = [(prod(shape), transport_dtype(ns_dtype))]
    sizes += [(batch.count * length, stats_dtype(param_dtype)) for length in lengths]
    sizes += [] if moves_K is None else [(batch.count, torch.bool)]
    there = staging.lend(f"whole up {slot}", sizes)
    _fill_direction_(
        there.parts[0].view(shape),
        batch,
        options=options,
        workspace=workspace,
        passes=passes,
        ns_dtype=ns_dtype,
        moves_K=moves_K,
    )
    for name, part in zip(dims, there.parts[1:], strict=False):
        batch.load_vectors(name, part.view(batch.count, -1))
    if moves_K is not None:
        there.parts[-1].copy_(moves_K)
    with staging.going_up() as arrival:
        direction_BMN, *vectors = (there.up(number) for number in range(len(sizes)))
    there.give_back()
    yield
    arrival.join()
    update = orthogonalize_(
        direction_BMN.view(shape),
        {name: v.view(batch.count, -1) for name, v in zip(dims, vectors, strict=False)},
        options=options,
        ns_dtype=ns_dtype,
        workspace=workspace,
        moves_B=None if moves_K is None else vectors[-1],
        measures=rows is not None,
    )
    noted = [] if update.figures is None else [update.figures]
    found = [update.o_BMN, *update.state.values(), *update.summary.values(), *noted]
    home = staging.lend(f"whole home {slot}", [(t.numel(), t.dtype) for t in found])
    with staging.coming_down():
        for number, tensor in enumerate(found):
            home.down_(number, tensor)
    yield
    # The device's tensors are let go at the end: by then it has done with them, on every stream.
    home.wait()
    o_BMN, *here = (part.view(t.shape) for part, t in zip(home.parts, found, strict=True))
    update = WholeUpdate(
        o_BMN,
        dict(zip(update.state, here, strict=False)),
        dict(zip(update.summary, here[len(update.state) :], strict=False)),
        here[-1] if noted else None,
    )
    _store_and_apply_(
        batch, update, options=options, workspace=workspace, passes=passes, moves_K=moves_K
    )
    _note_(batch, update, rows)
    home.give_back()


def _fill_direction_(
    into_BMN: Tensor,
    batch: PieceBatch,
    *,
    options: MatrixOptions,
    workspace: Workspace,
    passes: Passes | None,
    ns_dtype: torch.dtype,
    moves_K: Tensor | None,
) -> None:
    """Line 2, and its result in the dtype in which it travels."""
    dtype = direction_dtype(batch, passes, ns_dtype=ns_dtype)
    direction_BMN = into_BMN
    if dtype != into_BMN.dtype:
        shape, device = into_BMN.shape, into_BMN.device
        direction_BMN = workspace.empty("direction", shape, dtype=dtype, device=device)
    advance_(batch, direction_BMN, options=options, passes=passes, moves_K=moves_K)
    if direction_BMN is not into_BMN:
        into_BMN.copy_(direction_BMN)
