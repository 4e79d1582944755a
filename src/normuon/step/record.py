"""The figures of parameters that no other rank shares, as the last measured step noted them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from normuon.step.adamw import is_finite
from normuon.step.figures import (
    COLUMN,
    Rows,
    adamw_figures,
    empty_table,
    index_of,
    unit_figures,
)
from normuon.step.pieces import PieceBatch, State, local_tensor

Place = tuple[int, int]
"""A parameter: its group, and its index there."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A table and the rows of parameters in it.

    Args:
        table: ``[R + 1, F]``.
        rows: by parameter, its first row and how many it has.
    """

    table: Tensor
    rows: Mapping[Place, tuple[int, int]]


class GroupRecord:
    """The table of one param group, or one for each device that its parameters are on."""

    def __init__(self, number: int, group: Mapping[str, Any], num_matrices: Sequence[int]) -> None:
        """Numbers the rows.

        Args:
            number: of the group.
            group: the param group.
            num_matrices: of each parameter of the group; 1 of one that is no matrix.
        """
        firsts = list(accumulate(num_matrices, initial=0))
        self._group, self._num_rows = group, firsts[-1]
        self._rows = {
            (number, index): (firsts[index], count) for index, count in enumerate(num_matrices)
        }
        self._first_row = dict(zip(group["params"], firsts, strict=False))
        self._tables: dict[torch.device, Tensor] = {}
        self._index: WeakKeyDictionary[PieceBatch, Tensor] = WeakKeyDictionary()
        self._stepped: tuple[object, list[tuple[list[int], Tensor, Tensor]]] = (None, [])

    def begin_(self) -> None:
        """Forgets the step before."""
        for table in self._tables.values():
            table.zero_()

    def open_(self) -> None:
        """Has rows for all parameters, also before one of them has had a gradient."""
        for param in self._group["params"]:
            if not param.is_meta:
                self._table_on(param.device)

    def rows_of(self, batch: PieceBatch) -> Rows:
        """The rows of a batch of whole matrices."""
        device = batch.first.param.device
        if batch not in self._index:
            numbers = [self._first_row[owner.param] + index for owner, index in batch.places()]
            self._index[batch] = index_of(numbers, device)
        return Rows(self._table_on(device), self._index[batch])

    def note_adamw_(self, params: Sequence[Tensor], states: Sequence[State]) -> None:
        """Notes `adamw` parameters after their step, by which they have been moved."""
        for chosen, index, units in self._by_device(params):
            of_device = [params[number] for number in chosen]
            figures = units + adamw_figures(
                of_device, [states[number] for number in chosen], self._group
            )
            if self._group["skip_nonfinite"]:
                grads = [param.grad for param in of_device if param.grad is not None]
                moves = torch.stack([is_finite(grad) for grad in grads])
                figures = torch.where(moves[:, None], figures, 0.0)
            Rows(self._table_on(of_device[0].device), index).add_(figures)

    def _by_device(self, params: Sequence[Tensor]) -> list[tuple[list[int], Tensor, Tensor]]:
        """By device: which parameters are there, their rows, and their unit figures."""
        stepped = [(self._first_row[param], param.device) for param in params]
        if self._stepped[0] != stepped:
            numbers: dict[torch.device, list[int]] = {}
            for number, (_, device) in enumerate(stepped):
                numbers.setdefault(device, []).append(number)
            found = [
                (
                    chosen,
                    index_of([stepped[number][0] for number in chosen], device),
                    unit_figures([params[number].numel() for number in chosen], device),
                )
                for device, chosen in numbers.items()
            ]
            self._stepped = (stepped, found)
        return self._stepped[1]

    def finish_(self, states: Mapping[Tensor, State]) -> None:
        """Notes the counts of skipped steps, those of this step included."""
        for (_, index), (first, count) in self._rows.items():
            param = self._group["params"][index]
            if param.device in self._tables and "skipped_steps" in states[param]:
                write_skipped_(self._tables[param.device], first, count, states[param])

    def noted(self) -> Iterator[Noted]:
        """The tables."""
        for device, table in self._tables.items():
            params = self._group["params"]
            rows = {p: r for p, r in self._rows.items() if params[p[1]].device == device}
            yield Noted(table, rows)

    def _table_on(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = empty_table(self._num_rows, device)
        return self._tables[device]


def write_skipped_(table: Tensor, first: int, count: int, state: State) -> None:
    """Writes the counts of one parameter's matrices into their rows."""
    column = table.select(1, COLUMN["skipped_steps"]).narrow(0, first, count)
    column.copy_(local_tensor(state["skipped_steps"]).reshape(-1))
