"""Triton kernels of lines 2 and 4 to 7: all pieces of a batch in one launch.

``rows`` and ``cols`` are a piece's. Pieces of weights, momenta and gradients lie anywhere in
memory, all with the same strides, and are found by a table of addresses; batches ``[K, R, C]`` are
contiguous. The mathematics is that of `rule`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def lerp(start, end, weight):
    """torch.lerp: from the nearer end, so that equal ends stay what they are."""
    return tl.where(
        weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight)
    )


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address as a pointer; ``ALIGNED``: to 16 bytes, so that loads may be as wide."""
    if ALIGNED:
        return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def tile_of(program, tiles, tiles_along, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A program's piece, its row and column indices and which of them exist."""
    piece, tile = program // tiles, program % tiles
    row = (tile // tiles_along) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (tile % tiles_along) * COLS + tl.arange(0, COLS)[None, :]
    return piece.to(tl.int64), row.to(tl.int64), col.to(tl.int64), (row < rows) & (col < cols)


@triton.jit
def advance_kernel(
    grads_ptr,
    momenta_ptr,
    directions_ptr,
    sums_ptr,
    moves_ptr,
    num_directions,
    tiles,
    tiles_along,
    rows,
    cols,
    grad_rows,
    grad_cols,
    momentum_rows,
    momentum_cols,
    weight,
    beta,
    GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    HAS_DIRECTIONS: tl.constexpr,
    HAS_MOVES: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Line 2, what line 3 takes of the first pieces, and its sum of squares by tile."""
    program = tl.program_id(0)
    piece, row, col, inside = tile_of(program, tiles, tiles_along, rows, cols, ROWS, COLS)
    grad_at = tl.load(grads_ptr + piece)
    grad_ptr = pointer_to(grad_at, GRADIENT, ALIGNED)
    momentum_ptr = pointer_to(tl.load(momenta_ptr + piece), MOMENTUM, ALIGNED)
    # A piece without a gradient, address 0, has no rows to read and counts as zero.
    has_grad = inside & (row < tl.where(grad_at != 0, rows, 0))
    grad = tl.load(grad_ptr + row * grad_rows + col * grad_cols, mask=has_grad, other=0.0)
    grad = grad.to(MOMENTUM).to(tl.float32)
    momentum_at = momentum_ptr + row * momentum_rows + col * momentum_cols
    old = tl.load(momentum_at, mask=inside, other=0.0).to(tl.float32)
    if MAXIMIZE:
        grad = -grad
    if HAS_MOVES:
        moves = tl.load(moves_ptr + piece) != 0
        grad = tl.where(moves, grad, old)
        stored = inside & (row < tl.where(moves, rows, 0))
    else:
        stored = inside
    momentum = lerp(old, grad, weight).to(MOMENTUM)
    tl.store(momentum_at, momentum, mask=stored)
    if HAS_DIRECTIONS:
        if piece < num_directions:
            direction = momentum.to(tl.float32)
            if NESTEROV:
                direction = lerp(grad, direction, beta).to(MOMENTUM)
            rounded = direction.to(directions_ptr.dtype.element_ty)
            at = piece * rows * cols + row * cols + col
            tl.store(directions_ptr + at, rounded, mask=inside)
            wide = rounded.to(tl.float64)  # Outside the piece all that was loaded is zero.
            tl.store(sums_ptr + program, tl.sum(wide * wide))


@triton.jit
def apply_kernel(
    weights_ptr,
    residuals_ptr,
    o_ptr,
    row_factor_ptr,
    col_factor_ptr,
    scalars_ptr,
    moves_ptr,
    tiles,
    tiles_along,
    rows,
    cols,
    weight_rows,
    weight_cols,
    residual_rows,
    residual_cols,
    rate,
    decay,
    kept,
    WEIGHT: tl.constexpr,
    HAS_RESIDUALS: tl.constexpr,
    HAS_ROW_FACTOR: tl.constexpr,
    HAS_COL_FACTOR: tl.constexpr,
    HAS_SCALARS: tl.constexpr,
    HAS_MOVES: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Line 7: ``W <- kept W - rate O``, O's rows and columns multiplied by factors."""
    program = tl.program_id(0)
    piece, row, col, inside = tile_of(program, tiles, tiles_along, rows, cols, ROWS, COLS)
    if HAS_SCALARS:
        rate = tl.load(scalars_ptr)
        decay = tl.load(scalars_ptr + 1)
        kept = tl.load(scalars_ptr + 2)
    step = tl.load(o_ptr + piece * rows * cols + row * cols + col, mask=inside, other=0.0)
    step = step.to(tl.float32)
    if HAS_ROW_FACTOR:
        factor = tl.load(row_factor_ptr + piece * rows + row, mask=row < rows, other=0.0)
        step *= factor.to(tl.float32) * rate
        if HAS_COL_FACTOR:
            factor = tl.load(col_factor_ptr + piece * cols + col, mask=col < cols, other=0.0)
            step *= factor.to(tl.float32)
    elif HAS_COL_FACTOR:
        factor = tl.load(col_factor_ptr + piece * cols + col, mask=col < cols, other=0.0)
        step *= factor.to(tl.float32) * rate
    else:
        step *= rate
    weight_ptr = pointer_to(tl.load(weights_ptr + piece), WEIGHT, ALIGNED)
    weight_at = weight_ptr + row * weight_rows + col * weight_cols
    weight = tl.load(weight_at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUALS:
        residual_ptr = pointer_to(tl.load(residuals_ptr + piece), WEIGHT, ALIGNED)
        residual_at = residual_ptr + row * residual_rows + col * residual_cols
        weight += tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
    if CAUTIOUS:
        # Cautious weight decay (arXiv 2510.12402): only what the step moves towards zero.
        weight -= tl.where(weight * step >= 0, weight * decay, 0.0)
    else:
        weight *= kept
    weight -= step
    rounded = weight.to(WEIGHT)
    stored = inside
    if HAS_MOVES:
        stored = inside & (row < tl.where(tl.load(moves_ptr + piece) != 0, rows, 0))
    tl.store(weight_at, rounded, mask=stored)
    if HAS_RESIDUALS:
        tl.store(residual_at, (weight - rounded.to(tl.float32)).to(WEIGHT), mask=stored)


@triton.jit
def neuron_scale(second_moment, eps):
    """``1 / (sqrt(v) + eps)``; 0 for a neuron that never moved."""
    denominator = tl.sqrt(second_moment) + eps
    # The root of the smallest normal number: below it the square of the quotient is infinite.
    return tl.where(denominator < 1.0842021724855044e-19, 0.0, 1.0 / denominator)


@triton.jit
def neurons_kernel(
    norms_ptr,
    old_ptr,
    new_ptr,
    scales_ptr,
    neurons,
    inputs,
    weight,
    eps,
    target,
    MATCHES_RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lines 4 to 6 for one matrix, from the norms of O's neurons: v, and what O is scaled by.

    ``target`` is the norm that a step is given, or, unless ``MATCHES_RMS``, over O's norm.
    """
    matrix = tl.program_id(0).to(tl.int64)
    normalized = tl.zeros((BLOCK,), dtype=tl.float32)
    plain = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, neurons, BLOCK):
        neuron = start + tl.arange(0, BLOCK)
        inside = neuron < neurons
        at = matrix * neurons + neuron
        norm = tl.load(norms_ptr + at, mask=inside, other=0.0)
        mean_square = norm * norm / inputs
        old = tl.load(old_ptr + at, mask=inside, other=0.0)
        new = lerp(old, mean_square, weight)
        tl.store(new_ptr + at, new, mask=inside)
        scale = tl.where(inside, neuron_scale(new, eps), 0.0)
        normalized += mean_square * scale * scale
        plain += mean_square
    norm = tl.sqrt(tl.sum(normalized) * inputs)
    if MATCHES_RMS:
        wanted = target
    else:
        wanted = target * tl.sqrt(tl.sum(plain) * inputs)
    tl.store(scales_ptr + matrix, tl.where(norm == 0, 0.0, wanted / norm))


@triton.jit
def factors_kernel(state_ptr, scales_ptr, out_ptr, neurons, eps, BLOCK: tl.constexpr):
    """What each neuron's entries of O are multiplied by, for pieces of matrices."""
    piece = tl.program_id(0).to(tl.int64)
    neuron = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = neuron < neurons
    at = piece * neurons + neuron
    second_moment = tl.load(state_ptr + at, mask=inside, other=0.0)
    factor = neuron_scale(second_moment, eps) * tl.load(scales_ptr + piece)
    tl.store(out_ptr + at, factor, mask=inside)
