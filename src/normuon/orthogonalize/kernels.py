"""The symmetric matrix-product kernels of the PyPI package gram-newton-schulz, where they run.

They are written for NVIDIA Hopper and Blackwell, compute in float16 and accumulate in float32. The
package is the extra ``normuon[gpu]``; it is imported when first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from normuon.orthogonalize.coefficients import Triple

PACKAGE = "gram_newton_schulz"
KERNEL_MODULE = "quack.gemm_interface"
"""What the package imports for its kernels when it is first used."""
MISSING = "the package gram-newton-schulz is not installed: pip install 'normuon[gpu]'"
HOPPER = (9, 0)
"""Compute capability of the first devices that the kernels are written for."""
KERNEL_DTYPE = torch.float16


@lru_cache(maxsize=1)
def is_installed() -> bool:
    """Whether the package can be imported; nothing is imported to find out."""
    return importlib.util.find_spec(PACKAGE) is not None


def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """What stands against the kernels, in words, or None where they run.

    Args:
        device: of the matrices.
        dtype: the dtype asked for; the kernels' float16 serves for it and bfloat16 alone.

    Example:
        >>> why_unavailable(torch.device("cpu"), torch.bfloat16)
        'they run on CUDA devices, not on cpu'
    """
    if device.type != "cuda":
        return f"they run on CUDA devices, not on {device.type}"
    if dtype.itemsize != 2:
        return f"they compute in float16, not in {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < HOPPER:
        major, minor = capability
        return f"they need Hopper or Blackwell (compute capability 9.0), not {major}.{minor}"
    return why_not_importable() if is_installed() else MISSING


@lru_cache(maxsize=1)
def why_not_importable() -> str | None:
    """What the import of the installed package's kernels says against it, or None."""
    try:
        importlib.import_module(KERNEL_MODULE)
    except Exception as error:  # Whatever it is, the kernels do not run; it is the reason given.
        return f"gram-newton-schulz's kernels cannot be imported: {type(error).__name__}: {error}"
    return None


@lru_cache(maxsize=64)
def kernel_orthogonalizer(
    coefficients: tuple[Triple, ...], segments: tuple[int, ...]
) -> Callable[[Tensor], Tensor]:
    """``[B, M, N] -> [B, M, N]`` by the package, restarted at the borders of the segments."""
    package = importlib.import_module(PACKAGE)
    shared = {
        "ns_coefficients": [list(triple) for triple in coefficients],
        # Its default captures CUDA graphs, whose outputs the next call overwrites.
        "compile_kwargs": {"fullgraph": True},
    }
    if all(length == 1 for length in segments):
        plain: Callable[[Tensor], Tensor] = package.StandardNewtonSchulz(**shared)
        return plain
    restarts = list(accumulate(segments))[:-1]
    gram: Callable[[Tensor], Tensor] = package.GramNewtonSchulz(
        gram_newton_schulz_reset_iterations=restarts, **shared
    )
    return gram
