"""Algorithm 1 in order, over batches of equal pieces: `advance_`, `orthogonalize_`, `apply_`.

On one device a piece is a whole matrix and the three follow one another. Where ranks share
matrices, what `advance_` gives travels to owners, and what `orthogonalize_` gives travels back.

Shapes: K pieces of R rows and C columns, of which line 2 and line 7 need nothing else; B whole
matrices of M rows and N columns in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from normuon.options import MatrixOptions
from normuon.orthogonalize import (
    Workspace,
    is_faster_batched,
    orthogonalize,
    transport_dtype,
)
from normuon.step import rule
from normuon.step.coded_momenta import CodedMomenta, coded_momenta
from normuon.step.figures import row_norms, update_row_norms, whole_figures
from normuon.step.fused import Passes
from normuon.step.normalizer import Vectors
from normuon.step.pieces import PieceBatch

GRADIENT, NONFINITE = 1.0, 2.0
"""What a matrix's flag says of its gradient, the largest that any rank says; 0 is none at all."""


def direction_dtype(
    batch: PieceBatch, passes: Passes | None, *, ns_dtype: torch.dtype
) -> torch.dtype:
    """The dtype in which `advance_` writes directions.

    As they travel, where a kernel rounds them on the way; the momentum's, where that would be a
    pass of its own.
    """
    if passes is not None:
        return transport_dtype(ns_dtype)
    if coded_momenta(batch) is not None:
        return stats_dtype(batch.first.param.dtype)
    return batch.first.state["momentum_buffer"].dtype


def advance_(
    batch: PieceBatch,
    direction_KRC: Tensor | None,
    *,
    options: MatrixOptions,
    passes: Passes | None = None,
    moves_K: Tensor | None = None,
) -> Tensor | None:
    """Line 2 for every piece, and what line 3 takes of the first pieces.

    Args:
        batch: the pieces; momenta are written to.
        direction_KRC: where to put the directions, contiguous, in `direction_dtype`; it may be for
            the first pieces alone. None where no direction is wanted.
        options: of the group.
        passes: from `passes_for`: one kernel in place of torch's operations.
        moves_K: booleans: which matrices are to be stepped. A piece without a gradient counts as
            zero where the matrix moves, and the momentum of a matrix that does not move stays as it
            is, bit by bit. None: all move, and all have gradients.

    Returns:
        The directions' sums of squares where they cost nothing, ``[K]`` in float64; else None.
    """
    coded = coded_momenta(batch)
    if coded is not None:
        _advance_coded_(batch, coded, direction_KRC, options=options, moves_K=moves_K)
        return None
    if passes is not None:
        return passes.advance_(direction_KRC, options=options, moves_K=moves_K)
    momenta = batch.momenta()
    grads = _update_momenta_(batch, momenta, options=options, moves_K=moves_K)
    if direction_KRC is None:
        return None
    directions = batch.views(direction_KRC)
    momenta, grads = momenta[: len(directions)], grads[: len(directions)]
    if options.nesterov:
        rule.look_ahead_(directions, momenta, grads, momentum_beta=options.momentum)
    else:
        torch._foreach_copy_(directions, momenta)
    return None


def _advance_coded_(
    batch: PieceBatch,
    coded: CodedMomenta,
    direction_KRC: Tensor | None,
    *,
    options: MatrixOptions,
    moves_K: Tensor | None,
) -> None:
    """`advance_` of momenta in 8 bits: directions are of the values before they are rounded."""
    held = coded.take()
    momenta = batch.views(held.values_KRC)
    grads = _update_momenta_(batch, momenta, options=options, moves_K=moves_K)
    coded.keep_(held, moves_K)
    if direction_KRC is None:
        return
    if options.nesterov:  # In place: the values are kept, and not needed any more.
        rule.update_momenta_(momenta, grads, momentum_beta=options.momentum)
    direction_KRC.copy_(held.values_KRC[: len(direction_KRC)])


