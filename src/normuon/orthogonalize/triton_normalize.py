"""Triton kernels of the normalisation: each matrix's sum of squares, and the division by its norm.

Sums are in float64. There no square of a float32 under- or overflows, so no matrix has to be scaled
first, and the order of summation, which differs between layouts, does not show in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096
"""Elements of one program."""


@triton.jit
def sum_squares_kernel(x_ptr, sums_ptr, numel, chunks, BLOCK: tl.constexpr):
    """``sums[b, chunk]``: of the squares of one block of elements of a matrix ``x[b]``."""
    program = tl.program_id(0)
    matrix, chunk = program // chunks, program % chunks
    index = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + matrix.to(tl.int64) * numel + index, mask=index < numel, other=0.0)
    x = x.to(tl.float64)
    tl.store(sums_ptr + program, tl.sum(x * x))


@triton.jit
def divide_kernel(x_ptr, sums_ptr, out_ptr, numel, chunks, TINY: tl.constexpr, BLOCK: tl.constexpr):
    """``out[b] = x[b] / sqrt(sums[b])``; 0 where that norm is below ``TINY``."""
    program = tl.program_id(0)
    matrix, chunk = program // chunks, program % chunks
    norm = tl.sqrt(tl.load(sums_ptr + matrix))
    scale = tl.where(norm < TINY, 0.0, 1.0 / norm)
    index = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = matrix.to(tl.int64) * numel + index
    x = tl.load(x_ptr + at, mask=index < numel, other=0.0)
    x = (x.to(tl.float64) * scale).to(tl.float32)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=index < numel)
