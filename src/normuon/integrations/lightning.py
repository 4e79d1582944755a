"""NorMuon in Lightning's `BaseFinetuning`, which adds parameters in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normuon.models.groups import Override, Pattern, param_groups


def unfreeze_and_add_param_groups(
    root: nn.Module,
    modules: nn.Module | Iterable[nn.Module],
    optimizer: Optimizer,
    lr: float | None = None,
    initial_denom_lr: float = 10.0,
    *,
    overrides: Mapping[Pattern, Override] | None = None,
    hidden: Mapping[str, Any] | None = None,
    other: Mapping[str, Any] | None = None,
    split_heads: bool = False,
) -> None:
    """Lightning's ``unfreeze_and_add_param_group`` for NorMuon, in a callback's
    ``finetune_function``.

    Lightning's own makes one group of bare parameters, of which nothing says what is a matrix, an
    embedding or a norm. Here the whole module says it, as it did for the first groups. What the
    optimizer has already is made trainable and not added again, so that ``if epoch >= n:`` is right
    in a resumed run too, which Lightning begins with everything frozen.

    Args:
        root: the LightningModule, whose names the parameters keep.
        modules: what is unfrozen; parts of ``root``.
        optimizer: a NorMuon, as Lightning hands it over.
        lr: of the new groups; None for the first group's present one over ``initial_denom_lr``.
        initial_denom_lr: see ``lr``.
        overrides: as for `normuon.param_groups`.
        hidden: as for `normuon.param_groups`.
        other: as for `normuon.param_groups`.
        split_heads: as for `normuon.param_groups`.

    Example:
        >>> from torch.nn import Linear, Sequential
        >>> from normuon import NorMuon
        >>> model = Sequential(Linear(4, 8), Linear(8, 8), Linear(8, 2))
        >>> _ = model[0].requires_grad_(False)
        >>> optimizer = NorMuon(param_groups(model), lr=1e-2)
        >>> unfreeze_and_add_param_groups(model, model[0], optimizer)
        >>> [(group["param_names"], group["lr"]) for group in optimizer.param_groups[-2:]]
        [(['0.weight'], 0.001), (['0.bias'], 0.001)]
    """
    parts = [modules] if isinstance(modules, nn.Module) else list(modules)
    rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else lr
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    wanted = {id(param) for part in parts for param in part.parameters()} - held
    for part in parts:
        part.requires_grad_(True)
    groups = param_groups(
        root,
        overrides=overrides,
        hidden=hidden,
        other=other,
        split_heads=split_heads,
        hidden_required=False,
    )
    for group in groups:
        chosen = [
            number for number, (_, param) in enumerate(group["params"]) if id(param) in wanted
        ]
        if chosen:
            of_chosen = {key: [group[key][n] for n in chosen] for key in ("params", "reasons")}
            optimizer.add_param_group({"lr": rate, **group, **of_chosen})
