"""A matrix's momentum as numbers or as 8-bit codes, and the conversion between the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normuon.models.blocks import block_grid
from normuon.models.view import MatrixView
from normuon.step.int8 import decoded, encoded

MOMENTUM_KEYS = ("momentum_buffer", "momentum_codes", "momentum_absmax", "momentum_roundings")
"""Of a matrix's state, what is its momentum: the first, or the other three."""


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing DTensor."""
    return hasattr(tensor, "placements")


def momentum_of(state: Mapping[str, Tensor]) -> Tensor:
    """The entry of a matrix's state that has the parameter's shape: its momentum, or its codes."""
    return state["momentum_codes"] if "momentum_codes" in state else state["momentum_buffer"]


def recoded(
    state: Mapping[str, Any], param: Tensor, view: MatrixView, dtype: torch.dtype
) -> dict[str, Any]:
    """A matrix's state with its momentum in the form that a dtype asks for.

    Args:
        state: whole tensors, or DTensors; then every rank of the mesh must call this. It may lack
            the momentum, or have it in the right form already.
        param: the parameter.
        view: how it becomes matrices.
        dtype: of the momentum; int8 for codes.

    Returns:
        The state with whole tensors in place of a momentum that was in the other form.
    """
    found = dict(state)
    grid = block_grid(view, tuple(param.shape))
    if dtype == torch.int8 and isinstance(found.get("momentum_buffer"), Tensor):
        whole = _whole(found.pop("momentum_buffer"))
        found["momentum_codes"] = whole  # Of another shape it is for the caller to refuse.
        if whole.shape == param.shape:
            wide = whole.to(torch.promote_types(param.dtype, torch.float32))
            found["momentum_codes"], found["momentum_absmax"] = encoded(wide, grid)
    elif dtype != torch.int8 and isinstance(found.get("momentum_codes"), Tensor):
        codes, absmax = (_whole(found.pop(key)) for key in ("momentum_codes", "momentum_absmax"))
        found.pop("momentum_roundings", None)
        found["momentum_buffer"] = codes
        if codes.shape == param.shape and absmax.shape == grid.shape:
            found["momentum_buffer"] = decoded(codes, absmax, grid)
    return found


def whole_momentum(state: Mapping[str, Tensor], param: Tensor, view: MatrixView | None) -> Tensor:
    """A matrix's whole momentum as numbers, also if it is kept in codes.

    Args:
        state: of a parameter of a `normuon` or `muon` group.
        param: the parameter; if it is sharded, every rank of its mesh must call this.
        view: its group's; None: a matrix as it is.
    """
    view = view if view is not None else MatrixView.linear()
    return _whole(recoded(state, param, view, torch.float32)["momentum_buffer"])


def _whole(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return whole
