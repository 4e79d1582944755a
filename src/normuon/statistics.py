"""What a measured step did to the model, by group and by matrix, on the device until asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normuon.params import planned_name
from normuon.state import view_of
from normuon.step.figures import COLUMN
from normuon.step.pieces import State
from normuon.step.record import GroupRecord, Noted, Place

SUMS = ("dead_rows", "skipped_steps")
MEANS = ("effective_rank", "effective_rank_share", "momentum_row_spread", "update_row_spread")
OF_VECTORS = ("update_rms", "weight_rms", "update_to_weight", "momentum_norm", "skipped_steps")
"""The figures of `adamw` groups."""


@dataclass(frozen=True, slots=True)
class _Owner:
    """A group or a matrix.

    Args:
        name: whose.
        algorithm: of its group.
        rows: runs of its rows: the table's number, the first row, and how many.
    """

    name: str
    algorithm: str
    rows: tuple[tuple[int, int, int], ...]


class Statistics:
    r"""What one measured step did: figures of every param group and of every matrix.

    All values are tensors on the device, sums over the ranks that share the parameters, and the
    same on each of them; nothing is read until `to_dict`, which needs one transfer. Only matrices
    that the step moved count, not those without gradients or with skipped ones.

    With W the weights after the step, U what the step subtracted apart from weight decay, and
    M the momentum as Newton-Schulz takes it (one step ahead under ``nesterov``):

    - ``update_rms``: the root mean square of U; ``0.2 lr`` by construction for `normuon` groups.
    - ``weight_rms``: of W.
    - ``update_to_weight``: their quotient.
    - ``momentum_norm``: ``||M||_F``; of a group the root of the sum of squares. AdamW's M is
      ``exp_avg``.
    - ``effective_rank``: ``(sum s^2)^2 / sum s^4`` over M's singular values s, between 1 and
      ``min(m, n)``: R_0 of Bartlett et al. (arXiv 1906.11300, definition 3), also called
      participation ratio. With ``equilibrate``, of M after it.
    - ``effective_rank_share``: the same over ``min(m, n)``.
    - ``momentum_row_spread``, ``update_row_spread``: standard deviation over mean of the norms of
      the rows of M and of U. Rows are output neurons.
    - ``dead_rows``: rows of M whose norm is at most 1.2e-7 of the longest row's.
    - ``skipped_steps``: how many steps ``skip_nonfinite`` has skipped, over all matrices.

    M is rounded to ``ns_dtype``: in bfloat16 ranks and spreads are right to 0.5%, norms to 0.05%.

    Of a group, root mean squares are over all its entries, ranks and spreads are means over its
    matrices, and ``dead_rows`` and ``skipped_steps`` are sums. Groups of `adamw` have no figures of
    rows and ranks.

    Attributes:
        step: which step of the optimizer this was, from 1. Compiled steps that are not measured
            are not counted.
    """

    def __init__(
        self, step: int, noted: Iterable[Noted], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        """Copies what a step has noted; `NorMuon.statistics` calls this."""
        self.step = step
        by_device: dict[torch.device, list[Tensor]] = {}
        at: dict[Place, list[tuple[int, int, int]]] = {}
        for one in noted:
            device = one.table.device
            tables = by_device.setdefault(device, [])
            start = sum(len(table) for table in tables)
            tables.append(one.table)
            number = list(by_device).index(device)
            for place, (first, count) in one.rows.items():
                at.setdefault(place, []).append((number, start + first, count))
        self._tables = [_moved_only(torch.cat(tables)) for tables in by_device.values()]
        self._groups = list(_group_owners(groups, at))
        self._matrices = list(_matrix_owners(groups, at))

    @property
    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Figures by the name of the group, such as ``group0.normuon``, each without dims."""
        return {owner.name: self._figures(owner, self._tables) for owner in self._groups}

    @property
    def matrices(self) -> dict[str, dict[str, Tensor]]:
        """Figures by the name of the matrix: its parameter's, with a number where that has many."""
        return {owner.name: self._figures(owner, self._tables) for owner in self._matrices}

    def to_dict(self, *, per_matrix: bool = False) -> dict[str, float]:
        """All figures as numbers, by ``NAME/FIGURE``. Only this call waits for the device.

        Args:
            per_matrix: add the figures of every matrix to those of groups.

        Returns:
            What a logger takes. A group or matrix that the step did not move has only
            ``skipped_steps``.
        """
        tables = [table.cpu() for table in self._tables]
        owners = [*self._groups, *(self._matrices if per_matrix else ())]
        found: dict[str, float] = {}
        for owner in owners:
            for name, value in self._figures(owner, tables).items():
                if name == "skipped_steps" or float(_sums(owner, tables)[COLUMN["moved"]]):
                    found[f"{owner.name}/{name}"] = float(value)
        return found

    def _figures(self, owner: _Owner, tables: Sequence[Tensor]) -> dict[str, Tensor]:
        figures = figures_of(_sums(owner, tables))
        if owner.algorithm == "adamw":
            figures = {name: figures[name] for name in OF_VECTORS}
        return figures


