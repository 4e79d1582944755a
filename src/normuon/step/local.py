"""The step of matrices that this rank stores whole: nothing is sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from normuon.options import MatrixOptions
from normuon.orthogonalize import Workspace, resolve_ns_dtype
from normuon.step.fused import passes_for
from normuon.step.order import (
    Moves,
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


def whole_batches(
    runs: Iterable[tuple[PieceRun, int, int]], options: MatrixOptions
) -> list[PieceBatch]:
    """Equal matrices together, where that is faster and their scratch allows it."""
    equal: dict[tuple[Any, ...], list[PieceRun]] = {}
    for run, m, n in runs:
        param, momentum = run.owner.param, run.owner.state["momentum_buffer"]
        key = (m, n, param.dtype, momentum.dtype, param.device)
        equal.setdefault(key, []).append(run)
    batches = []
    for (m, n, *_), alike in equal.items():
        limit = _limit(alike[0].owner, m, n, options)
        batches += [PieceBatch(cut, m, n) for cut in _cut(alike, limit)]
    return batches


def _limit(owner: MatrixParam, m: int, n: int, options: MatrixOptions) -> int:
    dtype, device = owner.param.dtype, owner.param.device
    return matrices_per_batch(
        m,
        n,
        ns_dtype=resolve_ns_dtype(options.ns_dtype, param_dtype=dtype, device=device),
        param_dtype=dtype,
        device_type=device.type,
        max_scratch_bytes=options.max_scratch_bytes,
    )


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

    def are(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters."""
        return len(params) == len(self._owners) and all(
            owner.param is param for owner, param in zip(self._owners, params, strict=True)
        )

    def step_(self, options: MatrixOptions, workspace: Workspace) -> None:
        """Lines 2 to 7 for every matrix."""
        for owner in self._owners:
            owner.grad = gradient_of(owner.param)
        for batch in self._batches_for(options):
            step_whole_batch_(batch, options=options, workspace=workspace, moves=self._moves)
        for owner in self._owners:
            owner.grad = None  # Gradients live as long as their parameters say.

    def _batches_for(self, options: MatrixOptions) -> list[PieceBatch]:
        made_for = (
            options.normalizer,
            options.ns_dtype,
            options.max_scratch_bytes,
            [(owner.param.dtype, owner.param.device) for owner in self._owners],
        )
        if made_for != self._made_for:
            runs = (run for owner in self._owners for run in whole_runs(owner, options.normalizer))
            self._batches = whole_batches(runs, options)
            self._made_for = made_for
        return self._batches

    def _moves(self, batch: PieceBatch) -> Tensor | None:
        """Which matrices have finite gradients, counting the others; None where nobody asks."""
        if not batch.first.group["skip_nonfinite"]:
            return None
        finite_K = finite_pieces(batch)
        for run, finite in zip(batch.runs, torch.split(finite_K, batch.counts), strict=True):
            run.owner.state["skipped_steps"].narrow(0, run.first, run.count).add_(~finite)
        return finite_K


def step_whole_batch_(
    batch: PieceBatch,
    *,
    options: MatrixOptions,
    workspace: Workspace,
    moves: Moves,
) -> None:
    """Lines 2 to 7 for a batch of matrices that this rank stores whole."""
    param = batch.first.param
    dtype, device = param.dtype, param.device
    ns_dtype = resolve_ns_dtype(options.ns_dtype, param_dtype=dtype, device=device)
    shape = (batch.count, batch.rows, batch.cols)
    moves_K = moves(batch)
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
    )
    for name, vector in update.state.items():
        batch.store_vectors_(name, vector)
    o_BMN = update.o_BMN
    wide = step_dtype(batch, passes, o_dtype=o_BMN.dtype)
    if o_BMN.dtype != wide:
        # The direction is spent: its memory serves for the step.
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
