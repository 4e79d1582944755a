"""One step of the `normuon` and `muon` algorithms: Algorithm 1 in order, over batches of matrices.

This file knows which tensors a step reads and writes, and which matrices share a batch. The
numerics are `rule.py`'s and `orthogonalize/`'s; which state exists is `state.py`'s.
Shapes as in `rule.py`; b is the number of matrices that one parameter brings to a batch of B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normuon import rule
from normuon.matrix_view import MatrixBlock, MatrixView, flattens_in_place
from normuon.options import MatrixOptions
from normuon.orthogonalize import (
    Workspace,
    is_faster_batched,
    largest_magnitude,
    resolve_ns_dtype,
)
from normuon.whole_matrix import WholeUpdate, update_whole_matrices


@dataclass(slots=True)
class MatrixParam:
    """A parameter with a gradient, and its state, as one step sees them.

    Args:
        param: the weights, written to.
        grad: their gradient, never written to.
        view: how both become matrices.
        momentum: ``momentum_buffer``, of the parameter's shape; written to.
        second_moment: ``second_momentum_buffer``, one entry per neuron; None for `muon`.
        skipped_steps: one int32 count per matrix, block after block; None unless
            ``skip_nonfinite``.
    """

    param: Tensor
    grad: Tensor
    view: MatrixView
    momentum: Tensor
    second_moment: Tensor | None
    skipped_steps: Tensor | None


@dataclass(slots=True)
class MatrixRun:
    """Equal matrices of one parameter, one after another; the unit that batches are made of."""

    param_BMN: Tensor
    grad_BMN: Tensor
    momentum_BMN: Tensor
    v_BV: Tensor | None
    skipped_steps_B: Tensor | None

    def __len__(self) -> int:
        return self.param_BMN.shape[0]

    def narrow(self, start: int, length: int) -> MatrixRun:
        """The matrices ``start`` to ``start + length``, as views."""
        if length == len(self):
            return self
        v_BV, skipped_steps_B = self.v_BV, self.skipped_steps_B
        return MatrixRun(
            self.param_BMN.narrow(0, start, length),
            self.grad_BMN.narrow(0, start, length),
            self.momentum_BMN.narrow(0, start, length),
            None if v_BV is None else v_BV.narrow(0, start, length),
            None if skipped_steps_B is None else skipped_steps_B.narrow(0, start, length),
        )


@dataclass(slots=True)
class CopyBack:
    """Matrices that had to be copied out of a tensor, and the view of it they go back into."""

    native: Tensor
    matrices: Tensor

    def write_(self) -> None:
        self.native.copy_(self.matrices.reshape(self.native.shape))


def step_matrices_(
    params: Sequence[MatrixParam],
    *,
    lr: float | Tensor,
    weight_decay: float,
    options: MatrixOptions,
    workspace: Workspace,
) -> None:
    """Lines 2 to 7 of Algorithm 1 for every matrix of these parameters.

    Equal matrices go through together where that is faster, never more of them at once than fit in
    ``max_scratch_bytes`` (but always one).
    """
    equal_runs: dict[tuple[object, ...], list[MatrixRun]] = {}
    copies: list[CopyBack] = []
    for entry in params:
        dtypes = (entry.param.dtype, entry.momentum.dtype, entry.param.device)
        for part, run in _runs_of(entry, options, copies):
            equal_runs.setdefault((part.m, part.n, *dtypes), []).append(run)
    for runs in equal_runs.values():
        for batch in _batches(runs, _limit(runs[0], options)):
            _step_batch_(
                batch, lr=lr, weight_decay=weight_decay, options=options, workspace=workspace
            )
    for copy in copies:
        copy.write_()


def _runs_of(
    entry: MatrixParam, options: MatrixOptions, copies: list[CopyBack]
) -> Iterator[tuple[MatrixBlock, MatrixRun]]:
    view, shape = entry.view, entry.param.shape
    parts = view.parts(shape)
    moments: Sequence[Tensor | None] = [None] * len(parts)
    if entry.second_moment is not None:
        moments = view.native_second_moments(
            entry.second_moment, shape, neuron_axis=options.neuron_axis
        )
    skipped: Sequence[Tensor | None] = [None] * len(parts)
    if entry.skipped_steps is not None:
        skipped = torch.split(entry.skipped_steps, [part.batch for part in parts])
    for part, moment, skipped_steps_B in zip(parts, moments, skipped, strict=True):
        sizes = (part.batch, part.m, part.n)
        param_BMN = _writable(view.native(entry.param, part), sizes, view, part, copies)
        grad_BMN = view.matrices(entry.grad, part)
        momentum_BMN = _writable(view.native(entry.momentum, part), sizes, view, part, copies)
        v_BV = None if moment is None else _writable(moment, (part.batch, -1), view, part, copies)
        yield part, MatrixRun(param_BMN, grad_BMN, momentum_BMN, v_BV, skipped_steps_B)


def _writable(
    native: Tensor,
    sizes: tuple[int, ...],
    view: MatrixView,
    part: MatrixBlock,
    copies: list[CopyBack],
) -> Tensor:
    matrices = native.reshape(sizes)
    in_place = native.is_contiguous() or flattens_in_place(
        native, batch_dims=view.batch_dims, heads=part.heads
    )
    if not in_place:
        copies.append(CopyBack(native, matrices))
    return matrices


def _limit(run: MatrixRun, options: MatrixOptions) -> int:
    param_BMN = run.param_BMN
    device = param_BMN.device
    return matrices_per_batch(
        param_BMN.shape[1],
        param_BMN.shape[2],
        ns_dtype=resolve_ns_dtype(options.ns_dtype, param_dtype=param_BMN.dtype, device=device),
        param_dtype=param_BMN.dtype,
        device_type=device.type,
        max_scratch_bytes=options.max_scratch_bytes,
    )


def matrices_per_batch(
    m: int,
    n: int,
    *,
    ns_dtype: torch.dtype,
    param_dtype: torch.dtype,
    device_type: str,
    max_scratch_bytes: int,
) -> int:
    """How many equal matrices go through together: one, or as many as their scratch allows."""
    if not is_faster_batched(m, n, dtype=ns_dtype, device_type=device_type):
        return 1
    needed = scratch_bytes(m, n, ns_dtype=ns_dtype, param_dtype=param_dtype)
    return max(1, max_scratch_bytes // max(1, needed))


def scratch_bytes(m: int, n: int, *, ns_dtype: torch.dtype, param_dtype: torch.dtype) -> int:
    """Most scratch that one m x n matrix needs at any moment of a step, in bytes.

    What a step's workspace holds, and beside it the direction cast to another dtype: the direction
    in at least float32, which is normalised and later becomes the step in the same memory if it has
    the dtype for that; rounded to a half precision, the next iterate, and the four s x s matrices
    of Newton-Schulz.

    Example:
        >>> scratch_bytes(4, 8, ns_dtype=torch.float32, param_dtype=torch.float32)
        512
    """
    wide = torch.promote_types(param_dtype, torch.float32).itemsize
    unit = torch.promote_types(ns_dtype, torch.float32).itemsize
    elements, short = m * n, min(m, n)
    rounded = ns_dtype.itemsize if ns_dtype.itemsize < unit else 0
    stats = unit if unit != wide else 0
    cast = ns_dtype.itemsize if ns_dtype.itemsize != wide else 0
    iterating = ns_dtype.itemsize * (elements + 4 * short * short)
    return (wide + cast + stats + rounded) * elements + iterating


def _batches(runs: Sequence[MatrixRun], limit: int) -> Iterator[list[MatrixRun]]:
    """Cuts runs of equal matrices into batches of at most ``limit`` matrices, in order."""
    batch: list[MatrixRun] = []
    room = limit
    for run in runs:
        start = 0
        while start < len(run):
            taken = min(room, len(run) - start)
            batch.append(run.narrow(start, taken))
            start += taken
            room -= taken
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def _step_batch_(
    batch: Sequence[MatrixRun],
    *,
    lr: float | Tensor,
    weight_decay: float,
    options: MatrixOptions,
    workspace: Workspace,
) -> None:
    param_BMN = batch[0].param_BMN
    ns_dtype = resolve_ns_dtype(
        options.ns_dtype, param_dtype=param_BMN.dtype, device=param_BMN.device
    )
    work_dtype = torch.promote_types(param_BMN.dtype, torch.float32)
    finite = [_finite_matrices(run) for run in batch] if options.skip_nonfinite else None
    moments = [run.v_BV for run in batch if run.v_BV is not None]
    direction_BMN = _advance_momentum_(batch, finite, options, workspace)
    update = update_whole_matrices(
        direction_BMN,
        _joined(moments) if moments else None,
        options=options,
        ns_dtype=ns_dtype,
        stats_dtype=work_dtype,
        workspace=workspace,
        scratch=_scratch(direction_BMN, batch[0].momentum_BMN, ns_dtype, workspace),
    )
    moves_B11 = None if finite is None else _joined(finite)
    factor_B11 = _step_factor_(moments, update, moves_B11, lr=lr, options=options)
    o_BMN = update.o_BMN
    if o_BMN.dtype != work_dtype:
        # The direction is spent: its memory serves for the step.
        wide_BMN = workspace.empty("direction", o_BMN.shape, like=o_BMN, dtype=work_dtype)
        o_BMN = wide_BMN.copy_(o_BMN)
    rule.apply_steps_(
        [run.param_BMN for run in batch],
        torch.split(o_BMN.mul_(factor_B11.to(work_dtype)), [len(run) for run in batch]),
        decay=lr * weight_decay,
        cautious=options.cautious_weight_decay,
        moves=finite,
    )


def _scratch(
    direction_BMN: Tensor, momentum_BMN: Tensor, ns_dtype: torch.dtype, workspace: Workspace
) -> Tensor:
    """Where the direction is normalised: in place, if it is the step's own and wide enough."""
    dtype = torch.promote_types(ns_dtype, torch.float32)
    if direction_BMN is not momentum_BMN and direction_BMN.dtype == dtype:
        return direction_BMN
    return workspace.empty("direction", direction_BMN.shape, like=direction_BMN, dtype=dtype)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _finite_matrices(run: MatrixRun) -> Tensor:
    """``[b, 1, 1]`` booleans: whether each matrix's gradient is finite throughout."""
    finite_B11 = torch.isfinite(largest_magnitude(run.grad_BMN))
    if run.skipped_steps_B is not None:
        run.skipped_steps_B.add_(~finite_B11[:, 0, 0])
    return finite_B11


