"""The optimizers that are compared, each a name and a way to build plain torch optimizers.

Every arm takes the same partition of the model, `normuon.param_groups`': hidden matrices on one
side, embeddings, head, norms and biases on the other, and one peak learning rate for both. To add
an arm, write its builder and list it in `ARMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from normuon_lab.errors import require

# The names of the arms are needed before training is, and importing torch takes seconds.
if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    NamedParameters = list[tuple[str, Tensor]]

ADAM_BETAS = (0.9, 0.95)
HIDDEN_WEIGHT_DECAY = 0.1  # 0 elsewhere, as in the paper


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One optimizer of the comparison.

    Attributes:
        name: what `--arms` calls it.
        label: what the report calls it.
        description: one line for the report's configuration table.
        build: from the model and the peak learning rate to the optimizers that step together.
    """

    name: str
    label: str
    description: str
    build: Callable[[nn.Module, float], list[Optimizer]]


def split_parameters(model: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """Hidden matrices, and everything else, as `(name, parameter)` pairs in the model's order."""
    from normuon import param_groups

    hidden: NamedParameters = []
    other: NamedParameters = []
    for group in param_groups(model):
        (other if group["algorithm"] == "adamw" else hidden).extend(group["params"])
    return hidden, other


def _tensors(parameters: NamedParameters) -> list[Tensor]:
    return [parameter for _, parameter in parameters]


def _build_adamw(model: nn.Module, lr: float) -> list[Optimizer]:
    from torch.optim import AdamW

    hidden, other = split_parameters(model)
    groups = [
        {"params": _tensors(hidden), "weight_decay": HIDDEN_WEIGHT_DECAY},
        {"params": _tensors(other), "weight_decay": 0.0},
    ]
    return [AdamW(groups, lr=lr, betas=ADAM_BETAS)]


def _build_muon(model: nn.Module, lr: float) -> list[Optimizer]:
    from torch.optim import AdamW, Muon

    hidden, other = split_parameters(model)
    return [
        Muon(
            _tensors(hidden),
            lr=lr,
            weight_decay=HIDDEN_WEIGHT_DECAY,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        AdamW(_tensors(other), lr=lr, betas=ADAM_BETAS, weight_decay=0.0),
    ]


def _build_normuon(model: nn.Module, lr: float) -> list[Optimizer]:
    from normuon import NorMuon, param_groups

    return [NorMuon(param_groups(model), lr=lr, weight_decay=HIDDEN_WEIGHT_DECAY)]


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(
            name="adamw",
            label="AdamW",
            description="torch.optim.AdamW for every parameter",
            build=_build_adamw,
        ),
        Arm(
            name="muon",
            label="Muon",
            description='torch.optim.Muon(adjust_lr_fn="match_rms_adamw") for hidden matrices, '
            "torch.optim.AdamW for the rest",
            build=_build_muon,
        ),
        Arm(
            name="normuon",
            label="NorMuon",
            description="normuon.NorMuon: NorMuon for hidden matrices, AdamW for the rest",
            build=_build_normuon,
        ),
    )
}


def check_arms(names: Sequence[str]) -> None:
    """Raise `InputError` unless `names` are known arms, at least one, each once."""
    require(len(names) > 0, f"--arms names nothing: choose from {', '.join(ARMS)}")
    for name in names:
        require(name in ARMS, f"unknown arm {name!r}: choose from {', '.join(ARMS)}")
        require(names.count(name) == 1, f"the arm {name!r} is named twice")
