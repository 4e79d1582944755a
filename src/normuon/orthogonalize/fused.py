"""What Triton kernels do for an orthogonalisation, where a device runs them.

They normalise in two passes over memory, and compute symmetric products in their lower half.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read and write; float64 takes torch's own operations."""


@lru_cache(maxsize=16)
def why_not_fused(device_type: str) -> str | None:
    """What stands against Triton kernels on a device, in words, or None where they run.

    Example:
        >>> why_not_fused("cpu")
        'Triton kernels run on CUDA devices, not on cpu'
    """
    if device_type != "cuda":
        return f"Triton kernels run on CUDA devices, not on {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def runs_fused(*tensors: Tensor) -> bool:
    """Whether Triton kernels can serve these tensors: their device, dtypes, and nothing traced."""
    if torch.compiler.is_compiling() or why_not_fused(tensors[0].device.type) is not None:
        return False
    return all(t.dtype in FUSED_DTYPES for t in tensors) and not any(map(is_fake, tensors))


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Kernels run on the current device, which need not be the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def sum_squares(x_BMN: Tensor) -> Tensor:
    """``[B]``, float64: the sum of squares of each matrix of a contiguous batch."""
    from normuon.orthogonalize.triton_normalize import BLOCK, sum_squares_kernel

    count, numel, chunks = _chunks(x_BMN, BLOCK)
    sums = torch.empty((count, chunks), dtype=torch.float64, device=x_BMN.device)
    with device_of(x_BMN):
        sum_squares_kernel[(count * chunks,)](x_BMN, sums, numel, chunks, BLOCK=BLOCK)
    return sums.sum(-1)


def divide_by_norm(x_BMN: Tensor, sums_B: Tensor, *, out: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm.

    Args:
        x_BMN: contiguous batch.
        sums_B: from `sum_squares`.
        out: contiguous, of the same shape and any of `FUSED_DTYPES`; ``x_BMN`` itself perhaps.

    Returns:
        ``out``; a matrix whose norm is no normal float32 becomes zero.
    """
    from normuon.orthogonalize.triton_normalize import BLOCK, divide_kernel

    count, numel, chunks = _chunks(x_BMN, BLOCK)
    with device_of(x_BMN):
        divide_kernel[(count * chunks,)](
            x_BMN,
            sums_B,
            out,
            numel,
            chunks,
            TINY=torch.finfo(torch.float32).tiny,
            BLOCK=BLOCK,
        )
    return out


SYMMETRIC_CAPABILITY = (9, 0)
"""Compute capability of the first devices on which `symmetric_product_fused` was measured."""

SYMMETRIC_TILE = 128
"""Rows and columns of one program's part of the product."""

SYMMETRIC_SIDE, SYMMETRIC_TILES = 2048, 500
"""Side, and tiles of a whole batch, from which it was faster than the library's full product.

On an H200 in bfloat16, its time over the full one's, for ``X X^T`` and for ``b R + c R^2``: 1.18
and 0.88 at 48 x 768 x 768, 1.14 and 1.29 at 8 x 1024 x 4096, 0.88 and 0.93 at 4 x 2048 x 5632, 0.85
and 0.79 at 12 x 2048 x 2048, 0.67 and 0.74 at 4096 x 14336. Too few tiles leave the device idle.
"""


def why_not_symmetric(device: torch.device, dtype: torch.dtype) -> str | None:
    """What stands against `symmetric_product_fused`, in words, or None where it serves.

    Args:
        device: of the matrices.
        dtype: of the matrices.

    Example:
        >>> why_not_symmetric(torch.device("cpu"), torch.bfloat16)
        'Triton kernels run on CUDA devices, not on cpu'
    """
    reason = why_not_fused(device.type)
    if reason is not None:
        return reason
    if dtype.itemsize != 2:
        return f"they multiply bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < SYMMETRIC_CAPABILITY:
        major, minor = capability
        return f"they need compute capability 9.0, and this device has {major}.{minor}"
    return None


def num_lower_tiles(count: int, side: int) -> int:
    """Programs of `symmetric_product_fused` for a batch.

    Example:
        >>> num_lower_tiles(4, 2048)
        544
    """
    tiles = -(-side // SYMMETRIC_TILE)
    return count * tiles * (tiles + 1) // 2


def symmetric_product_fused(
    a: Tensor,
    b: Tensor,
    *,
    add: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """`symmetric_product`: the lower half computed, ``add`` added before anything is rounded.

    Args:
        a: ``[B, s, k]``.
        b: ``[B, k, s]``: the transpose of ``a``, or symmetric as ``a`` is.
        add: ``[B, s, s]``, symmetric; None for zero.
        beta: factor of ``add``.
        alpha: factor of the product.
        out: where to write; must overlap no argument.

    Returns:
        ``[B, s, s]``, whose halves are equal bit by bit.
    """
    from normuon.orthogonalize.triton_symmetric import (
        INNER,
        SCHEDULE,
        symmetric_product_kernel,
    )

    count, side, inner = a.shape
    if out is None:
        out = torch.empty((count, side, side), dtype=a.dtype, device=a.device)
    if side == inner and a.stride(-1) == b.stride(-1) == 1:
        b = b.mT  # No transpose of `a`, so symmetric; the kernel is faster along the inner dim.
    added = out if add is None else add
    with device_of(a):
        symmetric_product_kernel[(num_lower_tiles(1, side), count)](
            a,
            b,
            added,
            out,
            side,
            inner,
            *a.stride(),
            *b.stride(),
            *added.stride(),
            *out.stride(),
            float(beta),
            float(alpha),
            HAS_ADD=add is not None,
            TILE=SYMMETRIC_TILE,
            INNER=INNER,
            **SCHEDULE,
        )
    return out


def _chunks(x_BMN: Tensor, block: int) -> tuple[int, int, int]:
    """How many matrices, elements of each, and blocks of each."""
    count = len(x_BMN)
    numel = x_BMN.numel() // count
    return count, numel, -(-numel // block)