def _advance_momentum_(
    batch: Sequence[MatrixRun],
    finite: list[Tensor] | None,
    options: MatrixOptions,
    workspace: Workspace,
) -> Tensor:
    """Line 2 for each matrix; returns what line 3 takes, ``[B, M, N]``.

    That is memory of the step's own, but for a single momentum that nothing is added to.
    """
    grads = [-run.grad_BMN if options.maximize else run.grad_BMN for run in batch]
    momenta = [run.momentum_BMN for run in batch]
    if finite is not None:
        # lerp(M, M) is M bit by bit, so a skipped matrix keeps its momentum untouched.
        grads = [
            torch.where(finite_B11, grad_BMN.to(momentum_BMN), momentum_BMN)
            for finite_B11, grad_BMN, momentum_BMN in zip(finite, grads, momenta, strict=True)
        ]
    rule.update_momenta_(momenta, grads, momentum_beta=options.momentum)
    if not options.nesterov:
        return _joined(momenta)
    shape = (sum(map(len, batch)), *momenta[0].shape[1:])
    direction_BMN = workspace.empty("direction", shape, like=momenta[0])
    parts = torch.split(direction_BMN, [len(run) for run in batch])
    for momentum_BMN, grad_BMN, part_BMN in zip(momenta, grads, parts, strict=True):
        rule.nesterov_direction(
            momentum_BMN, grad_BMN, momentum_beta=options.momentum, out=part_BMN
        )
    return direction_BMN


def _step_factor_(
    moments: Sequence[Tensor],
    update: WholeUpdate,
    moves_B11: Tensor | None,
    *,
    lr: float | Tensor,
    options: MatrixOptions,
) -> Tensor:
    """Stores the new second moments; returns what O is multiplied by, broadcastable to it."""
    _, m, n = update.o_BMN.shape
    if update.v_BV is None:
        factor_B11 = (update.scale_B * lr)[:, None, None]
    else:
        sizes = [len(moment) for moment in moments]
        moves = None if moves_B11 is None else torch.split(moves_B11[..., 0], sizes)
        for index, new_v_BV in enumerate(torch.split(update.v_BV, sizes)):
            old_v_BV = moments[index]
            kept = new_v_BV if moves is None else torch.where(moves[index], new_v_BV, old_v_BV)
            old_v_BV.copy_(kept)
        factor_BV = rule.neuron_factor(update.v_BV, update.scale_B[:, None], lr=lr, eps=options.eps)
        neurons = rule.neuron_dim(m, n, options.neuron_axis)
        factor_B11 = factor_BV.unsqueeze(-1 if neurons == -2 else -2)
    return factor_B11 if moves_B11 is None else torch.where(moves_B11, factor_B11, 0.0)
