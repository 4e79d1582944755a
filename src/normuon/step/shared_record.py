"""The figures of parameters that several ranks share, summed over them in one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from normuon.distributed.dtensor import is_first_copy
from normuon.step.bucket import OwnedMatrices, SharedTasks
from normuon.step.figures import Rows, adamw_figures, empty_table, index_of, unit_figures
from normuon.step.flags import GradientFlags
from normuon.step.pieces import PieceBatch, local_tensor
from normuon.step.record import Noted, write_skipped_
from normuon.step.shared_params import SharedMatrix, SharedParams, SharedVector
from normuon.step.staging import Staging


class SharedRecord:
    """A table of all that a set of ranks shares, the same on each of them.

    Every number is noted by one rank: what a whole matrix says by its owner, or the first of
    several, and sums over weights by the ranks that store the first copy.
    """

    def __init__(
        self,
        shared: SharedParams,
        tasks: SharedTasks,
        num_matrices: Sequence[int],
        flags: GradientFlags,
        staging: Staging,
    ) -> None:
        """Numbers the rows.

        Args:
            shared: the parameters.
            tasks: the plan's.
            num_matrices: of each parameter of matrices.
            flags: what ranks say of gradients.
            staging: to where ranks exchange, of its own memory.
        """
        self._shared, self._tasks, self._flags, self._staging = shared, tasks, flags, staging
        self._is_first_rank = dist.get_rank(shared.group) == 0
        counts = [*num_matrices, *(1 for _ in shared.vectors)]
        firsts = list(accumulate(counts, initial=0))
        self._num_rows = firsts[-1]
        self._params: list[SharedMatrix | SharedVector] = [*shared.matrices, *shared.vectors]
        self._rows = {
            param.place: (first, count)
            for param, first, count in zip(self._params, firsts, counts, strict=False)
        }
        self._first_row = {id(m.owner): self._rows[m.place][0] for m in shared.matrices}
        self._noting_rank = {
            (id(tasks.param_of(number).owner), task.index): tasks.plan.owners[number][0]
            for number, task in enumerate(tasks.plan.tasks)
        }
        self._table = empty_table(self._num_rows, shared.device)
        # Where parameters are on the host, what owners find is not there.
        self._found = self._table
        if staging.is_needed:
            self._found = empty_table(self._num_rows, shared.compute_device)
        self._index: WeakKeyDictionary[PieceBatch, Tensor] = WeakKeyDictionary()
        self._owned_index: dict[int, Tensor] = {}
        self._vectors = [
            _Vectors(alike, first, shared, self._num_rows, is_first_rank=self._is_first_rank)
            for first, alike in self._vectors_by_group()
        ]

    def _vectors_by_group(self) -> list[tuple[int, list[SharedVector]]]:
        by_group: dict[int, list[SharedVector]] = {}
        for vector in self._shared.vectors:
            by_group.setdefault(vector.place[0], []).append(vector)
        return [(self._rows[alike[0].place][0], alike) for alike in by_group.values()]

    def begin_(self) -> None:
        """Forgets the step before."""
        self._table.zero_()
        self._found.zero_()

    def rows_of_whole(self, batch: PieceBatch) -> Rows:
        """The rows of matrices that this rank steps without the others."""
        return self._rows_of(batch, whole=True)

    def rows_of_pieces(self, batch: PieceBatch) -> Rows:
        """The rows of the matrices that pieces are of."""
        return self._rows_of(batch, whole=False)

    def _rows_of(self, batch: PieceBatch, *, whole: bool) -> Rows:
        if batch not in self._index:
            numbers = []
            for owner, index in batch.places():
                if whole:
                    notes = self._noting_rank[id(owner), index] == self._tasks.rank
                else:
                    notes = is_first_copy(owner.param, self._shared.group)
                numbers.append(self._first_row[id(owner)] + index if notes else self._num_rows)
            self._index[batch] = index_of(numbers, self._shared.device)
        return Rows(self._table, self._index[batch])

    def rows_of_owned(self, owned: OwnedMatrices) -> Rows:
        """The rows of matrices, or of slabs of them, that this rank orthogonalises for others."""
        if id(owned) not in self._owned_index:
            numbers = []
            for number in owned.tasks:
                owner = self._tasks.param_of(number).owner
                task = self._tasks.plan.tasks[number]
                notes = self._tasks.plan.owners[number][0] == self._tasks.rank
                if task.slab is not None:
                    notes = notes and task.slab.number == 0
                row = self._first_row[id(owner)] + task.index
                numbers.append(row if notes else self._num_rows)
            self._owned_index[id(owned)] = index_of(numbers, self._shared.compute_device)
        return Rows(self._found, self._owned_index[id(owned)])

    def share_(self) -> None:
        """Notes what the step did to `adamw` parameters, and sums over all ranks, which call it."""
        moves = self._flags.moves_of_vectors()
        start = 0
        for vectors in self._vectors:
            vectors.note_(self._table, moves[start : start + vectors.count])
            start += vectors.count
        for param in self._params if self._is_first_rank else ():
            if "skipped_steps" in param.state:
                write_skipped_(self._table, *self._rows[param.place], param.state)
        if self._staging.is_needed:
            size = (self._table.numel(), self._table.dtype)
            loan = self._staging.lend("figures", [size])
            loan.parts[0].copy_(self._table.view(-1))
            self._found += loan.up(0).view_as(self._found)
            loan.give_back()
        dist.all_reduce(self._found, group=self._shared.group)

    def noted(self) -> Noted:
        """The table."""
        return Noted(self._found, self._rows)


class _Vectors:
    """The `adamw` parameters of one group."""

    def __init__(
        self,
        vectors: Sequence[SharedVector],
        first: int,
        shared: SharedParams,
        num_rows: int,
        *,
        is_first_rank: bool,
    ) -> None:
        self._vectors, self._is_first_rank = list(vectors), is_first_rank
        self.count = len(self._vectors)
        copies = [is_first_copy(vector.param, shared.group) for vector in self._vectors]
        rows = [first + n if is_first else num_rows for n, is_first in enumerate(copies)]
        self._index = index_of(rows, shared.device)
        self._own_index = index_of([first + n for n in range(self.count)], shared.device)
        self._units = unit_figures([v.param.numel() for v in self._vectors], shared.device)

    def note_(self, table: Tensor, moves_P: Tensor) -> None:
        """Adds what this rank has to say of those that were stepped."""
        states = [{k: local_tensor(t) for k, t in v.state.items()} for v in self._vectors]
        params = [local_tensor(vector.param) for vector in self._vectors]
        figures = adamw_figures(params, states, self._vectors[0].group)
        moves_P1 = moves_P[:, None]
        Rows(table, self._index).add_(torch.where(moves_P1, figures, 0.0))
        if self._is_first_rank:
            Rows(table, self._own_index).add_(torch.where(moves_P1, self._units, 0.0))
