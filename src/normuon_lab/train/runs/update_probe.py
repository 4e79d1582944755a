"""What the update matrices of an arm look like: singular values and row norms (the paper's Fig. 1).

The updates are measured as differences of weights around a step, from outside: the trajectory of
the run is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normuon_lab.layer_names import layer_of

# Training stages at which updates are measured, as shares of all steps.
STAGES = (0.1, 0.5, 0.9)


class UpdateProbe:
    """Measures the update matrices of a few hidden matrices at a few steps of one run.

    Where the optimizer orthogonalises a momentum, that is measured too, as `momentum`: it is what
    the update would be without orthogonalisation and scaling.

    Args:
        model: the model; its parameters are read, never written.
        optimizers: those that step the model, asked for learning rate and weight decay.
        matrix_names: names of the parameters to measure.
        steps: length of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        matrix_names: Sequence[str],
        steps: int,
    ) -> None:
        self._parameters = dict(model.named_parameters())
        self._matrix_names = list(matrix_names)
        self._transposed = _transposed_weights(model)
        self._group_of = {
            parameter: group
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self._state_of = {
            parameter: optimizer.state
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self._due = {max(0, round(stage * steps) - 1) for stage in STAGES}
        self._before: dict[str, Tensor] = {}
        self.measurements: list[dict[str, Any]] = []

    def before_step(self, step: int) -> None:
        """Remember the weights, if `step` is one to measure."""
        if step in self._due:
            self._before = {
                name: self._parameters[name].detach().clone() for name in self._matrix_names
            }

    def after_step(self, step: int) -> None:
        """Measure the updates that step `step` made, if it is one to measure."""
        for name, before in self._before.items():
            parameter = self._parameters[name]
            group = self._group_of[parameter]
            update = update_matrix(
                before, parameter.detach(), lr=group["lr"], weight_decay=group["weight_decay"]
            )
            measured = {"step": step + 1, "matrix": name, **self._described(name, update)}
            momentum = self._state_of[parameter].get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                measured["momentum"] = self._described(name, momentum.detach().double())
            self.measurements.append(measured)
        self._before = {}

    def _described(self, name: str, matrix: Tensor) -> dict[str, Any]:
        return describe_matrix(matrix.T if name in self._transposed else matrix)


def update_matrix(before: Tensor, after: Tensor, *, lr: float, weight_decay: float) -> Tensor:
    """The update per unit of learning rate, decay removed: (W (1 - lr wd) - W') / lr, in float64.

    Args:
        before: weights before the step, `[m, n]`.
        after: weights after it, `[m, n]`.
        lr: the learning rate of that step.
        weight_decay: the decoupled decay of that step.
    """
    return (before.double() * (1.0 - lr * weight_decay) - after.double()) / lr


def describe_matrix(update_MN: Tensor) -> dict[str, Any]:
    """Shape, Frobenius norm, singular values and row norms, the last two in descending order."""
    singular_values = torch.linalg.svdvals(update_MN)
    row_norms = update_MN.norm(dim=1).sort(descending=True).values
    return {
        "shape": list(update_MN.shape),
        "frobenius_norm": float(f"{float(update_MN.norm()):.6g}"),
        "singular_values": _rounded(singular_values),
        "row_norms": _rounded(row_norms),
    }


def choose_matrices(model: nn.Module, kinds: Sequence[str], num_layers: int) -> list[str]:
    """Names of the weights of the given kinds in the first and the last layer."""
    layers = {0, num_layers - 1}
    return [
        name
        for name, _ in model.named_parameters()
        if name.removesuffix(".weight").endswith(tuple(kinds))
        and name.endswith(".weight")
        and layer_of(name) in layers
    ]


def _transposed_weights(model: nn.Module) -> set[str]:
    """Weights stored `[in, out]`, whose neurons are columns: transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    }


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
