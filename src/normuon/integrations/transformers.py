"""NorMuon in transformers' Trainer, and in trainers derived from it, such as TRL's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normuon.integrations.loggers import MeasuredSteps
from normuon.models.groups import Override, Pattern, describe_groups, param_groups
from normuon.optimizer import NorMuon
from normuon.statistics import Statistics


def trainer_optimizer(
    args: Any,
    *,
    overrides: Mapping[Pattern, Override] | None = None,
    hidden: Mapping[str, Any] | None = None,
    other: Mapping[str, Any] | None = None,
    split_heads: bool = False,
    quiet: bool = False,
    **options: Any,
) -> tuple[type[TrainerOptimizer], dict[str, Any]]:
    """NorMuon with the Trainer's arguments, for ``Trainer(optimizer_cls_and_kwargs=...)``.

    The optimizer is built when the Trainer asks for it, from the model as it is then; if the model
    is sharded afterwards, as under FSDP2, Accelerate puts the shards into the groups. Trainers
    whose constructor does not have this argument, such as TRL's DPOTrainer, take it as their
    attribute ``optimizer_cls_and_kwargs`` before ``train()``.

    ``args.learning_rate`` holds for the whole model and ``args.weight_decay`` for hidden matrices.
    ``args.adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are AdamW's. The schedule is the
    Trainer's. ``args.optim`` is ignored.

    Args:
        args: the ``TrainingArguments`` that the Trainer gets.
        overrides: as for `normuon.param_groups`.
        hidden: as for `normuon.param_groups`.
        other: as for `normuon.param_groups`.
        split_heads: as for `normuon.param_groups`.
        quiet: print nothing. Otherwise the main process prints which parameters take which
            algorithm, and the rates.
        options: as for `NorMuon`; they win over ``args``.

    Returns:
        A factory and its arguments.

    Raises:
        ValueError: ``args.optim_args`` is set, which NorMuon would ignore.
    """
    if getattr(args, "optim_args", None):
        raise ValueError(
            f"TrainingArguments.optim_args={args.optim_args!r} is for optimizers that transformers "
            "makes; pass NorMuon's options to trainer_optimizer(args, ...)"
        )
    grouping = {
        "overrides": overrides,
        "hidden": hidden,
        "other": other,
        "split_heads": split_heads,
    }
    return TrainerOptimizer, {
        "args": args,
        "grouping": grouping,
        "options": options,
        "quiet": quiet,
    }


class TrainerOptimizer:
    """The factory that the Trainer calls; see `trainer_optimizer`."""

    def __init__(self, *params: Any, **kwargs: Any) -> None:
        """Takes no arguments; a Trainer that passes some is too old for factories.

        Raises:
            ImportError: transformers is too old.
        """
        if params or kwargs:
            import transformers

            raise ImportError(
                f"the Trainer of transformers {transformers.__version__} takes optimizer classes "
                "only: upgrade it (pip install -U transformers), or pass "
                'optimizer_cls_and_kwargs=(NorMuon, {"params": param_groups(model), "lr": ...})'
            )

    def __call__(
        self,
        model: nn.Module,
        trainer_args: Any = None,
        *,
        args: Any,
        grouping: Mapping[str, Any],
        options: Mapping[str, Any],
        quiet: bool,
    ) -> NorMuon:
        """Builds the optimizer.

        ``trainer_args`` is unused: axolotl's Trainer passes its arguments here, transformers' does
        not, and ``args`` are the same.
        """
        given = {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "betas": (args.adam_beta1, args.adam_beta2),
            "adamw_eps": args.adam_epsilon,
            **options,
        }
        optimizer = NorMuon(param_groups(model, **grouping), **given)
        if not quiet and args.should_log:
            print(summary_of(optimizer, options, args))
        return optimizer


def summary_of(optimizer: NorMuon, options: Mapping[str, Any], args: Any) -> str:
    """The table of the groups, and a line that says where the rates come from."""

    def source(name: str, argument: str) -> str:
        value = optimizer.defaults[name]
        origin = "given" if name in options else f"TrainingArguments.{argument}"
        return f"{name} {value:g} ({origin})"

    rates = ", ".join(
        (source("lr", "learning_rate"), source("weight_decay", "weight_decay") + " of matrices")
    )
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return (
        f"{describe_groups(optimizer.param_groups, collapse=True)}\n"
        f"NorMuon: {rates}; schedule {kind}"
    )


def log_statistics(
    trainer: Any,
    *,
    every: int | None = None,
    per_matrix: bool = False,
    prefix: str = "normuon/",
) -> None:
    """Logs the statistics of NorMuon's steps with the Trainer's own logs.

    They are in ``trainer.state.log_history`` too.

    Args:
        trainer: a Trainer that trains with NorMuon, however it was built.
        every: steps between measurements; None for ``TrainingArguments.logging_steps``.
        per_matrix: also log every matrix and `adamw` parameter, not groups alone.
        prefix: of all names.

    Raises:
        ValueError: ``every`` is below 1, or None while ``logging_steps`` is a fraction of a run.
    """
    from transformers import TrainerCallback

    steps = trainer.args.logging_steps if every is None else every
    if steps < 1 or steps != int(steps):
        raise ValueError(
            f"every={every!r}, with logging_steps={trainer.args.logging_steps!r}, must be a whole "
            "number of steps, at least 1"
        )
    measured: list[Statistics] = []

    class StatisticsCallback(TrainerCallback):
        """Measures the optimizer's steps and logs them when the Trainer has counted them."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._steps = MeasuredSteps(
                kwargs["optimizer"],
                lambda statistics, _: measured.append(statistics),
                every=int(steps),
                step=state.global_step,
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if measured:
                numbers = measured.pop().to_dict(per_matrix=per_matrix)
                trainer.log({f"{prefix}{name}": value for name, value in numbers.items()})

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._steps.remove()

    trainer.add_callback(StatisticsCallback())
