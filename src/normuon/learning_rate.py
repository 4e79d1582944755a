"""Converts learning rates of other optimizers, and warns of Muon-sized ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer

from normuon.models.view import MatrixView
from normuon.step.rule import ADAMW_RMS

Origin = Literal["adamw", "muon_match_rms_adamw", "muon_original", "muon_spectral_unclamped"]

MUON_SIZED_LR = 0.02
"""Muon's customary learning rate. With AdamW-sized steps even models of a million parameters, which
take the largest rates, are trained below it."""


def suggest_lr(
    lr: float,
    *,
    coming_from: Origin,
    to: Optimizer | Iterable[Mapping[str, Any]] | None = None,
) -> float:
    r"""The learning rate at which NorMuon's default scaling steps as far as another optimizer.

    With ``adjust_lr_fn="match_rms_adamw"`` a step's RMS is 0.2 lr, as AdamW's usually is. Muon's
    ``original`` scaling steps by lr max(1, m / n)^0.5 O, and the RMS of an orthogonal O of m rows
    and n columns is 1 / sqrt(max(m, n)): together lr / sqrt(n). So, over all hidden matrices:

        lr_normuon = 5 lr_muon sqrt(sum m / sum m n)

    which is 0.0036 for a 768-wide model and Muon's 0.02. Its ``spectral_unclamped`` scaling steps
    by lr (m / n)^0.5 O, and sums m min(1, m / n) in place of m. Use the rate as a starting point
    for tuning.

    Args:
        lr: the other optimizer's tuned peak learning rate.
        coming_from: ``"adamw"`` and ``"muon_match_rms_adamw"`` (torch.optim.Muon with that
            ``adjust_lr_fn``, Moonlight's scaling) keep their learning rate;
            ``"muon_original"`` is torch.optim.Muon's default, Keller Jordan's Muon and the
            authors' released NorMuon; ``"muon_spectral_unclamped"`` torch.optim.Muon with that
            ``adjust_lr_fn``, or dion's Muon with ``adjust_lr="spectral_norm"``.
        to: the param groups, or a NorMuon; needed for the last two, whose steps depend on the
            matrices' shapes.

    Returns:
        The learning rate for NorMuon with ``adjust_lr_fn="match_rms_adamw"``.

    Raises:
        ValueError: an unknown origin, a learning rate out of range, or groups without matrices.

    Example:
        >>> from torch import nn
        >>> from normuon import param_groups
        >>> suggest_lr(3e-4, coming_from="adamw")
        0.0003
        >>> layers = [nn.Linear(400, 100), nn.Linear(100, 400), nn.Linear(400, 10)]
        >>> groups = param_groups(nn.Sequential(*layers))
        >>> round(suggest_lr(0.02, coming_from="muon_original", to=groups), 6)
        0.007906
    """
    if coming_from not in get_args(Origin):
        known = ", ".join(repr(origin) for origin in get_args(Origin))
        raise ValueError(f"coming_from={coming_from!r} is not known; choose from {known}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr!r} must be a number above 0 and finite")
    if coming_from in ("adamw", "muon_match_rms_adamw"):
        return lr
    if to is None:
        raise ValueError(
            f"coming_from={coming_from!r} needs to=param_groups(model), because the step of that "
            "scaling depends on the shapes of the matrices"
        )
    shapes = _shapes(to.param_groups if isinstance(to, Optimizer) else to)
    if not shapes:
        raise ValueError("the groups in to= have no hidden matrix, so the rate cannot be converted")
    is_clamped = coming_from == "muon_original"
    squares = sum(batch * m * (1 if is_clamped else min(1, m / n)) for batch, m, n in shapes)
    entries = sum(batch * m * n for batch, m, n in shapes)
    return lr / ADAMW_RMS * math.sqrt(squares / entries)


def _shapes(groups: Iterable[Mapping[str, Any]]) -> list[tuple[int, int, int]]:
    """The matrices of the groups: how many, their rows, their columns."""
    shapes: list[tuple[int, int, int]] = []
    for group in groups:
        if group.get("algorithm", "normuon") == "adamw":
            continue
        view = group.get("view") or MatrixView.linear()
        for entry in group["params"]:
            param = entry[1] if isinstance(entry, tuple) else entry
            shapes.extend(view.shapes(param.shape))
    return shapes


def warn_if_muon_sized(group: Mapping[str, Any]) -> None:
    """Warns, once per value, of a Muon-sized learning rate with AdamW-sized steps.

    Args:
        group: a checked param group. A tensor learning rate is not checked, because reading it
            would wait for the device.
    """
    lr, scaling = group["lr"], group["adjust_lr_fn"]
    if group["algorithm"] == "adamw" or scaling != "match_rms_adamw" or isinstance(lr, Tensor):
        return
    if lr >= MUON_SIZED_LR:
        _warn_once(float(lr))


@cache
def _warn_once(lr: float) -> None:
    warnings.warn(
        f"lr={lr:g} with adjust_lr_fn='match_rms_adamw' looks like a learning rate that was tuned "
        f"for Muon: every step would move the weights by {ADAMW_RMS * lr:g} RMS, which usually "
        "diverges. Keep it with adjust_lr_fn='original', or convert it with "
        f"normuon.suggest_lr({lr:g}, coming_from='muon_original', to=param_groups(model))",
        UserWarning,
        stacklevel=6,  # The line that builds the optimizer.
    )
