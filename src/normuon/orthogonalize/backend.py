"""The one place that chooses how and in which dtype a batch of matrices is orthogonalised.

The methods themselves are in `newton_schulz.py`; the optimizer only asks for `orthogonalize`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from normuon.orthogonalize.coefficients import Triple
from normuon.orthogonalize.newton_schulz import newton_schulz, normalize_frobenius

Orthogonalizer = Callable[[Tensor], Tensor]
"""``[B, M, N] -> [B, M, N]``: takes matrices of Frobenius norm 1 (or 0), in ``ns_dtype``."""

ORTHOGONALIZERS: dict[str, Callable[[Tensor, Sequence[Triple]], Tensor]] = {
    "newton_schulz": newton_schulz,
}
NS_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def orthogonalize(
    x_BMN: Tensor,
    *,
    coefficients: Sequence[Triple],
    dtype: torch.dtype,
    orthogonalizer: str | Orthogonalizer = "auto",
) -> Tensor:
    """O = NS(M) of Alg. 1, line 3, for a batch of matrices of any scale.

    Args:
        x_BMN: floating-point batch; not written to.
        coefficients: one ``(a, b, c)`` per Newton-Schulz step; a callable orthogonaliser has its
            own and ignores these.
        dtype: dtype to compute in.
        orthogonalizer: ``"auto"``, a name in `ORTHOGONALIZERS`, or a callable
            ``[B, M, N] -> [B, M, N]``.

    Returns:
        A ``[B, M, N]`` tensor in ``dtype`` that the caller may overwrite; an all-zero matrix gives
        zero.

    Raises:
        ValueError: a callable returned another shape than it was given.
    """
    x_BMN = normalize_frobenius(x_BMN.to(transport_dtype(dtype)), dtype=dtype)
    # A step may run under autocast, which would round these products to a dtype nobody chose.
    device_type = x_BMN.device.type
    exact = torch.amp.is_autocast_available(device_type)
    with torch.autocast(device_type, enabled=False) if exact else nullcontext():
        if not callable(orthogonalizer):
            name = "newton_schulz" if orthogonalizer == "auto" else orthogonalizer
            return ORTHOGONALIZERS[name](x_BMN, coefficients)
        o_BMN = orthogonalizer(x_BMN)
    if o_BMN.shape != x_BMN.shape:
        raise ValueError(
            f"orthogonalizer returned shape {list(o_BMN.shape)} for an input of "
            f"{list(x_BMN.shape)}; it must map [B, M, N] to [B, M, N]"
        )
    # Zero has no one polar factor: an SVD gives some orthogonal matrix, and the step must be zero.
    # `where` copies, as it must: the callable may hand out a buffer of its own.
    largest_B11 = torch.linalg.vector_norm(x_BMN, ord=float("inf"), dim=(-2, -1), keepdim=True)
    return torch.where(largest_B11 == 0, 0.0, o_BMN.to(dtype))


def transport_dtype(ns_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a direction reaches the orthogonaliser, before it is normalised.

    ``ns_dtype`` itself, so that half the bytes travel when it is bfloat16 and nothing is lost that
    Newton-Schulz would keep; float32 for float16, whose range a raw gradient would leave.

    Example:
        >>> transport_dtype(torch.bfloat16), transport_dtype(torch.float16)
        (torch.bfloat16, torch.float32)
    """
    return torch.float32 if ns_dtype == torch.float16 else ns_dtype


def is_faster_batched(m: int, n: int, *, dtype: torch.dtype, device_type: str) -> bool:
    """Whether matrices of this shape go through `newton_schulz` faster together than in turn.

    Small products cost more to launch than to compute, so they are batched everywhere, and on
    accelerators and in bfloat16 everything is. Large float32 products on a CPU already fill it one
    by one: measured with 8 matrices on 2 threads, batched over looped time is 0.18 at 32 x 32, 0.76
    at 128 x 128, 1.26 at 256 x 256 and 1.19 at 768 x 768. The results are the same bit by bit.

    Example:
        >>> is_faster_batched(768, 3072, dtype=torch.float32, device_type="cpu")
        False
    """
    return device_type != "cpu" or dtype.itemsize == 2 or min(m, n) <= 128


def resolve_ns_dtype(
    ns_dtype: torch.dtype | None, *, param_dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """The dtype to orthogonalise in.

    ``None`` means float64 for float64 parameters, and otherwise bfloat16 where the hardware
    multiplies it natively and float32 where it does not.

    Example:
        >>> resolve_ns_dtype(None, param_dtype=torch.float64, device=torch.device("cpu"))
        torch.float64
    """
    if ns_dtype is not None:
        return ns_dtype
    if param_dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if _native_bfloat16(device.type) else torch.float32


# torch.compile cannot trace the query of the hardware.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _native_bfloat16(device_type: str) -> bool:
    return multiplies_bfloat16_natively(device_type)


@lru_cache(maxsize=16)
def multiplies_bfloat16_natively(device_type: str) -> bool:
    """Whether matrix products in bfloat16 run on dedicated instructions of this device.

    CUDA devices and CPUs with AMX or AVX512-BF16 do. Elsewhere bfloat16 is emulated, which on
    a CPU is several times slower than float32.
    """
    if device_type == "cpu":
        if not hasattr(torch.cpu, "get_capabilities"):  # Older releases have private queries only.
            return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return device_type == "cuda"
