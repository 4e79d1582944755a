"""The one place that chooses how a batch of matrices is orthogonalised, and by which backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from normuon.orthogonalize.coefficients import Triple
from normuon.orthogonalize.compiled import compiled_iterate
from normuon.orthogonalize.flops import num_panels, orthogonalize_flops
from normuon.orthogonalize.fused import (
    SYMMETRIC_SIDE,
    SYMMETRIC_TILE,
    SYMMETRIC_TILES,
    num_lower_tiles,
    symmetric_product_fused,
    why_not_symmetric,
)
from normuon.orthogonalize.iteration import effective_rank, iterate, iterate_
from normuon.orthogonalize.kernels import (
    MISSING,
    is_installed,
    kernel_orthogonalizer,
    why_unavailable,
)
from normuon.orthogonalize.normalize import largest_magnitude, normalize_frobenius
from normuon.orthogonalize.precision import transport_dtype
from normuon.orthogonalize.segments import plain_segments, segments_for
from normuon.orthogonalize.workspace import ALIGNMENT, Workspace

Orthogonalizer = Callable[[Tensor], Tensor]
"""``[B, M, N] -> [B, M, N]``: takes matrices of Frobenius norm 1 (or 0), in ``ns_dtype``."""

Chosen = Literal["eager", "compile", "kernels", "triton"]
Backend = Literal["auto", Chosen]
BACKENDS: tuple[Backend, ...] = ("auto", "eager", "compile", "kernels", "triton")

MAX_INDEX = 2**31
"""Elements from which a batch is too large for a kernel's 32-bit indices."""

_log = logging.getLogger("normuon")


def orthogonalize(
    x_BMN: Tensor,
    *,
    coefficients: Sequence[Triple],
    dtype: torch.dtype,
    orthogonalizer: str | Orthogonalizer = "auto",
    backend: Backend = "auto",
    equilibrate: bool = False,
    workspace: Workspace | None = None,
    scratch: Tensor | None = None,
    sum_squares_B: Tensor | None = None,
    effective_rank_B: Tensor | None = None,
    fused: bool | None = None,
) -> Tensor:
    """O = NS(M) of Alg. 1, line 3, for a batch of matrices of any scale.

    Args:
        x_BMN: floating-point batch; not written to unless it is ``scratch``.
        coefficients: one ``(a, b, c)`` per Newton-Schulz step; a callable orthogonaliser has its
            own and ignores these.
        dtype: dtype to compute in.
        orthogonalizer: ``"newton_schulz"``, ``"gram"``, ``"auto"`` for the one of the two with
            fewer FLOPs, or a callable ``[B, M, N] -> [B, M, N]``.
        backend: ``"eager"``; ``"compile"`` for torch.compile; ``"triton"`` for symmetric products
            by this library's kernel; ``"kernels"`` for the package gram-newton-schulz; ``"auto"``
            for ``"triton"`` where it runs and eager elsewhere.
        equilibrate: even the rows and columns of every matrix first; see `equilibrate_`.
        workspace: scratch kept between calls; None for none.
        scratch: contiguous memory of the shape that may be overwritten, ``x_BMN`` itself perhaps;
            it saves a copy where its dtype is that of `normalize_frobenius`'s division.
        sum_squares_B: each matrix's sum of squares in float64, where it is known.
        effective_rank_B: where to write each matrix's `effective_rank`, after ``equilibrate``
            if that is on; None for nowhere. It costs a reduction where a Gram
            matrix is at hand, and a product under a callable, ``"kernels"`` and ``"compile"``.
        fused: False to normalise by torch's own operations where Triton kernels would run.

    Returns:
        A ``[B, M, N]`` tensor in ``dtype`` that the caller may overwrite, valid until the workspace
        is used again; an all-zero matrix gives zero.

    Raises:
        ValueError: a callable returned another shape than it was given, or the kernels were asked
            for by name where they do not run.

    Example:
        >>> from normuon.orthogonalize import resolve_coefficients
        >>> x = torch.tensor([[[3e-5, 0.0], [0.0, 2e-5]]])
        >>> jordan = resolve_coefficients("jordan", 5)
        >>> orthogonalize(x, coefficients=jordan, dtype=torch.float32)
        tensor([[[1.1171, 0.0000],
                 [0.0000, 0.6821]]])
    """
    workspace = workspace or Workspace()
    unit_BMN = normalize_frobenius(
        x_BMN.to(transport_dtype(dtype)),
        dtype=dtype,
        equilibrate=equilibrate,
        workspace=workspace,
        out=scratch,
        sum_squares_B=sum_squares_B,
        fused=fused,
    )
    with _without_autocast(x_BMN.device.type):
        if callable(orthogonalizer):
            _write_effective_rank_(effective_rank_B, unit_BMN)
            return _by_callable(unit_BMN, orthogonalizer)
        return _by_method(
            unit_BMN, tuple(coefficients), orthogonalizer, backend, workspace, effective_rank_B
        )