def coming_maxima(batch: PieceBatch, coded: CodedMomenta, *, options: MatrixOptions) -> Tensor:
    """The largest magnitudes that blocks will have after line 2; nothing is written.

    Args:
        batch: the pieces, of which those without a gradient count as having zero.
        coded: its momenta.
        options: of the group.

    Returns:
        ``[K, A, N]``; see `coded_momenta`.
    """
    held = coded.take()
    moves_K = None
    if not batch.has_gradients:
        moves_K = torch.ones(batch.count, dtype=torch.bool, device=batch.first.param.device)
    momenta = batch.views(held.values_KRC)
    _update_momenta_(batch, momenta, options=options, moves_K=moves_K)
    return coded.maxima(held)


def _update_momenta_(
    batch: PieceBatch, momenta: list[Tensor], *, options: MatrixOptions, moves_K: Tensor | None
) -> list[Tensor]:
    """Line 2; the gradients in the momenta's dtype."""
    if moves_K is None:
        grads = _in_dtype(batch, [g for g in batch.gradients() if g is not None], momenta[0].dtype)
    else:
        grads = _held_gradients(batch, momenta, moves_K)
    if options.maximize and moves_K is None:
        grads = list(torch._foreach_neg(grads))
    rule.update_momenta_(momenta, grads, momentum_beta=options.momentum)  # Alg. 1, line 2
    return grads


