"""Equal pieces of matrices as this rank stores them: the tensors that a step reads and writes.

On one device a piece is a whole matrix. Shapes: K pieces of R rows and C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from normuon.models.blocks import BlockGrid, block_grid
from normuon.models.view import MatrixView
from normuon.step.addresses import AddressBook, Addresses, Layout
from normuon.step.normalizer import Normalizer

State = dict[str, Tensor]


def local_tensor(tensor: Tensor) -> Tensor:
    """A DTensor's shard on this rank; a plain tensor itself."""
    # What `to_local()` gives without gradients, after questions that cost more than the rest.
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def gradient_of(param: Tensor) -> Tensor | None:
    """The gradient that a step takes: none of a parameter that has been frozen.

    `requires_grad_(False)` leaves the last gradient where it is, and a step that does not depend on
    a gradient's size would go on at full length.
    """
    return param.grad if param.requires_grad else None


@dataclass(slots=True, eq=False)
class MatrixParam:
    """A parameter of a `normuon` or `muon` group.

    Args:
        label: its name and shape, the start of messages.
        param: a plain tensor or a DTensor.
        group: its param group, read at every step.
        state: its state, written to.
        view: how it becomes matrices.
        vector_dims: for each vector of its state, the parameter's dims that it has, or None for a
            flat list.
        shares_blocks: whether ranks may each store a part of a block of 8-bit momentum.
        grad: this rank's part of the gradient at the present step, or None; never written to.
    """

    label: str
    param: Tensor
    group: Mapping[str, object]
    state: State
    view: MatrixView
    vector_dims: dict[str, tuple[int, ...] | None]
    shares_blocks: bool = False
    grad: Tensor | None = field(default=None, repr=False)

    @property
    def grid(self) -> BlockGrid:
        """The blocks that 8-bit momentum is scaled by."""
        return block_grid(self.view, tuple(self.param.shape))

    @property
    def momentum_kind(self) -> object:
        """Equal for parameters whose momenta can be advanced together."""
        if "momentum_codes" in self.state:
            return self.grid.along_rows, self.shares_blocks
        return self.state["momentum_buffer"].dtype


