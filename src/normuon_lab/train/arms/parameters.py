"""Which parameters an arm's own rule trains, and at which rates AdamW trains the others.

The partition is `normuon.param_groups`', the same in every arm.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from normuon import param_groups
from normuon.models.heads import output_heads
from normuon_lab.train.arms.options import ArmOptions

NamedParameters = list[tuple[str, Tensor]]


def split_parameters(model: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """Hidden matrices, and everything else, as `(name, parameter)` pairs in the model's order."""
    hidden: NamedParameters = []
    other: NamedParameters = []
    for group in param_groups(model):
        (other if group["algorithm"] == "adamw" else hidden).extend(group["params"])
    return hidden, other


def other_rates(
    model: nn.Module, parameters: NamedParameters, lr: float, options: ArmOptions
) -> dict[float, NamedParameters]:
    """The parameters that AdamW trains, by their peak learning rate, in the model's order.

    A head that is tied to the embedding takes the head's rate.
    """
    heads = output_heads(model)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    embeddings = {id(parameter) for parameter in embedding.parameters()} if embedding else set()
    rest = options.adam_lr or lr
    found: dict[float, NamedParameters] = {}
    for name, parameter in parameters:
        rate = rest
        if id(parameter) in heads:
            rate = options.head_lr or rest
        elif id(parameter) in embeddings:
            rate = options.embedding_lr or rest
        found.setdefault(rate, []).append((name, parameter))
    return found


def tensors(parameters: NamedParameters) -> list[Tensor]:
    """The parameters without their names."""
    return [parameter for _, parameter in parameters]


def adamw_groups(
    model: nn.Module, other: NamedParameters, lr: float, options: ArmOptions
) -> list[dict[str, Any]]:
    """Groups of everything else for torch.optim.AdamW: a rate each, and no weight decay."""
    rates = other_rates(model, other, lr, options)
    return [
        {"params": tensors(parameters), "lr": rate, "weight_decay": 0.0}
        for rate, parameters in rates.items()
    ]
