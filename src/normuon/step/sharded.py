"""The step of parameters that several ranks share: one owner for each matrix, all ranks alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from normuon.distributed.agreement import check_agreement
from normuon.distributed.dtensor import placed_gradient
from normuon.distributed.exchange import exchanges
from normuon.distributed.plan import Sharing, make_plan
from normuon.options import MatrixOptions
from normuon.orthogonalize import Workspace
from normuon.step.adamw import step_shared_adamw_
from normuon.step.bucket import Bucket, OwnedMatrices, SharedTasks, StoredPieces
from normuon.step.flags import GradientFlags
from normuon.step.fused import Passes, passes_for
from normuon.step.local import step_whole_batch_, whole_batches
from normuon.step.order import (
    advance_,
    apply_,
    direction_dtype,
    matrices_per_batch,
    orthogonalize_,
    stats_dtype,
    step_dtype,
)
from normuon.step.pieces import PieceBatch, local_tensor
from normuon.step.shared_params import SharedParams
from normuon.step.slabs import update_slab
from normuon.step.team import Part, run_together

NUM_SLOTS = 2
"""Buckets of one direction in flight at once: every second one uses the same memory."""

ALIGNMENT = 64


class ShardedStep:
    """Steps what one set of ranks shares, by a plan drawn up once."""

    def __init__(self, shared: SharedParams, sharing: Sharing) -> None:
        """Draws up the plan, proves that all ranks drew up the same, and lays out the messages.

        Raises:
            ValueError: ranks differ in their parameters or options; on every rank.
        """
        self.shared = shared
        self.device = shared.device
        self.rank = dist.get_rank(shared.group)
        tasks_by_param = [matrix.tasks() for matrix in shared.matrices]
        self.plan = make_plan(
            [task for tasks in tasks_by_param for task in tasks],
            world_size=dist.get_world_size(shared.group),
            cost_model=shared.cost_model(),
            balance=sharing.balance,
            bucket_bytes=sharing.bucket_bytes,
            teams=sharing.teams,
        )
        lines = [*shared.lines(), *self.plan.lines()]
        check_agreement(shared.group, lines, device=self.device)
        shared.check_copies()
        self.flags = GradientFlags(shared, [len(tasks) for tasks in tasks_by_param])
        self._workspace = Workspace()
        tasks = SharedTasks(self.plan, self.rank, shared.matrices)
        self.buckets = self._lay_out(tasks)
        self._alone = self._whole_batches(tasks)
        batches = [stored.batch for bucket in self.buckets for stored in bucket.stored]
        # What this rank stores pieces of, with the flags of their matrices.
        self._flagged = [(batch, self.flags.index_of(batch)) for batch in (*batches, *self._alone)]
        self._index_of = {id(batch): index for batch, index in self._flagged}
        self._owned_flags = [
            [
                self.flags.index_of_tasks(
                    [(tasks.param_of(i), self.plan.tasks[i].index) for i in owned.tasks]
                )
                for owned in bucket.owned
            ]
            for bucket in self.buckets
        ]
        self._idle_vectors = [(m, list(m.idle_vectors())) for m in shared.matrices]
        self._options: dict[int, MatrixOptions] = {}
        self._matrices_here: dict[int, list[Tensor]] = {}
        self._vectors_here: dict[int, dict[int, Tensor]] = {}
        self._passes: dict[int, Passes | None] = {}

    def _lay_out(self, tasks: SharedTasks) -> list[Bucket]:
        dtypes = [tasks.param_of(bucket[0]).wire for bucket in self.plan.buckets]
        both = [
            exchanges(
                self.plan,
                direction,
                group=self.shared.group,
                device=self.device,
                dtypes=dtypes,
                num_slots=NUM_SLOTS,
            )
            for direction in ("gather", "return")
        ]
        return [Bucket(tasks, n, *pair) for n, pair in enumerate(zip(*both, strict=True))]

    def _whole_batches(self, tasks: SharedTasks) -> list[PieceBatch]:
        """The matrices that no message is needed for."""
        mine: dict[int, list[tuple[int, int]]] = {}
        for index in self.plan.alone:
            if self.rank in self.plan.owners[index]:
                mine.setdefault(self.plan.tasks[index].param[0], []).append((index, 0))
        batches = []
        for pieces in mine.values():
            options = MatrixOptions.from_group(tasks.param_of(pieces[0][0]).owner.group)
            by_shape: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for piece in pieces:
                task = self.plan.tasks[piece[0]]
                by_shape.setdefault((task.rows, task.cols), []).append(piece)
            runs = [
                (run, m, n) for (m, n), alike in by_shape.items() for run in tasks.runs_of(alike)
            ]
            batches += whole_batches(runs, options)
        return batches

    def take_gradients(self) -> None:
        """Notes this rank's gradients before anything is stepped; every rank calls it.

        Raises:
            ValueError: a gradient of which nothing says how it lies; names the parameter.
        """
        for matrix in self.shared.matrices:
            owner = matrix.owner
            owner.grad = placed_gradient(owner.param, label=owner.label)
        for vector in self.shared.vectors:
            vector.grad = placed_gradient(vector.param, label=vector.label)

    def agree_(self) -> None:
        """Finds out what is stepped, before anything is; every rank calls it.

        Raises:
            ValueError: on every rank; see `GradientFlags`.
        """
        self.flags.agree_(self._flagged)

    def step_(self) -> None:
        """Lines 2 to 7 for every matrix, and AdamW's step. Every rank calls it at every step.

        While bucket k computes, bucket k + 1 gathers and bucket k - 1 returns.
        """
        self._options = {
            id(matrix.owner.group): MatrixOptions.from_group(matrix.owner.group)
            for matrix in {id(m.owner.group): m for m in self.shared.matrices}.values()
        }
        buckets = range(len(self.buckets))
        if buckets:
            self._start_gather(0)
        step_shared_adamw_(self.shared.vectors, self.flags.of_vector)
        for batch in self._alone:
            options = self._options[id(batch.first.group)]
            step_whole_batch_(batch, options=options, workspace=self._workspace, moves=self._moves)
        for bucket in buckets:
            if bucket + 1 in buckets:
                self._start_gather(bucket + 1)
            self._compute(bucket)
            self.buckets[bucket].back.start()
            if bucket:
                self._finish(bucket - 1)
        if buckets:
            self._finish(buckets[-1])
        self._share_idle_vectors()
        self._count_skipped()
        for matrix in self.shared.matrices:
            matrix.owner.grad = None  # Gradients live as long as their parameters say.
        for vector in self.shared.vectors:
            vector.grad = None

    def _moves(self, batch: PieceBatch) -> Tensor | None:
        """Which matrices of a batch are stepped; None where this rank's own gradients say all."""
        if batch.has_gradients and not batch.first.group["skip_nonfinite"]:
            return None
        return self.flags.moves(self._index_of[id(batch)])

    # To the owners.

    def _start_gather(self, number: int) -> None:
        """Line 2, and its result on the way to the owners.

        One class of pieces after another, in the same memory: a second copy of all that a rank
        stores would be half of a step's memory.
        """
        bucket = self.buckets[number]
        matrices = self._slabs(
            f"matrices {number % (NUM_SLOTS + 1)}",
            [(len(o.tasks) * o.task.numel, o.matrix.wire[0]) for o in bucket.owned],
        )
        self._matrices_here[number] = matrices
        self._vectors_here[number] = {
            owned.first_vector + vector: self._empty_vectors(owned, len(owned.tasks), vector).view(
                -1
            )
            for owned in bucket.owned
            for vector in range(len(owned.vector_sizes))
        }
        sent, copies = bucket.gather.sent, bucket.there
        vectors: dict[int, Tensor] = {}
        for place, stored in enumerate(bucket.stored):
            directions = {place: self._advance(stored)}
            copies.into_message[0].run_(directions, [sent.elements], source=place)
            copies.within[0].run_(directions, matrices, source=place)
            options = self._options[id(stored.batch.first.group)]
            dims = options.normalizer.state_dims(*stored.task.matrix_shape)
            for vector, name in enumerate(dims):
                slab_KV = self._empty_vectors(stored, stored.batch.count, vector)
                stored.batch.load_vectors(name, slab_KV)
                vectors[stored.first_vector + vector] = slab_KV.view(-1)
        copies.into_message[1].run_(vectors, [sent.entries])
        copies.within[1].run_(vectors, self._vectors_here[number])
        bucket.gather.start()

    def _advance(self, stored: StoredPieces) -> Tensor:
        """Line 2 for pieces of one class, and the directions of those that are sent, flat."""
        batch = stored.batch
        options = self._options[id(batch.first.group)]
        passes = self._passes[id(batch)] = passes_for(batch, options.fused)
        dtype = direction_dtype(batch, passes, ns_dtype=stored.matrix.ns_dtype)
        shape = (stored.num_sent, batch.rows, batch.cols)
        (flat,) = self._slabs("pieces", [(prod(shape), dtype)])
        advance_(
            batch,
            flat.view(shape) if stored.num_sent else None,
            options=options,
            passes=passes,
            moves_K=self._moves(batch),
        )
        return flat

    # At the owners.

    def _compute(self, number: int) -> None:
        """Lines 3 to 6 for the matrices that this rank owns."""
        bucket = self.buckets[number]
        bucket.gather.finish()
        received, copies = bucket.gather.received, bucket.there
        matrices, vectors = self._matrices_here[number], self._vectors_here[number]
        copies.out_of_message[0].run_([received.elements], matrices)
        copies.out_of_message[1].run_([received.entries], vectors)
        flags = self._owned_flags[number]
        for owned, slab, index in zip(bucket.owned, matrices, flags, strict=True):
            if owned.task.slab is None:
                self._orthogonalize(owned, slab, vectors, index)
        self._orthogonalize_slabs(number, matrices, vectors)
        sent = bucket.back.sent
        bucket.home.into_message[0].run_(matrices, [sent.elements])
        bucket.home.into_message[1].run_(vectors, [sent.entries])

    def _orthogonalize(
        self, owned: OwnedMatrices, slab: Tensor, vectors: dict[int, Tensor], index: Tensor
    ) -> None:
        matrix, task = owned.matrix, owned.task
        param = matrix.owner.param
        options = self._options[id(matrix.owner.group)]
        limit = matrices_per_batch(
            task.rows,
            task.cols,
            ns_dtype=matrix.ns_dtype,
            param_dtype=param.dtype,
            device_type=self.device.type,
            max_scratch_bytes=options.max_scratch_bytes,
        )
        names = list(options.normalizer.state_dims(task.rows, task.cols))
        slab_BMN = slab.view(len(owned.tasks), task.rows, task.cols)
        slabs_BV = [
            vectors[owned.first_vector + n].view(len(owned.tasks), size)
            for n, size in enumerate(owned.vector_sizes)
        ]
        moves_B = None if self._moves_surely(owned) else self.flags.moves(index)
        for start in range(0, len(owned.tasks), limit):
            part = slice(start, start + limit)
            update = orthogonalize_(
                slab_BMN[part],
                {name: slabs_BV[n][part] for n, name in enumerate(names)},
                options=options,
                ns_dtype=matrix.ns_dtype,
                workspace=self._workspace,
                moves_B=None if moves_B is None else moves_B[part],
            )
            # Compared by storage, since a fake tensor has no address.
            if update.o_BMN.untyped_storage()._cdata != slab_BMN.untyped_storage()._cdata:
                slab_BMN[part].copy_(update.o_BMN)
            found = [*(update.state[name] for name in names), *update.summary.values()]
            for slab_BV, vector in zip(slabs_BV, found, strict=True):
                slab_BV[part].copy_(vector)

    def _orthogonalize_slabs(
        self, number: int, matrices: list[Tensor], vectors: dict[int, Tensor]
    ) -> None:
        """Lines 3 to 6 for the slabs that this rank has of matrices that teams divide."""
        num_swaps = self.plan.num_swaps(number)
        if not num_swaps:
            return
        parts: dict[int, Part] = {}
        places: dict[int, tuple[Tensor, list[Tensor], Tensor]] = {}
        flags = self._owned_flags[number]
        for owned, slab, index in zip(self.buckets[number].owned, matrices, flags, strict=True):
            for place, task in enumerate(owned.tasks if owned.task.slab else ()):
                found = self._slab(owned, place, slab, vectors)
                parts[task], into = found
                places[task] = (*into, self.flags.moves(index[place : place + 1]))
        # By matrix: members list what they have of two matrices in the same order.
        tasks = self.plan.tasks
        order = sorted(parts, key=lambda task: (tasks[task].param, tasks[task].index))
        updates = run_together(
            [parts[task] for task in order],
            num_swaps,
            group=self.shared.group,
            device=self.device,
        )
        for task, (o_MN, state, summary) in zip(order, updates, strict=True):
            matrix_MN, vectors_1V, moves_1 = places[task]
            matrix_MN.copy_(o_MN)
            for old_1V, new_1V in zip(vectors_1V, state.values(), strict=False):
                old_1V.copy_(torch.where(moves_1[:, None], new_1V, old_1V))
            for into_1V, new_1V in zip(vectors_1V[len(state) :], summary.values(), strict=True):
                into_1V.copy_(new_1V)

    def _slab(
        self, owned: OwnedMatrices, place: int, slab: Tensor, vectors: dict[int, Tensor]
    ) -> tuple[Part, tuple[Tensor, list[Tensor]]]:
        """The program of one slab, and where its results go."""
        task = self.plan.tasks[owned.tasks[place]]
        assert task.slab is not None
        assert task.split is not None
        matrix_MN = slab.view(len(owned.tasks), task.rows, task.cols)[place]
        vectors_1V = [
            vectors[owned.first_vector + n].view(len(owned.tasks), size)[place : place + 1]
            for n, size in enumerate(owned.vector_sizes)
        ]
        options = self._options[id(owned.matrix.owner.group)]
        names = options.normalizer.state_dims(*task.matrix_shape)
        program = update_slab(
            matrix_MN,
            dict(zip(names, vectors_1V, strict=False)),
            slab=task.slab,
            split=task.split,
            options=options,
            ns_dtype=owned.matrix.ns_dtype,
        )
        return Part(program, task.slab.ranks), (matrix_MN, vectors_1V)

    def _moves_surely(self, owned: OwnedMatrices) -> bool:
        """Whether this rank's own gradients say that all of these are stepped."""
        if owned.matrix.owner.group["skip_nonfinite"] or not owned.are_stored_here:
            return False
        return all(matrix.owner.grad is not None for matrix in owned.matrices)

    # Back at the shards.

    def _finish(self, number: int) -> None:
        """Line 7 for the pieces that this rank stores, and the state that came back with them."""
        bucket = self.buckets[number]
        bucket.back.finish()
        vectors = {
            stored.first_vector + vector: self._empty_vectors(
                stored, stored.batch.count, vector
            ).view(-1)
            for stored in bucket.stored
            for vector in range(len(stored.vector_sizes))
        }
        received, copies = bucket.back.received, bucket.home
        copies.out_of_message[1].run_([received.entries], vectors)
        copies.within[1].run_(self._vectors_here.pop(number), vectors)
        matrices = self._matrices_here.pop(number)
        for place, stored in enumerate(bucket.stored):
            batch = stored.batch
            size = batch.count * batch.rows * batch.cols
            dtype = step_dtype(batch, self._passes[id(batch)], o_dtype=stored.matrix.wire[0])
            (slab,) = self._slabs("pieces", [(size, dtype)])
            copies.out_of_message[0].run_([received.elements], {place: slab}, target=place)
            copies.within[0].run_(matrices, {place: slab}, target=place)
            self._apply(stored, slab, vectors)

    def _apply(self, stored: StoredPieces, slab: Tensor, vectors: dict[int, Tensor]) -> None:
        batch, group = stored.batch, stored.matrix.owner.group
        options = self._options[id(group)]
        slabs_KV = [
            vectors[stored.first_vector + n].view(batch.count, size)
            for n, size in enumerate(stored.vector_sizes)
        ]
        shape = stored.task.matrix_shape
        names = list(options.normalizer.state_dims(*shape))
        state = dict(zip(names, slabs_KV, strict=False))
        summary = zip(options.normalizer.summary_dims(*shape), slabs_KV[len(names) :], strict=True)
        for name, slab_KV in state.items():
            batch.store_vectors_(name, slab_KV)
        apply_(
            batch,
            slab.view(batch.count, batch.rows, batch.cols),
            state,
            dict(summary),
            shape=shape,
            options=options,
            passes=self._passes.pop(id(batch)),
            moves_K=self._moves(batch),
        )

    def _share_idle_vectors(self) -> None:
        """Copies state to ranks whose shard is empty, so that their replica of it is no other."""
        for matrix, idle in self._idle_vectors:
            for name, axes in idle:
                for axis in axes:
                    assert isinstance(matrix.owner.param, DTensor)
                    vector = local_tensor(matrix.owner.state[name])
                    if vector.numel():
                        group = matrix.owner.param.device_mesh.get_group(axis)
                        dist.broadcast(vector, group=group, group_src=0)

    def _count_skipped(self) -> None:
        counts, skipped = [], []
        for number, matrix in enumerate(self.shared.matrices):
            if matrix.owner.group["skip_nonfinite"]:
                counts.append(local_tensor(matrix.owner.state["skipped_steps"]))
                skipped.append(self.flags.skips(number).to(torch.int32))
        if counts:
            torch._foreach_add_(counts, skipped)

    # Memory.

    def _empty_vectors(self, of: StoredPieces | OwnedMatrices, count: int, vector: int) -> Tensor:
        dtype = stats_dtype(of.matrix.owner.param.dtype)
        return torch.empty((count, of.vector_sizes[vector]), dtype=dtype, device=self.device)

    def _slabs(self, name: str, sizes: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
        """Flat tensors of some sizes, cut from one piece of memory."""
        num_bytes = [-(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT for size, dtype in sizes]
        memory = self._workspace.empty(
            name, (sum(num_bytes),), dtype=torch.uint8, device=self.device
        )
        starts = accumulate(num_bytes, initial=0)
        return [
            memory[start : start + size * dtype.itemsize].view(dtype)
            for start, (size, dtype) in zip(starts, sizes, strict=False)
        ]