class PieceRun:
    """Equal pieces of one parameter that follow one another along one dim of its local tensor."""

    def __init__(
        self,
        owner: MatrixParam,
        *,
        offsets: tuple[int, ...],
        shape: tuple[int, ...],
        dim: int,
        step: int,
        count: int,
        first: int,
        origin: tuple[int, ...] | None = None,
        flat_vectors: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Names the pieces.

        Args:
            owner: the parameter.
            offsets: where the first begins in the local tensor.
            shape: what each spans of it.
            dim: the dim along which they follow one another.
            step: how far the next lies from the last.
            count: how many there are.
            first: place of the first one's matrix among the parameter's matrices.
            origin: where the first begins in the whole parameter; None: ``offsets``.
            flat_vectors: for each vector that is a flat list, where the first one's entries begin,
                and how many each has.
        """
        self.owner, self.first, self.count = owner, first, count
        self.offsets, self.shape, self.dim, self.step = offsets, shape, dim, step
        self.origin = offsets if origin is None else origin
        self._flat_vectors = dict(flat_vectors or {})
        extent = self.extent
        view = owner.view
        moved = list(extent)
        moved.insert(view.batch_dims, moved.pop(view.neuron_dim))
        self._moved = tuple(moved)
        local = tuple(local_tensor(owner.param).shape)
        self._index = (
            None
            if extent == local
            else tuple(slice(o, o + s) for o, s in zip(offsets, extent, strict=True))
        )

    @property
    def extent(self) -> tuple[int, ...]:
        """What all of them span of the local tensor."""
        extent = list(self.shape)
        extent[self.dim] += (self.count - 1) * self.step
        return tuple(extent)

    def narrow(self, start: int, length: int) -> PieceRun:
        """Pieces ``start`` to ``start + length``."""
        if length == self.count:
            return self
        flat = {name: (at + start * n, n) for name, (at, n) in self._flat_vectors.items()}
        return PieceRun(
            self.owner,
            offsets=self._along(self.offsets, start),
            shape=self.shape,
            dim=self.dim,
            step=self.step,
            count=length,
            first=self.first + start,
            origin=self.origin_of(start),
            flat_vectors=flat,
        )

    def origin_of(self, index: int) -> tuple[int, ...]:
        """Where a piece begins in the whole parameter."""
        return self._along(self.origin, index)

    def _along(self, first: tuple[int, ...], index: int) -> tuple[int, ...]:
        moved = list(first)
        moved[self.dim] += index * self.step
        return tuple(moved)

    def is_continued_by(self, other: PieceRun) -> bool:
        """Whether a single piece is the next one of this run."""
        return (
            other.owner is self.owner
            and other.first == self.first + self.count
            and other.offsets == self._along(self.offsets, self.count)
            and self.shape[self.dim] == self.step
        )

    def longer(self) -> PieceRun:
        """The run with one piece more."""
        return PieceRun(
            self.owner,
            offsets=self.offsets,
            shape=self.shape,
            dim=self.dim,
            step=self.step,
            count=self.count + 1,
            first=self.first,
            origin=self.origin,
        )

    @property
    def is_plain(self) -> bool:
        """Whether it is one piece that lies in the parameter as it does in a batch."""
        view = self.owner.view
        return self.count == 1 and len(self._moved) == 2 and view.neuron_dim == 0

    def of(self, local: Tensor) -> Tensor:
        """The pieces in a local tensor of the parameter's shape, as they lie there: a view."""
        return local if self._index is None else local[self._index]

    def in_batch(self, part_BRC: Tensor) -> Tensor:
        """Their part of a contiguous batch, as a view in the parameter's order."""
        view = self.owner.view
        return part_BRC.view(self._moved).movedim(view.batch_dims, view.neuron_dim)

    def layout_in(self, local: Tensor, rows: int, cols: int) -> Layout | None:
        """How the pieces lie in a local tensor of the parameter's shape, as matrices."""
        view = self.owner.view
        pieces = self.of(local).movedim(view.neuron_dim, view.batch_dims)
        try:
            pieces_KRC = pieces.view(self.count, rows, cols)
        except RuntimeError:  # No one stride takes a neuron's inputs in turn.
            return None
        first = int(pieces_KRC.storage_offset()) - int(local.storage_offset())
        piece, row, col = map(int, pieces_KRC.stride())
        return first, piece, row, col

    def vector_of(self, name: str) -> Tensor:
        """Their entries of a vector of the state, a view in the state's own order."""
        local = local_tensor(self.owner.state[name])
        if name in self._flat_vectors:
            start, each = self._flat_vectors[name]
            return local.narrow(0, start, each * self.count)
        if self._index is None:
            return local
        dims = self.owner.vector_dims[name]
        assert dims is not None
        return local[tuple(self._index[dim] for dim in dims)]


class PieceBatch:
    """Runs of equal pieces of one param group, one after another in batches ``[K, R, C]``."""

    def __init__(self, runs: Sequence[PieceRun], rows: int, cols: int) -> None:
        self.runs = list(runs)
        self.rows, self.cols = rows, cols
        self.counts = [run.count for run in self.runs]
        self.count = sum(self.counts)
        self.coded: object = None
        self._is_plain = all(run.is_plain for run in self.runs)
        self._book = AddressBook(self.runs, rows, cols)

    @property
    def first(self) -> MatrixParam:
        """The first parameter; all of a batch have its group, device and dtypes."""
        return self.runs[0].owner

    @property
    def has_gradients(self) -> bool:
        """Whether this rank has a gradient of every parameter."""
        return all(run.owner.grad is not None for run in self.runs)

    def weights(self) -> list[Tensor]:
        """Views of the weights."""
        return [run.of(local_tensor(run.owner.param)) for run in self.runs]

    def momenta(self) -> list[Tensor]:
        """Views of the momenta."""
        return [run.of(local_tensor(run.owner.state["momentum_buffer"])) for run in self.runs]

    @property
    def keeps_residuals(self) -> bool:
        """Whether weights are summed with compensation."""
        return bool(self.first.group["kahan_sum"]) and "weight_residual" in self.first.state

    def residuals(self) -> list[Tensor]:
        """Views of what rounding has taken from the weights."""
        return [run.of(local_tensor(run.owner.state["weight_residual"])) for run in self.runs]

    def gradients(self) -> list[Tensor | None]:
        """Views of the gradients, None where this rank has none."""
        return [None if run.owner.grad is None else run.of(run.owner.grad) for run in self.runs]

    def addresses(self, kind: str) -> Addresses | None:
        """Where the pieces begin, for kernels that take all of them at once.

        Args:
            kind: ``"weight"``, ``"gradient"``, ``"momentum_buffer"`` or ``"weight_residual"``.

        Returns:
            None where no strides describe them, or there are none.
        """
        owners = [run.owner for run in self.runs]
        if kind == "gradient":
            return self._book.of(kind, [owner.grad for owner in owners])
        if kind == "weight":
            return self._book.of(kind, [local_tensor(owner.param) for owner in owners])
        return self._book.of(kind, [local_tensor(owner.state[kind]) for owner in owners])

    def vectors(self, name: str) -> list[Tensor]:
        """Views of the entries of a vector of the state."""
        return [run.vector_of(name) for run in self.runs]

    def views(self, slab_KRC: Tensor) -> list[Tensor]:
        """A contiguous batch, or that of the first runs, cut by run into the parameters' order."""
        if self._is_plain:
            return list(slab_KRC.unbind(0))
        counts = self.counts if len(slab_KRC) == self.count else self._counts_of(len(slab_KRC))
        parts = torch.split(slab_KRC, counts)
        return [run.in_batch(part) for run, part in zip(self.runs, parts, strict=False)]

    def _counts_of(self, num_pieces: int) -> list[int]:
        ends = list(accumulate(self.counts))
        return self.counts[: ends.index(num_pieces) + 1]

    def load_vectors(self, name: str, slab_KV: Tensor) -> Tensor:
        """Copies a vector of the state into a batch, converting its dtype."""
        vectors = self.vectors(name)
        torch._foreach_copy_(self._vector_views(slab_KV, vectors), vectors)
        return slab_KV

    def store_vectors_(self, name: str, slab_KV: Tensor) -> None:
        """Copies a batch of vectors back into the state."""
        vectors = self.vectors(name)
        torch._foreach_copy_(vectors, self._vector_views(slab_KV, vectors))

    def _vector_views(self, slab_KV: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
        """A contiguous batch of vectors cut by run, each part in the state's order."""
        if self._is_plain:
            return list(slab_KV.unbind(0))
        parts = torch.split(slab_KV, self.counts)
        return [part.view(v.shape) for part, v in zip(parts, vectors, strict=True)]

    def places(self) -> Iterator[tuple[MatrixParam, int]]:
        """For each piece its parameter, and its matrix's place among the parameter's."""
        for run in self.runs:
            for index in range(run.count):
                yield run.owner, run.first + index


def whole_runs(owner: MatrixParam, normalizer: Normalizer) -> Iterator[tuple[PieceRun, int, int]]:
    """The matrices of a parameter stored whole on this rank, each run with its rows and columns."""
    flat_ends = {name: 0 for name, dims in owner.vector_dims.items() if dims is None}
    for run in owner.view.runs(owner.param.shape):
        m, n = run.block.m, run.block.n
        flat = {}
        for name, dim in normalizer.state_dims(m, n).items():
            if name in flat_ends:
                each = m if dim == -2 else n
                flat[name] = (flat_ends[name], each)
                flat_ends[name] += each * run.count
        pieces = PieceRun(
            owner,
            offsets=run.offsets,
            shape=run.shape,
            dim=run.dim,
            step=run.step,
            count=run.count,
            first=run.first,
            flat_vectors=flat,
        )
        yield pieces, m, n