def _write_effective_rank_(effective_rank_B: Tensor | None, x_BMN: Tensor) -> None:
    """By a product of its own, for what shows nobody its Gram matrix."""
    if effective_rank_B is not None:
        x_BMN = x_BMN.mT if x_BMN.shape[-2] > x_BMN.shape[-1] else x_BMN
        effective_rank_B.copy_(effective_rank(x_BMN @ x_BMN.mT))


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A step may run under autocast, which would round products to a dtype nobody chose.

    Only where it is on: torch.autocast asks a backend that is made outside of torch for the dtypes
    of its autocast, which it need not have, even to turn it off.
    """
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _by_method(
    x_BMN: Tensor,
    coefficients: tuple[Triple, ...],
    method: str,
    backend: Backend,
    workspace: Workspace,
    effective_rank_B: Tensor | None,
) -> Tensor:
    # `resolve_backend` keeps what is traced eager, and torch.compile cannot trace the question.
    if backend == "auto" and not torch.compiler.is_compiling() and is_fake(x_BMN):
        backend = "eager"  # A kernel needs real memory.
    chosen = resolve_backend(backend, device=x_BMN.device, dtype=x_BMN.dtype)
    count, m, n = x_BMN.shape
    short = min(m, n)
    panels, symmetric = 1, None
    if chosen == "eager":
        panels = num_panels(short, device_type=x_BMN.device.type)
    elif chosen == "triton" and short >= SYMMETRIC_SIDE:
        # The segments must not depend on how many matrices go together, which layouts decide.
        panels = -(-short // SYMMETRIC_TILE)
        if num_lower_tiles(count, short) >= SYMMETRIC_TILES and x_BMN.numel() < MAX_INDEX:
            symmetric = symmetric_product_fused
    segments = segments_for(
        method, m, n, coefficients=coefficients, dtype=x_BMN.dtype, panels=panels
    )
    if chosen in ("kernels", "compile") or torch.compiler.is_compiling():
        _write_effective_rank_(effective_rank_B, x_BMN)
    if chosen == "kernels":
        return kernel_orthogonalizer(coefficients, segments)(x_BMN)
    if torch.compiler.is_compiling():  # The whole step is being compiled, this part with it.
        return iterate(x_BMN, coefficients, segments=segments)
    if chosen == "compile":
        return compiled_iterate(coefficients, segments)(x_BMN)
    return iterate_(
        x_BMN,
        coefficients,
        segments=segments,
        workspace=workspace,
        symmetric=symmetric,
        effective_rank_B=effective_rank_B,
    )


def _by_callable(x_BMN: Tensor, orthogonalizer: Orthogonalizer) -> Tensor:
    # Asked before the call, which may overwrite its argument.
    zero_B11 = largest_magnitude(x_BMN) == 0
    o_BMN = orthogonalizer(x_BMN)
    if not isinstance(o_BMN, Tensor) or o_BMN.shape != x_BMN.shape:
        found = f"shape {list(o_BMN.shape)}" if isinstance(o_BMN, Tensor) else type(o_BMN).__name__
        raise ValueError(
            f"orthogonalizer returned {found} for an input of "
            f"{list(x_BMN.shape)}; it must map [B, M, N] to [B, M, N]"
        )
    # Zero has no one polar factor: an SVD gives some orthogonal matrix, and the step must be zero.
    # `where` copies, as it must: the callable may hand out a buffer of its own.
    return torch.where(zero_B11, 0.0, o_BMN.to(x_BMN.dtype))


def resolve_backend(backend: Backend, *, device: torch.device, dtype: torch.dtype) -> Chosen:
    """The backend that serves a device and a dtype.

    Raises:
        ValueError: kernels were asked for by name where they do not run.

    Example:
        >>> resolve_backend("auto", device=torch.device("cpu"), dtype=torch.bfloat16)
        'eager'
    """
    if backend == "auto":
        # The kernels' programs belong to the device: a compiled step keeps to what it can trace.
        if device.type != "cuda" or torch.compiler.is_compiling():
            return "eager"
        return _auto_backend(device, dtype)
    if backend == "kernels":
        reason = why_unavailable(device, dtype)
        if reason is not None:
            raise ValueError(
                f"ns_backend='kernels' needs the kernels of gram-newton-schulz, but {reason}; "
                "'auto' takes what is available"
            )
    if backend == "triton":
        reason = why_not_symmetric(device, dtype)
        if reason is not None:
            raise ValueError(f"ns_backend='triton': {reason}; 'auto' takes what is available")
    return backend


def check_backend(backend: Backend) -> None:
    """Checks that what a backend needs is installed, before any step asks for it.

    Raises:
        ValueError: it is not; names the extra.
    """
    if backend == "kernels" and not is_installed():
        raise ValueError(f"ns_backend='kernels': {MISSING}")


@lru_cache(maxsize=64)
def _auto_backend(device: torch.device, dtype: torch.dtype) -> Chosen:
    """Cached, so that a choice is logged once."""
    reason = why_not_symmetric(device, dtype)
    choice: Chosen = "eager" if reason else "triton"
    name = str(dtype).removeprefix("torch.")
    because = f" ({reason})" if reason else ""
    _log.info("ns_backend='auto' is %r for %s on %s%s", choice, name, device, because)
    return choice


def flops_per_matrix(
    m: int,
    n: int,
    *,
    coefficients: Sequence[Triple],
    dtype: torch.dtype,
    device_type: str,
    orthogonalizer: str | Orthogonalizer = "auto",
) -> int:
    """FLOPs of `orthogonalize` for one m x n matrix, as the eager backend evaluates it.

    A callable's FLOPs are its own affair: it is counted as plain Newton-Schulz, which orders
    matrices by size all the same.

    Example:
        >>> from normuon.orthogonalize import resolve_coefficients
        >>> jordan = resolve_coefficients("jordan", 5)
        >>> flops_per_matrix(
        ...     768, 768, coefficients=jordan, dtype=torch.float32, device_type="cuda"
        ... )
        13589544960
    """
    if callable(orthogonalizer):
        return orthogonalize_flops(m, n, segments=plain_segments(coefficients))
    panels = num_panels(min(m, n), device_type=device_type)
    segments = segments_for(
        orthogonalizer, m, n, coefficients=coefficients, dtype=dtype, panels=panels
    )
    return orthogonalize_flops(m, n, segments=segments, panels=panels)


def is_faster_batched(m: int, n: int, *, dtype: torch.dtype, device_type: str) -> bool:
    """Whether matrices of this shape go through `orthogonalize` faster together than in turn.

    Small products cost more to launch than to compute, so they are batched everywhere, and on
    accelerators everything is. Large products on a CPU already fill it one by one, and only single
    matrices are cut into panels. Measured in float32 with 8 matrices on 2 threads, batched over
    looped time is 0.18 at 32 x 32, 0.76 at 128 x 128, 1.26 at 256 x 256 and 1.19 at 768 x 768.

    A CPU's products round by where in memory a matrix begins, to 16 bytes. Shapes whose neighbours
    in a batch would not all begin alike go one by one there, so that the results are the same bit
    by bit in a batch of any size. That holds in float32 and float64; batched products in bfloat16
    may differ from single ones.

    Example:
        >>> is_faster_batched(768, 3072, dtype=torch.float32, device_type="cpu")
        False
    """
    if device_type != "cpu":
        return True
    short = min(m, n)
    if m * n * dtype.itemsize % ALIGNMENT or short * short * dtype.itemsize % ALIGNMENT:
        return False
    if short <= 128:
        return True
    return dtype.itemsize == 2 and num_panels(short, device_type=device_type) == 1
