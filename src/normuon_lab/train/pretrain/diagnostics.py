"""Measures momentum and update of the hidden matrices while training goes on, from outside.

Parameters and state are only read: the trajectory is the same bit for bit. Every matrix is measured
by one rank.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from normuon import MatrixView, NorMuon
from normuon.momentum_forms import whole_momentum as decoded_momentum
from normuon_lab.train.arms.builders import hidden_groups
from normuon_lab.train.loop import local_part
from normuon_lab.train.matrix_figures import matrix_figures, measuring_flops, update_of

MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")
"""What optimizers call their momentum: NorMuon and Muon, and AdamW."""

DEFAULT_MAX_FLOPS = 1e11
"""Operations of a rank per measurement: some 5 seconds on a core of a CPU."""


@dataclass(frozen=True, slots=True)
class HiddenMatrix:
    """A parameter, whole or a DTensor, and the rank that measures it."""

    name: str
    param: Tensor
    view: MatrixView
    owner: int


class MatrixDiagnostics:
    """Figures of hidden matrices around every N-th step.

    For each matrix, or each block of a fused one: condition number, effective rank and spread of
    row norms of the momentum and of the update; and the update's RMS over the weight's. The update
    is what the step did beyond weight decay, ``W (1 - lr wd) - W'``.

    A measurement costs a rank no more than `max_flops`, or one matrix. Models that need more are
    measured in rounds: one part of the matrices each time, in turn. Ranks divide a round's matrices
    among themselves; each gathers every matrix and drops those of others.

    Every rank must call both methods at every step.

    Args:
        model: the model that the optimizer trains.
        optimizer: NorMuon, Muon or AdamW over them; read for momentum, rate and decay.
        every: steps between measurements.
        max_flops: bound on the operations of a rank per measurement.

    Attributes:
        last_seconds: what the last measurement took on this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int,
        max_flops: float = DEFAULT_MAX_FLOPS,
    ) -> None:
        assert every >= 1
        self._optimizer = optimizer
        self._every = every
        hidden = _hidden_matrices(model, optimizer)
        is_shared = any(isinstance(param, DTensor) for _, param, _ in hidden)
        self._num_ranks = dist.get_world_size() if is_shared else 1
        self._rank = dist.get_rank() if is_shared else 0
        self.rounds = _rounds(hidden, num_ranks=self._num_ranks, max_flops=max_flops)
        self._group_of = {
            param: group for group in optimizer.param_groups for param in group["params"]
        }
        self._step = -1
        self._before: list[Tensor] = []
        self._round: Sequence[HiddenMatrix] = ()
        self.last_seconds = 0.0

    def before_step(self, step: int) -> None:
        """Remember the weights of this round, if a measurement is due."""
        self._step, self._round, self._before = step, (), []
        if (step + 1) % self._every:
            return
        began = time.perf_counter()
        number = (step + 1) // self._every - 1
        self._round = self.rounds[number % len(self.rounds)]
        self._before = [local_part(matrix.param.detach()).clone() for matrix in self._round]
        self.last_seconds = time.perf_counter() - began

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float] | None:
        """The figures by name, the same on every rank; None if none are due.

        Names are ``diagnostics/PARAMETER/FIGURE``, or ``diagnostics/PARAMETER[BLOCK]/FIGURE`` for
        blocks of a fused parameter. A matrix that is zero or not finite has no figures.
        """
        if not self._round:
            return None
        assert step == self._step
        began = time.perf_counter()
        measured = [
            self._measure(matrix, before)
            for matrix, before in zip(self._round, self._before, strict=True)
        ]
        by_rank = [measured]
        if self._num_ranks > 1:
            by_rank = [[]] * self._num_ranks
            dist.all_gather_object(by_rank, measured)
        found: dict[str, float] = {}
        for number, matrix in enumerate(self._round):
            found.update(by_rank[matrix.owner][number])
        self._round, self._before = (), []
        self.last_seconds += time.perf_counter() - began
        return found

    def _measure(self, matrix: HiddenMatrix, before: Tensor) -> dict[str, float]:
        """The figures of a matrix by name; none of those of other ranks."""
        param = matrix.param.detach()
        group = self._group_of[matrix.param]
        momentum = _momentum_of(self._optimizer, matrix.param, group)
        local = local_part(param)
        dtype = torch.promote_types(local.dtype, torch.float32)
        update = update_of(before, local, group).to(dtype)
        # Ranks gather whatever they own: collectives must not depend on the rank.
        whole_update = _whole(_placed_like(update, param))
        whole_momentum = None if momentum is None else _whole(momentum)
        weight, view = _whole(param), matrix.view
        if matrix.owner != self._rank:
            return {}
        found = {}
        blocks = view.parts(matrix.param.shape)
        for number, part in enumerate(blocks):
            block = f"[{number}]" if len(blocks) > 1 else ""
            place = f"diagnostics/{matrix.name}{block}"
            for kind, tensor in (("momentum", whole_momentum), ("update", whole_update)):
                figures = None if tensor is None else matrix_figures(view.matrices(tensor, part))
                if figures is not None:
                    for figure, value in asdict(figures).items():
                        found[f"{place}/{kind}_{figure}"] = value
            found[f"{place}/update_to_weight_rms"] = _rms_ratio(
                view.native(whole_update, part), view.native(weight, part)
            )
        return found


def _hidden_matrices(
    model: nn.Module, optimizer: Optimizer
) -> list[tuple[str, Tensor, MatrixView]]:
    """Hidden matrices with names and views, in the model's order.

    NorMuon's groups name them; for other optimizers `normuon.param_groups` finds them.
    """
    if isinstance(optimizer, NorMuon):
        views = {
            param: group.get("view") or MatrixView.linear()
            for group in optimizer.param_groups
            if group["algorithm"] != "adamw"
            for param in group["params"]
        }
    else:
        views = {
            param: group["view"] for group in hidden_groups(model) for _, param in group["params"]
        }
    return [(name, p, views[p]) for name, p in model.named_parameters() if p in views]


def _rounds(
    hidden: Sequence[tuple[str, Tensor, MatrixView]], *, num_ranks: int, max_flops: float
) -> list[list[HiddenMatrix]]:
    """Matrices in rounds, with owners: the least busy rank takes the next matrix."""
    rounds: list[list[HiddenMatrix]] = []
    load: list[float] = []
    for name, param, view in hidden:
        # Momentum and update.
        flops = 2.0 * measuring_flops(param.shape, view)
        if not rounds or min(load) + flops > max_flops:
            rounds.append([])
            load = [0.0] * num_ranks
        owner = load.index(min(load))
        load[owner] += flops
        rounds[-1].append(HiddenMatrix(name, param, view, owner))
    return rounds


def _momentum_of(optimizer: Optimizer, param: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    state = optimizer.state.get(param, {})
    if "momentum_codes" in state:
        return decoded_momentum(state, param, group.get("view"))
    return next((state[key] for key in MOMENTUM_KEYS if key in state), None)


def _rms_ratio(update: Tensor, weight: Tensor) -> float:
    weight_norm = float(weight.double().norm())
    return float(update.double().norm()) / weight_norm if weight_norm > 0 else 0.0


def _placed_like(local: Tensor, param: Tensor) -> Tensor:
    """A local tensor as a DTensor placed like a parameter; a plain tensor stays."""
    if not isinstance(param, DTensor):
        return local
    placed: Tensor = torch.empty_like(param, dtype=local.dtype)
    assert isinstance(placed, DTensor)
    placed.to_local().copy_(local)
    return placed


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
