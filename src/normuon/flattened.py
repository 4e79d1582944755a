"""Parameters whose matrices a framework has flattened away, told by the marks it leaves on them.

A flat piece cannot be orthogonalised, and no group or view can bring the matrix back, so these are
refused wherever they turn up.
"""

from __future__ import annotations

from torch import Tensor

USE_FSDP2 = "use FSDP2 (torch.distributed.fsdp.fully_shard)"


def check_not_flattened(label: str, param: Tensor) -> None:
    """Checks that neither FSDP1 nor DeepSpeed ZeRO-3 keeps this parameter in flat pieces.

    Args:
        label: the parameter's name and shape, the start of every message.
        param: the parameter.

    Raises:
        ValueError: names the parameter, who flattened it and what to use instead.

    Example:
        >>> import torch
        >>> from torch.distributed.fsdp import FlatParameter
        >>> check_not_flattened("w [6]", FlatParameter(torch.zeros(6)))
        Traceback (most recent call last):
        ...
        ValueError: w [6]: FSDP1 flattens matrices away, so they cannot be orthogonalised; use
        FSDP2 (torch.distributed.fsdp.fully_shard)
    """
    # The flat parameter itself, and the originals that use_orig_params=True leaves in place: those
    # are views of it, one-dimensional and perhaps empty, outside of forward and backward.
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"{label}: FSDP1 flattens matrices away, so they cannot be orthogonalised; {USE_FSDP2}"
        )
    if hasattr(param, "ds_tensor"):
        raise ValueError(
            f"{label}: DeepSpeed ZeRO-3 keeps this parameter in flat pieces, so it cannot be "
            f"orthogonalised; {USE_FSDP2}, or DeepSpeed with zero_optimization.stage 0"
        )
