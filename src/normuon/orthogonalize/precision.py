"""Which dtype a matrix is orthogonalised in, and which one carries it there."""

from __future__ import annotations

from functools import lru_cache

import torch

NS_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def transport_dtype(ns_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a direction reaches the orthogonaliser, before it is normalised.

    ``ns_dtype`` itself, so that half the bytes travel when it is bfloat16 and nothing is lost that
    Newton-Schulz would keep; float32 for float16, whose range a raw gradient would leave.

    Example:
        >>> transport_dtype(torch.bfloat16), transport_dtype(torch.float16)
        (torch.bfloat16, torch.float32)
    """
    return torch.float32 if ns_dtype == torch.float16 else ns_dtype


def sums_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over many elements: float64, or float32 where a device lacks it.

    In float64 a sum hardly depends on how its terms are spread over ranks.

    Example:
        >>> sums_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


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
