"""NorMuon in Lightning: layers unfrozen in the middle of a run, and statistics of steps logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from normuon.integrations.loggers import MeasuredSteps, normuon_in
from normuon.models.groups import Override, Pattern, param_groups
from normuon.optimizer import NorMuon
from normuon.statistics import Statistics


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

    Lightning's own function makes one group of bare parameters, which do not say what is a matrix,
    an embedding or a norm. This one groups them by their modules. Parameters that the optimizer
    already has become trainable and are not added again, so ``if epoch >= n:`` also works in a
    resumed run, which Lightning starts with everything frozen.

    Args:
        root: the LightningModule, whose names the parameters keep.
        modules: what is unfrozen; parts of ``root``.
        optimizer: a NorMuon, as Lightning passes it.
        lr: of the new groups; None: the first group's current one over ``initial_denom_lr``.
        initial_denom_lr: see ``lr``.
        overrides: as for `normuon.param_groups`.
        hidden: as for `normuon.param_groups`.
        other: as for `normuon.param_groups`.
        split_heads: as for `normuon.param_groups`.

    Example:
        >>> from torch.nn import Linear, Sequential
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


def statistics_callback(
    *,
    every: int | None = None,
    per_matrix: bool = False,
    prefix: str = "normuon/",
) -> Any:
    """A Lightning callback that logs the statistics of NorMuon's steps to the Trainer's loggers.

    They are in ``trainer.callback_metrics`` too, by the same names. With several NorMuons each name
    has the index of its optimizer: ``normuon/optimizer1/group0.normuon/...``.

    Args:
        every: steps between measurements; None for the Trainer's ``log_every_n_steps``.
        per_matrix: also log every matrix and `adamw` parameter, not groups alone.
        prefix: of all names.

    Returns:
        What goes into ``Trainer(callbacks=[...])``.
    """
    from lightning.pytorch.callbacks import Callback

    class StatisticsCallback(Callback):
        """Measures steps, and logs the figures at the end of the batch."""

        def __init__(self) -> None:
            self._measured: dict[str, Statistics] = {}
            self._steps: list[MeasuredSteps] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            chosen = [
                (number, optimizer)
                for number, optimizer in enumerate(trainer.optimizers)
                if isinstance(optimizer, NorMuon)
            ]
            if not chosen:
                normuon_in(trainer.optimizers[0])  # Which says what there is instead.
            for number, optimizer in chosen:
                name = prefix if len(chosen) == 1 else f"{prefix}optimizer{number}/"
                steps = MeasuredSteps(
                    optimizer,
                    partial(self._keep, name),
                    every=trainer.log_every_n_steps if every is None else every,
                    step=trainer.global_step,
                )
                self._steps.append(steps)

        def _keep(self, name: str, statistics: Statistics, step: int) -> None:
            self._measured[name] = statistics

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            for name, statistics in self._measured.items():
                numbers = statistics.to_dict(per_matrix=per_matrix)
                found = {f"{name}{key}": value for key, value in numbers.items()}
                for logger in trainer.loggers:
                    logger.log_metrics(found, step=trainer.global_step)
                trainer.callback_metrics.update(
                    {key: torch.tensor(value) for key, value in found.items()}
                )
            self._measured.clear()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            for steps in self._steps:
                steps.remove()
            self._steps.clear()

    return StatisticsCallback()
