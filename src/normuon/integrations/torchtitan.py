"""NorMuon in torchtitan: a `build_optimizers` for its TrainSpec."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from normuon.models.groups import Override, Pattern, param_groups
from normuon.optimizer import NorMuon


def build_optimizers(
    model_parts: Sequence[nn.Module],
    optimizer_config: Any,
    parallel_dims: Any,
    ft_manager: Any = None,
    *,
    overrides: Mapping[Pattern, Override] | None = None,
    **options: Any,
) -> Any:
    """torchtitan's `build_optimizers` with NorMuon: one optimizer per model part.

    Set it as the TrainSpec's ``build_optimizers_fn``, with `functools.partial` for overrides or
    options. The job's ``[optimizer]`` section gives ``lr``,
    ``weight_decay``, and AdamW's ``beta1``, ``beta2`` and ``eps``; its ``name`` and
    ``implementation`` are ignored.

    Args:
        model_parts: the parallelised parts of the model, one per pipeline stage on this rank.
        optimizer_config: torchtitan's ``Optimizer`` config.
        parallel_dims: unused, because parameters carry their meshes.
        ft_manager: torchtitan's ``FTManager``; fault tolerance must be off.
        overrides: as for `normuon.param_groups`.
        options: as for `NorMuon`; they win over the config's.

    Returns:
        torchtitan's ``OptimizersContainer``.

    Raises:
        ImportError: torchtitan is not installed.
        ValueError: the config asks for steps inside the backward pass, or for fault tolerance.
    """
    try:
        from torchtitan.components.optimizer import OptimizersContainer
    except ModuleNotFoundError as error:
        if error.name != "torchtitan":
            raise
        raise ImportError(
            "normuon.integrations.torchtitan needs torchtitan: pip install 'normuon[integrations]'"
        ) from error

    if optimizer_config.early_step_in_backward:
        raise ValueError(
            "optimizer.early_step_in_backward steps each parameter separately, but NorMuon steps "
            "them together: set it to false"
        )
    if ft_manager is not None and ft_manager.enabled:
        raise ValueError("fault_tolerance.enable is not supported with NorMuon: set it to false")
    parts = iter(model_parts)

    def normuon_for_next_part(_: Iterable[Tensor], **kwargs: Any) -> NorMuon:
        # The container hands over bare parameters; which is which, only the module can tell.
        # A pipeline stage may hold the embedding or the head alone.
        groups = param_groups(next(parts), overrides=overrides, hidden_required=False)
        return NorMuon(groups, **kwargs)

    config = {
        "lr": optimizer_config.lr,
        "weight_decay": optimizer_config.weight_decay,
        "betas": (optimizer_config.beta1, optimizer_config.beta2),
        "adamw_eps": optimizer_config.eps,
    }
    return OptimizersContainer(list(model_parts), normuon_for_next_part, {**config, **options})
