"""The step of parameters that several ranks share: one owner for each matrix, all ranks alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

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
from normuon.step.figures import nowhere
from normuon.step.flags import GradientFlags
from normuon.step.fused import Passes, passes_for
from normuon.step.local import step_staged_batches_, step_whole_batch_, whole_batches
from normuon.step.order import advance_, apply_, direction_dtype, stats_dtype, step_dtype
from normuon.step.owners import Owners
from normuon.step.pieces import PieceBatch, local_tensor
from normuon.step.shared_maxima import SharedMaxima, count_shared_roundings_
from normuon.step.shared_params import SharedParams
from normuon.step.shared_record import SharedRecord
from normuon.step.staging import Leg, Loan, Sizes, Stagings, bytes_of, cut

NUM_SLOTS = 2
"""Buckets of one direction in flight at once: every second one uses the same memory."""


class ShardedStep:
    """Steps what one set of ranks shares, by a plan drawn up once."""

    def __init__(
        self, shared: SharedParams, sharing: Sharing, stagings: Stagings | None = None
    ) -> None:
        """Draws up the plan, proves that all ranks drew up the same, and lays out the messages.

        Args:
            shared: the parameters.
            sharing: how ranks share their matrices.
            stagings: host memory for copies between devices, where others use it too.

        Raises:
            ValueError: ranks differ in their parameters or options; on every rank.
        """
        self.shared = shared
        self.rank = dist.get_rank(shared.group)
        places = (shared.device, shared.compute_device)
        self._staging = (stagings or Stagings()).between(*places)
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
        check_agreement(shared.group, lines, device=shared.compute_device)
        shared.check_copies()
        # Memory of its own: all sets of ranks agree before any of them steps.
        num_matrices = [len(tasks) for tasks in tasks_by_param]
        self.flags = GradientFlags(shared, num_matrices, Stagings().between(*places))
        self._workspace = Workspace()
        tasks = SharedTasks(self.plan, self.rank, shared.matrices)
        self.buckets = self._lay_out(tasks)
        self._alone = self._whole_batches(tasks)
        batches = [stored.batch for bucket in self.buckets for stored in bucket.stored]
        # What this rank stores pieces of, with the flags of their matrices.
        self._flagged = [(batch, self.flags.index_of(batch)) for batch in (*batches, *self._alone)]
        self._index_of = {id(batch): index for batch, index in self._flagged}
        self._maxima = SharedMaxima(
            shared, [*batches, *self._alone], rank=self.rank, staging=Stagings().between(*places)
        )
        self._owners = Owners(
            shared, tasks, self.buckets, flags=self.flags, workspace=self._workspace
        )
        self._new_record = partial(
            SharedRecord, shared, tasks, num_matrices, self.flags, Stagings().between(*places)
        )
        self.record: SharedRecord | None = None
        self._idle_vectors = [(m, list(m.idle_vectors())) for m in shared.matrices]
        self._options: dict[int, MatrixOptions] = {}
        self._matrices_here: dict[int, list[Tensor]] = {}
        self._vectors_here: dict[int, dict[int, Tensor]] = {}
        self._passes: dict[int, Passes | None] = {}
        self._arrivals: dict[int, Leg] = {}
        self._coming_home: dict[int, Loan] = {}

    def _lay_out(self, tasks: SharedTasks) -> list[Bucket]:
        dtypes = [tasks.param_of(bucket[0]).wire for bucket in self.plan.buckets]
        both = [
            exchanges(
                self.plan,
                direction,
                group=self.shared.group,
                device=self.shared.compute_device,
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

    def take_gradients(self, *, measures: bool = False) -> None:
        """Notes this rank's gradients before anything is stepped; every rank calls it.

        Args:
            measures: whether to note figures of this step, in `record`.

        Raises:
            ValueError: a gradient of which nothing says how it lies; names the parameter.
        """
        self.shared.measures = measures
        if measures:
            self.record = self.record or self._new_record()
            self.record.begin_()
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
        self._maxima.agree_()

    @property
    def _measured(self) -> SharedRecord | None:
        return self.record if self.shared.measures else None

    def step_(self) -> None:
        """Lines 2 to 7 for every matrix, and AdamW's step. Every rank calls it at every step.

        While bucket k computes, bucket k + 1 gathers and bucket k - 1 returns.
        """
        self._options = {
            id(matrix.owner.group): MatrixOptions.from_group(matrix.owner.group)
            for matrix in {id(m.owner.group): m for m in self.shared.matrices}.values()
        }
        count_shared_roundings_(self.shared.matrices, self.flags)
        buckets = range(len(self.buckets))
        if buckets:
            self._start_gather(0)
        step_shared_adamw_(self.shared.vectors, self.flags.of_vector)
        self._step_alone()
        for bucket in buckets:
            if bucket + 1 in buckets:
                self._start_gather(bucket + 1)
            self._compute(bucket)
            self.buckets[bucket].back.start()
            if self._staging.is_needed:
                self._bring_home(bucket)
            if bucket:
                self._finish(bucket - 1)
        if buckets:
            self._finish(buckets[-1])
        self._share_idle_vectors()
        self._maxima.keep_(self.flags)
        self._count_skipped()
        if self._measured is not None:
            self._measured.share_()
        for matrix in self.shared.matrices:
            matrix.owner.grad = None  # Gradients live as long as their parameters say.
        for vector in self.shared.vectors:
            vector.grad = None

    def _step_alone(self) -> None:
        """The matrices that no message is needed for."""
        pairs = [(batch, self._options[id(batch.first.group)]) for batch in self._alone]
        workspace, moves, record = self._workspace, self._moves, self._measured
        rows_of = nowhere if record is None else record.rows_of_whole
        if self._staging.is_needed:
            staged = [(batch, options, self._staging) for batch, options in pairs]
            step_staged_batches_(staged, workspace=workspace, moves=moves, rows_of=rows_of)
            return
        for batch, options in pairs:
            step_whole_batch_(
                batch, options=options, workspace=workspace, moves=moves, rows_of=rows_of
            )

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
        bucket, staging, device = self.buckets[number], self._staging, self.shared.compute_device
        matrices = self._matrices_here[number] = self._slabs(
            f"matrices {number % (NUM_SLOTS + 1)}",
            [(len(o.tasks) * o.task.numel, o.matrix.wire[0]) for o in bucket.owned],
            device,
        )
        vectors_here = self._vectors_here[number] = _empty_vectors(bucket.owned, device)
        sizes = _sizes_of_vectors(bucket.stored)
        num_vectors = len(sizes)
        if staging.is_needed:
            sizes += [(s.num_sent * _numel(s), s.matrix.wire[0]) for s in bucket.stored]
        loan = staging.lend(f"gather {number % NUM_SLOTS}", sizes)
        sent, copies = bucket.gather.sent, bucket.there
        vectors: dict[int, Tensor] = {}
        for place, stored in enumerate(bucket.stored):
            part = num_vectors + place
            flat = self._advance(stored, loan.parts[part] if staging.is_needed else None)
            loaded = self._load_vectors(stored, loan)
            with staging.going_up():
                directions = {place: loan.up(part) if staging.is_needed else flat}
                copies.into_message[0].run_(directions, [sent.elements], source=place)
                copies.within[0].run_(directions, matrices, source=place)
                vectors |= {vector: loan.up(vector) for vector in loaded}
        with staging.going_up() as self._arrivals[number]:
            copies.into_message[1].run_(vectors, [sent.entries])
            copies.within[1].run_(vectors, vectors_here)
            bucket.gather.start()
        loan.give_back()

    def _advance(self, stored: StoredPieces, into: Tensor | None) -> Tensor:
        """Line 2 for pieces of one class, and the directions of those that are sent, flat.

        Args:
            stored: the pieces.
            into: where to put them, in the dtype in which they travel; None for scratch.
        """
        batch = stored.batch
        options = self._options[id(batch.first.group)]
        passes = self._passes[id(batch)] = passes_for(batch, options.fused)
        dtype = direction_dtype(batch, passes, ns_dtype=stored.matrix.ns_dtype)
        flat = into
        if flat is None or flat.dtype != dtype:
            size = stored.num_sent * _numel(stored)
            (flat,) = self._slabs("pieces", [(size, dtype)], self.shared.device)
        advance_(
            batch,
            flat.view(stored.num_sent, batch.rows, batch.cols) if stored.num_sent else None,
            options=options,
            passes=passes,
            moves_K=self._moves(batch),
        )
        if into is not None and into is not flat:
            into.copy_(flat)
        return flat

    def _load_vectors(self, stored: StoredPieces, loan: Loan) -> list[int]:
        """Copies the state's vectors of pieces of one class into a loan; says which these are."""
        options = self._options[id(stored.batch.first.group)]
        names = options.normalizer.state_dims(*stored.task.matrix_shape)
        loaded = []
        for number, name in enumerate(names, start=stored.first_vector):
            stored.batch.load_vectors(name, loan.parts[number].view(stored.batch.count, -1))
            loaded.append(number)
        return loaded

    # At the owners.

    def _compute(self, number: int) -> None:
        """Lines 3 to 6 for the matrices that this rank owns."""
        bucket = self.buckets[number]
        self._arrivals.pop(number).join()
        bucket.gather.finish()
        received, copies = bucket.gather.received, bucket.there
        matrices, vectors = self._matrices_here[number], self._vectors_here[number]
        copies.out_of_message[0].run_([received.elements], matrices)
        copies.out_of_message[1].run_([received.entries], vectors)
        self._owners.orthogonalize_(number, matrices, vectors, self._options, self._measured)
        sent = bucket.back.sent
        bucket.home.into_message[0].run_(matrices, [sent.elements])
        bucket.home.into_message[1].run_(vectors, [sent.entries])

    # Back at the shards.

    def _bring_home(self, number: int) -> None:
        """Gives the device all that brings a bucket back to the host, beside the next one."""
        bucket, device = self.buckets[number], self.shared.compute_device
        sizes = _sizes_of_vectors(bucket.stored)
        num_vectors = len(sizes)
        sizes += [(s.batch.count * _numel(s), s.matrix.wire[0]) for s in bucket.stored]
        loan = self._coming_home[number] = self._staging.lend(f"home {number % NUM_SLOTS}", sizes)
        with self._staging.coming_down():
            for place, vector in self._returned_vectors(number, device).items():
                loan.down_(place, vector)
            for place, (size, dtype) in enumerate(sizes[num_vectors:]):
                slab = torch.empty(size, dtype=dtype, device=device)
                self._unpack(number, place, slab)
                loan.down_(num_vectors + place, slab)

    def _finish(self, number: int) -> None:
        """Line 7 for the pieces that this rank stores, and the state that came back with them."""
        bucket, loan = self.buckets[number], self._coming_home.pop(number, None)
        if loan is None:
            vectors = self._returned_vectors(number, self.shared.device)
        else:
            loan.wait()
            num_vectors = len(loan.parts) - len(bucket.stored)
            vectors = dict(enumerate(loan.parts[:num_vectors]))
        for place, stored in enumerate(bucket.stored):
            batch = stored.batch
            dtype = step_dtype(batch, self._passes[id(batch)], o_dtype=stored.matrix.wire[0])
            slab = None if loan is None else loan.parts[num_vectors + place]
            if slab is None or slab.dtype != dtype:
                size = batch.count * _numel(stored)
                (wide,) = self._slabs("pieces", [(size, dtype)], self.shared.device)
                if slab is None:
                    self._unpack(number, place, wide)
                else:
                    wide.copy_(slab)
                slab = wide
            self._apply(stored, slab, vectors)
        # The device has done with a bucket when the host has what came back of it.
        del self._vectors_here[number], self._matrices_here[number]
        if loan is not None:
            loan.give_back()

    def _returned_vectors(self, number: int, device: torch.device) -> dict[int, Tensor]:
        """The vectors of pieces, when their message has arrived."""
        bucket = self.buckets[number]
        bucket.back.finish()
        vectors = _empty_vectors(bucket.stored, device)
        bucket.home.out_of_message[1].run_([bucket.back.received.entries], vectors)
        bucket.home.within[1].run_(self._vectors_here[number], vectors)
        return vectors

    def _unpack(self, number: int, place: int, slab: Tensor) -> None:
        """The pieces of one class, from the message and from the matrices of this rank."""
        bucket = self.buckets[number]
        received, into = bucket.back.received, {place: slab}
        bucket.home.out_of_message[0].run_([received.elements], into, target=place)
        bucket.home.within[0].run_(self._matrices_here[number], into, target=place)

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
        if self._measured is not None:
            self._measured.rows_of_pieces(batch).add_weights_(batch)

    def _share_idle_vectors(self) -> None:
        """Copies state to ranks whose shard is empty, so that their replica of it is no other."""
        for matrix, idle in self._idle_vectors:
            for name, axes in idle:
                for axis in axes:
                    assert isinstance(matrix.owner.param, DTensor)
                    vector = local_tensor(matrix.owner.state[name])
                    if vector.numel():
                        group = matrix.owner.param.device_mesh.get_group(axis)
                        sent = vector.to(self.shared.compute_device)
                        dist.broadcast(sent, group=group, group_src=0)
                        if self._staging.is_needed:
                            vector.copy_(sent)

    def _count_skipped(self) -> None:
        counts, skipped = [], []
        for number, matrix in enumerate(self.shared.matrices):
            if matrix.owner.group["skip_nonfinite"]:
                counts.append(local_tensor(matrix.owner.state["skipped_steps"]))
                skipped.append(self.flags.skips(number).to(torch.int32))
        if counts:
            torch._foreach_add_(counts, skipped)

    def _slabs(self, name: str, sizes: Sizes, device: torch.device) -> list[Tensor]:
        """Flat tensors of some sizes, cut from one piece of memory that the next step uses too."""
        shape = (bytes_of(sizes),)
        return cut(self._workspace.empty(name, shape, dtype=torch.uint8, device=device), sizes)


def _numel(stored: StoredPieces) -> int:
    return stored.batch.rows * stored.batch.cols


def _sizes_of_vectors(
    classes: Sequence[StoredPieces | OwnedMatrices],
) -> list[tuple[int, torch.dtype]]:
    """The vectors of all pieces or matrices, as `first_vector` counts them."""
    return [
        (_count(of) * size, stats_dtype(of.matrix.owner.param.dtype))
        for of in classes
        for size in of.vector_sizes
    ]


def _empty_vectors(
    classes: Sequence[StoredPieces | OwnedMatrices], device: torch.device
) -> dict[int, Tensor]:
    sizes = enumerate(_sizes_of_vectors(classes))
    return {n: torch.empty(size, dtype=dtype, device=device) for n, (size, dtype) in sizes}


def _count(of: StoredPieces | OwnedMatrices) -> int:
    return of.batch.count if isinstance(of, StoredPieces) else len(of.tasks)
