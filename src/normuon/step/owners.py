"""Lines 3 to 6 for the matrices that this rank owns, and for its slabs of what teams divide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from normuon.distributed.plan import Plan
from normuon.options import MatrixOptions
from normuon.orthogonalize import Workspace
from normuon.step.bucket import Bucket, OwnedMatrices, SharedTasks
from normuon.step.figures import Rows
from normuon.step.flags import GradientFlags
from normuon.step.order import matrices_per_batch, orthogonalize_
from normuon.step.shared_params import SharedParams
from normuon.step.shared_record import SharedRecord
from normuon.step.slabs import NUM_MEASURING_SWAPS, update_slab
from normuon.step.team import Part, run_together

Options = Mapping[int, MatrixOptions]
"""The options of groups as they stand now, by the group's id."""


class Owners:
    """What this rank does as an owner of matrices, bucket by bucket."""

    def __init__(
        self,
        shared: SharedParams,
        tasks: SharedTasks,
        buckets: Sequence[Bucket],
        *,
        flags: GradientFlags,
        workspace: Workspace,
    ) -> None:
        """Notes the flags of the matrices.

        Args:
            shared: the parameters.
            tasks: the plan's.
            buckets: what this rank does for each of them.
            flags: what ranks say of gradients.
            workspace: scratch kept between steps.
        """
        self._shared, self._buckets = shared, list(buckets)
        self._plan: Plan = tasks.plan
        self._flags, self._workspace = flags, workspace
        self._indices = [
            [
                flags.index_of_tasks(
                    [(tasks.param_of(i), self._plan.tasks[i].index) for i in o.tasks]
                )
                for o in bucket.owned
            ]
            for bucket in self._buckets
        ]

    def orthogonalize_(
        self,
        number: int,
        matrices: Sequence[Tensor],
        vectors: Mapping[int, Tensor],
        options: Options,
        record: SharedRecord | None,
    ) -> None:
        """Lines 3 to 6 for one bucket.

        Args:
            number: of the bucket.
            matrices: directions, flat, by class of matrices; O is written there.
            vectors: as `OwnedMatrices.first_vector` counts them; the new ones are written there.
            options: of all groups.
            record: where to note figures, if anywhere.
        """
        owned = zip(self._buckets[number].owned, matrices, self._indices[number], strict=True)
        for alike, slab, index in owned:
            if alike.task.slab is None:
                of_group = options[id(alike.matrix.owner.group)]
                self._orthogonalize(alike, slab, vectors, index, of_group, record)
        if self._plan.num_swaps(number):
            self._orthogonalize_slabs(number, matrices, vectors, options, record)

    def _orthogonalize(
        self,
        owned: OwnedMatrices,
        slab: Tensor,
        vectors: Mapping[int, Tensor],
        index: Tensor,
        options: MatrixOptions,
        record: SharedRecord | None,
    ) -> None:
        matrix, task = owned.matrix, owned.task
        param = matrix.owner.param
        limit = matrices_per_batch(
            task.rows,
            task.cols,
            ns_dtype=matrix.ns_dtype,
            param_dtype=param.dtype,
            device_type=slab.device.type,
            max_scratch_bytes=options.max_scratch_bytes,
        )
        names = list(options.normalizer.state_dims(task.rows, task.cols))
        slab_BMN = slab.view(len(owned.tasks), task.rows, task.cols)
        slabs_BV = [
            vectors[owned.first_vector + n].view(len(owned.tasks), size)
            for n, size in enumerate(owned.vector_sizes)
        ]
        moves_B = None if _moves_surely(owned) else self._flags.moves_at_owner(index)
        rows = None if record is None else record.rows_of_owned(owned)
        for start in range(0, len(owned.tasks), limit):
            part = slice(start, start + limit)
            update = orthogonalize_(
                slab_BMN[part],
                {name: slabs_BV[n][part] for n, name in enumerate(names)},
                options=options,
                ns_dtype=matrix.ns_dtype,
                workspace=self._workspace,
                moves_B=None if moves_B is None else moves_B[part],
                measures=rows is not None,
            )
            if rows is not None and update.figures is not None:
                rows.narrow(start, len(update.figures)).add_(update.figures)
            # Compared by storage, since a fake tensor has no address.
            if update.o_BMN.untyped_storage()._cdata != slab_BMN.untyped_storage()._cdata:
                slab_BMN[part].copy_(update.o_BMN)
            found = [*(update.state[name] for name in names), *update.summary.values()]
            for slab_BV, vector in zip(slabs_BV, found, strict=True):
                slab_BV[part].copy_(vector)

    def _orthogonalize_slabs(
        self,
        number: int,
        matrices: Sequence[Tensor],
        vectors: Mapping[int, Tensor],
        options: Options,
        record: SharedRecord | None,
    ) -> None:
        """Lines 3 to 6 for the slabs that this rank has of matrices that teams divide."""
        parts: dict[int, Part] = {}
        places: dict[int, tuple[Tensor, list[Tensor], Tensor]] = {}
        rows: dict[int, Rows] = {}
        measures = record is not None
        owned = zip(self._buckets[number].owned, matrices, self._indices[number], strict=True)
        for alike, slab, index in owned:
            for place, task in enumerate(alike.tasks if alike.task.slab else ()):
                of_group = options[id(alike.matrix.owner.group)]
                moves_1 = self._flags.moves_at_owner(index[place : place + 1])
                parts[task], into = self._slab(
                    alike, place, slab, vectors, of_group, moves_1=moves_1, measures=measures
                )
                places[task] = (*into, moves_1)
                if record is not None:
                    rows[task] = record.rows_of_owned(alike).narrow(place, 1)
        # By matrix: members list what they have of two matrices in the same order.
        tasks = self._plan.tasks
        order = sorted(parts, key=lambda task: (tasks[task].param, tasks[task].index))
        updates = run_together(
            [parts[task] for task in order],
            self._plan.num_swaps(number) + NUM_MEASURING_SWAPS * measures,
            group=self._shared.group,
            device=self._shared.compute_device,
        )
        for task, (o_MN, state, summary, figures) in zip(order, updates, strict=True):
            if figures is not None:
                rows[task].add_(figures)
            matrix_MN, vectors_1V, moves_1 = places[task]
            matrix_MN.copy_(o_MN)
            for old_1V, new_1V in zip(vectors_1V, state.values(), strict=False):
                old_1V.copy_(torch.where(moves_1[:, None], new_1V, old_1V))
            for into_1V, new_1V in zip(vectors_1V[len(state) :], summary.values(), strict=True):
                into_1V.copy_(new_1V)

    def _slab(
        self,
        owned: OwnedMatrices,
        place: int,
        slab: Tensor,
        vectors: Mapping[int, Tensor],
        options: MatrixOptions,
        *,
        moves_1: Tensor,
        measures: bool,
    ) -> tuple[Part, tuple[Tensor, list[Tensor]]]:
        """The program of one slab, and where its results go."""
        task = self._plan.tasks[owned.tasks[place]]
        assert task.slab is not None
        assert task.split is not None
        matrix_MN = slab.view(len(owned.tasks), task.rows, task.cols)[place]
        vectors_1V = [
            vectors[owned.first_vector + n].view(len(owned.tasks), size)[place : place + 1]
            for n, size in enumerate(owned.vector_sizes)
        ]
        names = options.normalizer.state_dims(*task.matrix_shape)
        program = update_slab(
            matrix_MN,
            dict(zip(names, vectors_1V, strict=False)),
            slab=task.slab,
            split=task.split,
            options=options,
            ns_dtype=owned.matrix.ns_dtype,
            moves_1=moves_1,
            measures=measures,
        )
        return Part(program, task.slab.ranks), (matrix_MN, vectors_1V)


def _moves_surely(owned: OwnedMatrices) -> bool:
    """Whether this rank's own gradients say that all of these are stepped."""
    if owned.matrix.owner.group["skip_nonfinite"] or not owned.are_stored_here:
        return False
    return all(matrix.owner.grad is not None for matrix in owned.matrices)
