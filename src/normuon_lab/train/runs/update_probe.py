"""Measures an arm's update matrices: singular values and row norms (the paper's Fig. 1). Updates
are differences of weights around a step, so the run does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from normuon.momentum_forms import whole_momentum
from normuon_lab.layer_names import layer_numbers, layer_of
from normuon_lab.train.arms.builders import hidden_groups
from normuon_lab.train.matrix_figures import describe_matrix, update_of

STAGES = (0.1, 0.5, 0.9)
"""Training stages at which updates are measured, as shares of all steps."""

_KINDS = (
    *("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    *("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
)
"""Endings of the names of the matrices that are measured: Llama's, and GPT-2's."""


class UpdateProbe:
    """Measures the update matrices of a few hidden matrices at a few steps of one run.

    The update is taken per unit of learning rate. Where the optimizer orthogonalises a momentum,
    that is measured too, as `momentum`: it is what the update would be without orthogonalisation
    and scaling. Measured are the matrices of the first and the last layer.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], *, steps: int) -> None:
        self._matrices = _chosen(model)
        self._views = {
            name: group["view"] for group in hidden_groups(model) for name, _ in group["params"]
        }
        self._placed = {
            parameter: (group, optimizer)
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
            self._before = {name: p.detach().clone() for name, p in self._matrices.items()}

    def after_step(self, step: int) -> None:
        """Measure the updates that step `step` made, if it is one to measure."""
        for name, before in self._before.items():
            parameter = self._matrices[name]
            group, optimizer = self._placed[parameter]
            update = update_of(before, parameter.detach(), group) / group["lr"]
            measured = {"step": step + 1, "matrix": name, **self._described(name, update)}
            state = optimizer.state.get(parameter, {})
            momentum = state.get("momentum_buffer")
            if "momentum_codes" in state:
                momentum = whole_momentum(state, parameter, group.get("view"))
            if momentum is not None:
                measured["momentum"] = self._described(name, momentum.detach().double())
            self.measurements.append(measured)
        self._before = {}

    def _described(self, name: str, matrix: Tensor) -> dict[str, Any]:
        view = self._views[name]
        (part,) = view.parts(matrix.shape)
        return describe_matrix(view.matrices(matrix, part)[0])


def _chosen(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are measured, by name."""
    numbers = layer_numbers(name for name, _ in model.named_parameters())
    endings = tuple(f"{kind}.weight" for kind in _KINDS)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(endings) and layer_of(name) in (numbers[0], numbers[-1])
    }
