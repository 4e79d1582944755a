"""The one place that chooses how a batch of matrices is orthogonalised, and by which backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from normuon.orthogonalize.coefficients import Triple
from normuon.orthogonalize.compiled import compiled_iterate
from normuon.orthogonalize.flops import num_panels, orthogonalize_flops
from normuon.orthogonalize.iteration import iterate, iterate_
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

Backend = Literal["auto", "eager", "compile", "kernels"]
BACKENDS: tuple[Backend, ...] = ("auto", "eager", "compile", "kernels")

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
) -> Tensor:
    """O = NS(M) of Alg. 1, line 3, for a batch of matrices of any scale.

    Args:
        x_BMN: floating-point batch; not written to unless it is ``scratch``.
        coefficients: one ``(a, b, c)`` per Newton-Schulz step; a callable orthogonaliser has its
            own and ignores these.
        dtype: dtype to compute in.
        orthogonalizer: ``"newton_schulz"``, ``"gram"``, ``"auto"`` for the one of the two with
            fewer FLOPs, or a callable ``[B, M, N] -> [B, M, N]``.
        backend: ``"eager"``; ``"compile"`` for torch.compile; ``"kernels"`` for the package
            gram-newton-schulz; ``"auto"`` for those kernels where they run and eager elsewhere.
        equilibrate: even the rows and columns of every matrix first; see `equilibrate_`.
        workspace: scratch kept between calls; None for none.
        scratch: contiguous memory of the shape that may be overwritten, ``x_BMN`` itself perhaps;
            it saves a copy where its dtype is that of `normalize_frobenius`'s division.

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
    )
    # A step may run under autocast, which would round these products to a dtype nobody chose.
    device_type = x_BMN.device.type
    exact = torch.amp.is_autocast_available(device_type)
    with torch.autocast(device_type, enabled=False) if exact else nullcontext():
        if callable(orthogonalizer):
            return _by_callable(unit_BMN, orthogonalizer)
        return _by_method(unit_BMN, tuple(coefficients), orthogonalizer, backend, workspace)


def _by_method(
    x_BMN: Tensor,
    coefficients: tuple[Triple, ...],
    method: str,
    backend: Backend,
    workspace: Workspace,
) -> Tensor:
    chosen = resolve_backend(backend, device=x_BMN.device, dtype=x_BMN.dtype)
    _, m, n = x_BMN.shape
    panels = num_panels(min(m, n), device_type=x_BMN.device.type) if chosen == "eager" else 1
    segments = segments_for(
        method, m, n, coefficients=coefficients, dtype=x_BMN.dtype, panels=panels
    )
    if chosen == "kernels":
        return kernel_orthogonalizer(coefficients, segments)(x_BMN)
    if torch.compiler.is_compiling():  # The whole step is being compiled, this part with it.
        return iterate(x_BMN, coefficients, segments=segments)
    if chosen == "compile":
        return compiled_iterate(coefficients, segments)(x_BMN)
    return iterate_(x_BMN, coefficients, segments=segments, workspace=workspace)


def _by_callable(x_BMN: Tensor, orthogonalizer: Orthogonalizer) -> Tensor:
    # Asked before the call, which may overwrite its argument.
    zero_B11 = largest_magnitude(x_BMN) == 0
    o_BMN = orthogonalizer(x_BMN)
    if o_BMN.shape != x_BMN.shape:
        raise ValueError(
            f"orthogonalizer returned shape {list(o_BMN.shape)} for an input of "
            f"{list(x_BMN.shape)}; it must map [B, M, N] to [B, M, N]"
        )
    # Zero has no one polar factor: an SVD gives some orthogonal matrix, and the step must be zero.
    # `where` copies, as it must: the callable may hand out a buffer of its own.
    return torch.where(zero_B11, 0.0, o_BMN.to(x_BMN.dtype))


def resolve_backend(
    backend: Backend, *, device: torch.device, dtype: torch.dtype
) -> Literal["eager", "compile", "kernels"]:
    """The backend that serves a device and a dtype.

    Raises:
        ValueError: the kernels were asked for by name where they do not run.

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
                f"ns_backend='kernels' asks for the kernels of gram-newton-schulz, but {reason}; "
                "'auto' uses them where they run"
            )
    return backend


def check_backend(backend: Backend) -> None:
    """Checks that what a backend needs is installed, before any step asks for it.

    Raises:
        ValueError: it is not; names the extra.
    """
    if backend == "kernels" and not is_installed():
        raise ValueError(f"ns_backend='kernels': {MISSING}")


@lru_cache(maxsize=64)
def _auto_backend(device: torch.device, dtype: torch.dtype) -> Literal["eager", "kernels"]:
    """Cached, so that a choice is logged once."""
    reason = why_unavailable(device, dtype)
    choice: Literal["eager", "kernels"] = "eager" if reason else "kernels"
    name = str(dtype).removeprefix("torch.")
    _log.info(
        "ns_backend='auto' is %r for %s on %s%s",
        choice,
        name,
        device,
        f" (gram-newton-schulz's kernels: {reason})" if reason else "",
    )
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
