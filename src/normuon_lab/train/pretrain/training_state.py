"""What of a run's memory a checkpoint holds, as nested tensors: weights, optimizer state, RNG.

Hyperparameters are not among it: they come from the configuration, and the learning rate from the
step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from normuon_lab.train.pretrain.ranks import Ranks
from normuon_lab.train.pretrain.tensor_reader import load_tensors_


def tensors_to_save(
    model: nn.Module, optimizers: Sequence[Optimizer], ranks: Ranks
) -> dict[str, Any]:
    """Nested tensors under `model`, `optimizer` and `trainer`: the live ones, not copies."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": _optimizer_state(model, optimizers)["state"],
        "trainer": {"rng": {str(ranks.rank): _random_state(ranks.device)}},
    }


def restore_(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    ranks: Ranks,
    *,
    world_size_then: int,
) -> None:
    """Load weights, optimizer state and RNG from a checkpoint, written by any number of ranks.

    The states of random generators belong to ranks: with another number of ranks they stay as they
    were seeded.

    Raises:
        InputError: the checkpoint is of another model or optimizer; nothing is changed then.
    """
    optimizer_state = _optimizer_state(model, optimizers)
    random_state = _random_state(ranks.device)
    tensors: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": optimizer_state["state"],
    }
    if world_size_then == ranks.world_size:
        tensors["trainer"] = {"rng": {str(ranks.rank): random_state}}
    load_tensors_(tensors, path)
    # The tensors are in place already; optimizers may keep what they derive from them.
    set_optimizer_state_dict(model, optimizers, optimizer_state)
    _set_random_state(random_state, ranks.device)


def _optimizer_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Of all optimizers together, by parameter name; made, at zero, where no step has made it."""
    return dict(get_optimizer_state_dict(model, list(optimizers)))


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