def _in_dtype(batch: PieceBatch, grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    if all(grad.dtype == dtype for grad in grads):
        return grads
    return batch.views(_wide(batch, grads, dtype))


def _held_gradients(batch: PieceBatch, momenta: list[Tensor], moves_K: Tensor) -> list[Tensor]:
    """Gradients with which line 2 leaves what must not move: there, the momentum itself.

    ``lerp(M, M)`` is M bit by bit.
    """
    dtype = momenta[0].dtype
    grads = batch.gradients()
    seen_KRC, held_KRC = _empty_batch(batch, dtype), _empty_batch(batch, dtype)
    pairs = zip(batch.views(seen_KRC), grads, strict=True)
    present = [(view, grad) for view, grad in pairs if grad is not None]
    if len(present) < len(grads):
        seen_KRC.zero_()
    if present:
        torch._foreach_copy_([view for view, _ in present], [grad for _, grad in present])
    if batch.first.group["maximize"]:
        seen_KRC.neg_()
    torch._foreach_copy_(batch.views(held_KRC), momenta)
    return batch.views(torch.where(moves_K[:, None, None], seen_KRC, held_KRC))


def _empty_batch(batch: PieceBatch, dtype: torch.dtype) -> Tensor:
    device = batch.first.param.device
    return torch.empty((batch.count, batch.rows, batch.cols), dtype=dtype, device=device)


def finite_pieces(batch: PieceBatch) -> Tensor:
    """``[K]`` booleans: whether each piece's gradient is finite; a missing one is."""
    grads = batch.gradients()
    dtype = reduce(torch.promote_types, {grad.dtype for grad in grads if grad is not None})
    seen_KRC = _empty_batch(batch, dtype)
    if None in grads:
        seen_KRC.zero_()
    pairs = zip(batch.views(seen_KRC), grads, strict=True)
    present = [(view, grad) for view, grad in pairs if grad is not None]
    torch._foreach_copy_([view for view, _ in present], [grad for _, grad in present])
    # The largest and the smallest: on a CPU the infinity norm takes twenty times as long.
    largest_K, smallest_K = seen_KRC.amax((-2, -1)), seen_KRC.amin((-2, -1))
    return torch.isfinite(largest_K) & torch.isfinite(smallest_K)


@dataclass(slots=True)
class WholeUpdate:
    """What a batch of whole matrices yields; see `normalizer.Normalizer.update`.

    Args:
        o_BMN: orthogonalised directions, in ``ns_dtype``; the holder may overwrite them.
        state: the new vectors of the state.
        summary: what its factors need besides.
        figures: see `figures.whole_figures`, if they were asked for.
    """

    o_BMN: Tensor
    state: Vectors
    summary: Vectors
    figures: Tensor | None = None


def orthogonalize_(
    direction_BMN: Tensor,
    state: Vectors,
    *,
    options: MatrixOptions,
    ns_dtype: torch.dtype,
    workspace: Workspace,
    sum_squares_B: Tensor | None = None,
    moves_B: Tensor | None = None,
    measures: bool = False,
) -> WholeUpdate:
    """Lines 3 to 6 for whole matrices.

    Args:
        direction_BMN: what line 3 takes, contiguous; overwritten.
        state: the vectors before the step, not written to.
        options: of the group.
        ns_dtype: dtype to orthogonalise in.
        workspace: scratch kept between calls; O may live there until its next use.
        sum_squares_B: what `advance_` returned.
        moves_B: booleans: which matrices are stepped; the others keep their state. None: all.
        measures: whether to return figures.
    """
    count, m, n = direction_BMN.shape
    taken_BMN, norm_BM, rank_B = direction_BMN, None, None
    if measures:
        taken_BMN = direction_BMN.to(transport_dtype(ns_dtype))  # As it reaches an owner.
        norm_BM = row_norms(taken_BMN)
        rank_B = norm_BM.new_empty(count)
    o_BMN = orthogonalize(
        taken_BMN,
        coefficients=options.coefficients,
        dtype=ns_dtype,
        orthogonalizer=options.orthogonalizer,
        backend=options.ns_backend,
        equilibrate=options.equilibrate,
        workspace=workspace,
        scratch=direction_BMN,
        sum_squares_B=sum_squares_B,
        effective_rank_B=rank_B,
        fused=options.fused,
    )  # Alg. 1, line 3
    updated, summary = options.normalizer.update(o_BMN, state)  # Alg. 1, lines 4 to 6
    figures = None
    if norm_BM is not None and rank_B is not None:
        factors = options.normalizer.factors(updated, summary, (m, n))
        rate = options.lr * options.normalizer.constant(m, n)
        update_BM = update_row_norms(o_BMN, factors, rate)
        figures = whole_figures(norm_BM, update_BM, rank_B, num_columns=n, moves_B=moves_B)
    if moves_B is not None:
        updated = {
            name: torch.where(moves_B[:, None], vector, state[name])
            for name, vector in updated.items()
        }
    return WholeUpdate(o_BMN, updated, summary, figures)


def apply_(
    batch: PieceBatch,
    o_KRC: Tensor,
    state: Vectors,
    summary: Vectors,
    *,
    shape: tuple[int, int],
    options: MatrixOptions,
    passes: Passes | None = None,
    moves_K: Tensor | None = None,
) -> None:
    """Line 7 for every piece.

    Args:
        batch: the pieces; weights are written to.
        o_KRC: their part of O, contiguous, in `step_dtype`; overwritten.
        state: their part of the new state.
        summary: their part of what `orthogonalize_` found.
        shape: m and n of the whole matrices.
        options: of the group.
        passes: from `passes_for`: one kernel in place of torch's operations.
        moves_K: booleans: which matrices are stepped. None: all.
    """
    decay = options.lr * options.weight_decay
    if passes is not None:
        passes.apply_(
            o_KRC,
            options.normalizer.factors(state, summary, shape),
            rate=options.lr * options.normalizer.constant(*shape),
            decay=decay,
            cautious=options.cautious_weight_decay,
            moves_K=moves_K,
        )
        return
    step_KRC = o_KRC
    rate = _rate(o_KRC, options.normalizer.constant(*shape), options.lr)
    factors = options.normalizer.factors(state, summary, shape)
    for number, (dim, factor_KV) in enumerate(factors):
        scaled_KV = factor_KV if number else factor_KV * rate  # The smallest tensor takes the rate.
        step_KRC.mul_(scaled_KV[:, :, None] if dim == -2 else scaled_KV[:, None, :])
    if not factors:
        step_KRC.mul_(rate)
    moves_K11 = None if moves_K is None else moves_K[:, None, None]
    if moves_K11 is not None:
        step_KRC = torch.where(moves_K11, step_KRC, 0.0)  # Chosen: 0 times NaN is NaN.
    weights = batch.weights()
    is_compensated = batch.keeps_residuals
    exact = weights[0].dtype == step_KRC.dtype and not is_compensated
    if exact and not options.cautious_weight_decay and moves_K11 is None:
        rule.apply_steps_(weights, batch.views(step_KRC), kept=1 - decay)  # Alg. 1, line 7
        return
    weights_KRC = _wide(batch, weights, step_KRC.dtype)
    if is_compensated:
        weights_KRC += _wide(batch, batch.residuals(), step_KRC.dtype)
    rule.applied_step(
        weights_KRC,
        step_KRC,
        decay=decay,
        cautious=options.cautious_weight_decay,
        moves_B11=moves_K11,
    )  # Alg. 1, line 7
    if is_compensated:
        _store_compensated_(batch, weights_KRC, moves_K11)
    else:
        torch._foreach_copy_(weights, batch.views(weights_KRC))


def _wide(batch: PieceBatch, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """A batch of tensors of the pieces, in another dtype."""
    wide_KRC = _empty_batch(batch, dtype)
    torch._foreach_copy_(batch.views(wide_KRC), tensors)
    return wide_KRC


def _store_compensated_(batch: PieceBatch, sums_KRC: Tensor, moves_K11: Tensor | None) -> None:
    """Kahan's summation: weights are sums rounded, and residuals what the rounding took."""
    weights, residuals = batch.weights(), batch.residuals()
    if moves_K11 is not None:
        # Rounding a sum of both again could turn over a weight that must stay.
        old_KRC = _wide(batch, weights, sums_KRC.dtype)
        old_residual_KRC = _wide(batch, residuals, sums_KRC.dtype)
        sums_KRC = torch.where(moves_K11, sums_KRC, old_KRC)
    torch._foreach_copy_(weights, batch.views(sums_KRC))
    residual_KRC = sums_KRC - _wide(batch, weights, sums_KRC.dtype)
    if moves_K11 is not None:
        residual_KRC = torch.where(moves_K11, residual_KRC, old_residual_KRC)
    torch._foreach_copy_(residuals, batch.views(residual_KRC))


def _rate(o_KRC: Tensor, constant: float, lr: float | Tensor) -> float | Tensor:
    """The learning rate times a constant, rounded as both are in the step's dtype."""
    if constant == 1:
        return lr
    return torch.full((), constant, dtype=o_KRC.dtype, device=o_KRC.device) * lr


def step_dtype(batch: PieceBatch, passes: Passes | None, *, o_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `apply_` takes O: a kernel widens O as it reads it."""
    return stats_dtype(batch.first.param.dtype) if passes is None else o_dtype


def stats_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of second moments, factors and steps: the parameter's, float32 at least."""
    return torch.promote_types(param_dtype, torch.float32)


def matrices_per_batch(
    m: int,
    n: int,
    *,
    ns_dtype: torch.dtype,
    param_dtype: torch.dtype,
    device_type: str,
    max_scratch_bytes: int | None,
) -> int:
    """How many equal matrices go through together: one, or as many as their scratch allows."""
    if not is_faster_batched(m, n, dtype=ns_dtype, device_type=device_type):
        return 1
    allowed = DEFAULT_SCRATCH_BYTES[device_type == "cpu"]
    if max_scratch_bytes is not None:
        allowed = max_scratch_bytes
    needed = scratch_bytes(m, n, ns_dtype=ns_dtype, param_dtype=param_dtype)
    return max(1, allowed // max(1, needed))


DEFAULT_SCRATCH_BYTES = (4 * 2**30, 256 * 2**20)
"""On accelerators and on CPUs, where ``max_scratch_bytes`` is None.

A step's temporary memory lies where activations lay: no training step needs both at once.
"""


def scratch_bytes(m: int, n: int, *, ns_dtype: torch.dtype, param_dtype: torch.dtype) -> int:
    """Most scratch that one m x n matrix needs at any moment of a step, in bytes.

    The direction in at least float32, which is normalised and later becomes the step in the same
    memory if it has the dtype for that; rounded to a half precision, the next iterate, and the four
    s x s matrices of Newton-Schulz.

    Example:
        >>> scratch_bytes(4, 8, ns_dtype=torch.float32, param_dtype=torch.float32)
        512
    """
    wide = stats_dtype(param_dtype).itemsize
    unit = torch.promote_types(ns_dtype, torch.float32).itemsize
    elements, short = m * n, min(m, n)
    rounded = ns_dtype.itemsize if ns_dtype.itemsize < unit else 0
    stats = unit if unit != wide else 0
    cast = ns_dtype.itemsize if ns_dtype.itemsize != wide else 0
    iterating = ns_dtype.itemsize * (elements + 4 * short * short)
    return (wide + cast + stats + rounded) * elements + iterating


Moves = Callable[[PieceBatch], Tensor | None]
"""For a batch, the booleans ``[K]`` of `advance_` and `apply_`, or None where all move."""
