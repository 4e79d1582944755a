"""Handles what frameworks add to a model: segments in names, modules, flattened parameters."""

from __future__ import annotations

from torch import Tensor, nn

WRAPPER_SEGMENTS = frozenset(
    (
        *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
        *("modules_to_save", "original_module", "base_layer", "_forward_module"),
    )
)
"""What DDP, DataParallel, torch.compile, FSDP1, activation checkpointing, PEFT and Fabric put into
the names of what they wrap."""

USE_FSDP2 = "use FSDP2 (torch.distributed.fsdp.fully_shard)"


def bare_name(name: str) -> str:
    """A parameter's or module's name without the segments that wrappers add.

    Example:
        >>> bare_name("_orig_mod.module.layers.0._checkpoint_wrapped_module.up.weight")
        'layers.0.up.weight'
    """
    segments = name.split(".")
    kept = [
        segment
        for before, segment in zip(["", *segments], segments, strict=False)
        if segment not in WRAPPER_SEGMENTS and before != "modules_to_save"
    ]
    return ".".join(kept)


def innermost(model: nn.Module) -> tuple[str, nn.Module]:
    """The model inside its wrappers, with its name there.

    A module that has no parameter of its own and only one child with any is a wrapper: DDP, a
    compiled module, or an outer class with ``self.net = resnet()``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> innermost(nn.Sequential(nn.Sequential(model), nn.MSELoss()))[0]
        '0.0'
    """
    path: list[str] = []
    while True:
        children = [
            (name, child)
            for name, child in model.named_children()
            if next(child.parameters(), None) is not None
        ]
        owns = next(model.parameters(recurse=False), None) is not None
        if owns or len(children) != 1 or not list(children[0][1].children()):
            return ".".join(path), model
        path.append(children[0][0])
        model = children[0][1]


def check_not_flattened(label: str, param: Tensor) -> None:
    """Checks that neither FSDP1 nor DeepSpeed ZeRO-3 keeps this parameter in flat pieces.

    Args:
        label: the parameter's name and shape, the start of every message.
        param: the parameter.

    Raises:
        ValueError: names the parameter, what flattened it and what to use instead.

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