def figures_of(sums_F: Tensor) -> dict[str, Tensor]:
    """Figures from the sums of one matrix or of several."""
    sums = {name: sums_F[number] for name, number in COLUMN.items()}
    return {
        "update_rms": (sums["update_squares"] / sums["elements"]).sqrt(),
        "weight_rms": (sums["weight_squares"] / sums["elements"]).sqrt(),
        "update_to_weight": (sums["update_squares"] / sums["weight_squares"]).sqrt(),
        "momentum_norm": sums["momentum_squares"].sqrt(),
        **{name: sums[name] / sums["moved"] for name in MEANS},
        **{name: sums[name] for name in SUMS},
    }


def _moved_only(table_RF: Tensor) -> Tensor:
    """A copy of a table in which rows of what has not moved are 0, but for skipped steps."""
    moved_RF = (table_RF[:, COLUMN["moved"]] > 0)[:, None].expand_as(table_RF).clone()
    moved_RF[:, COLUMN["skipped_steps"]].fill_(True)
    return torch.where(moved_RF, table_RF, 0.0)


def _sums(owner: _Owner, tables: Sequence[Tensor]) -> Tensor:
    """``[F]``, on the first of the devices that its rows are on."""
    parts = [tables[number].narrow(0, first, count).sum(0) for number, first, count in owner.rows]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum(0)


def _group_owners(
    groups: Sequence[Mapping[str, Any]], at: Mapping[Place, Sequence[tuple[int, int, int]]]
) -> Iterator[_Owner]:
    for number, group in enumerate(groups):
        rows: list[tuple[int, int, int]] = []
        for index in range(len(group["params"])):
            for table, first, count in at.get((number, index), ()):
                if rows and rows[-1][0] == table and sum(rows[-1][1:]) == first:
                    rows[-1] = (table, rows[-1][1], rows[-1][2] + count)
                else:
                    rows.append((table, first, count))
        if rows:
            name = f"group{number}.{group['algorithm']}"
            yield _Owner(name, group["algorithm"], tuple(rows))


def _matrix_owners(
    groups: Sequence[Mapping[str, Any]], at: Mapping[Place, Sequence[tuple[int, int, int]]]
) -> Iterator[_Owner]:
    for number, group in enumerate(groups):
        for index in range(len(group["params"])):
            name = planned_name(group, number, index)
            rows = at.get((number, index), ())
            for matrix in range(rows[0][2] if rows else 0):
                own = tuple((table, first + matrix, 1) for table, first, _ in rows)
                label = name if rows[0][2] == 1 else f"{name}[{matrix}]"
                yield _Owner(label, group["algorithm"], own)


class Recorder:
    """Which steps of an optimizer are measured, and what the last of them noted."""

    def __init__(self) -> None:
        self._step = self._every = self._steps_left = 0
        self._measures_next = False
        self._records: dict[int, GroupRecord] = {}
        self._noted: list[Noted] = []
        self._noted_at = 0

    def measure_next(self) -> None:
        """Measures the next step, whatever else is measured."""
        self._measures_next = True

    def measure_every(self, every: int) -> None:
        """Measures every so many steps, the next one first; 0 for none."""
        self._every, self._steps_left = every, 0
        self._measures_next = False

    def begin_step(self) -> bool:
        """Whether the step that begins is measured."""
        if torch.compiler.is_compiling() and not (self._every or self._measures_next):
            return False  # A number that changes would have the step compiled anew.
        self._step += 1
        is_due, self._measures_next = self._measures_next, False
        if self._every:
            is_due |= self._steps_left == 0
            self._steps_left = (self._steps_left or self._every) - 1
        return is_due

    def begin_(self) -> None:
        """Forgets what the last measured step has noted."""
        for record in self._records.values():
            record.begin_()

    def record_of(self, number: int, group: Mapping[str, Any]) -> GroupRecord:
        """The record for a group's parameters that no other rank shares."""
        if number not in self._records:
            view = view_of(group)
            counts = [
                1
                if group["algorithm"] == "adamw"
                else sum(part.batch for part in view.parts(param.shape))
                for param in group["params"]
            ]
            self._records[number] = GroupRecord(number, group, counts)
        return self._records[number]

    def end_step_(self, states: Mapping[Tensor, State], shared: Iterable[Noted]) -> None:
        """Keeps what the step that ends has noted."""
        self._noted = []
        for record in self._records.values():
            record.finish_(states)
            self._noted += record.noted()
        self._noted += shared
        self._noted_at = self._step

    def forget_layouts(self) -> None:
        """Numbers rows anew, because parameters or groups were replaced."""
        self._records = {}

    def statistics(self, groups: Sequence[Mapping[str, Any]]) -> Statistics:
        """Of the last measured step.

        Raises:
            RuntimeError: none was measured.
        """
        if not self._noted_at:
            raise RuntimeError(
                "no step has been measured: call optimizer.record_statistics() before the step"
            )
        return Statistics(self._noted_at, self._noted, groups)
