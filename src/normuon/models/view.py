"""Views a parameter of any shape as batches of matrices whose rows are neurons.

Views hold no tensors: they map shapes and slice tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product

import torch
from torch import Tensor

from normuon.step.rule import NeuronAxis, neuron_dim

DimOf = Callable[[int, int], int]
"""The dim that a vector of an m x n matrix lies along: -2, an entry per row, or -1, per column."""


@dataclass(frozen=True, slots=True)
class MatrixBlock:
    """One batch of equal matrices inside a parameter.

    Args:
        batch: number of matrices, experts times heads.
        m: rows, the output neurons.
        n: columns, the inputs.
        start: first row of the block along the parameter's neuron dim.
        rows: rows of the block along the neuron dim, ``m`` times its heads.
        heads: how many matrices the block's rows are split into.
    """

    batch: int
    m: int
    n: int
    start: int
    rows: int
    heads: int


@dataclass(frozen=True, slots=True)
class MatrixView:
    """How a parameter becomes ``[batch, m, n]`` matrices, rows = output neurons.

    The neuron dim becomes the rows; all other dims after the batch dims are flattened, in order,
    into the columns. Each part of a split view gets exactly the update of a separate parameter,
    its scale included.

    Args:
        neuron_dim: the dim of the output neurons: 0 for ``nn.Linear`` and convolutions, 1 for
            transformers' ``Conv1D``, which stores ``[in, out]``.
        batch_dims: number of leading batch dims: 1 for experts ``[E, m, n]``.
        blocks: sizes, along the neuron dim, of matrices fused into one parameter: ``(q, k, v)``,
            unequal with grouped-query attention. None keeps the parameter whole.
        heads: number of equal matrices in each block along the neuron dim; one number for all
            blocks or one per block. None or 1 keeps blocks whole.

    Raises:
        ValueError: a negative dim, a neuron dim among the batch dims, or a size below 1.

    Example:
        >>> MatrixView.fused(512, 128, 128).shapes((768, 512))
        ((1, 512, 512), (1, 128, 512), (1, 128, 512))
        >>> MatrixView.experts().shapes((8, 64, 32))
        ((8, 64, 32),)
    """

    neuron_dim: int = 0
    batch_dims: int = 0
    blocks: tuple[int, ...] | None = None
    heads: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.batch_dims < 0 or self.neuron_dim < self.batch_dims:
            raise ValueError(
                f"MatrixView: neuron_dim={self.neuron_dim} must come after the "
                f"batch_dims={self.batch_dims} leading dims"
            )
        for name in ("blocks", "heads"):
            sizes = getattr(self, name)
            if isinstance(sizes, Sequence):
                object.__setattr__(self, name, tuple(sizes))
            sizes = (sizes,) if isinstance(sizes, int) else (sizes if sizes is not None else (1,))
            if not sizes or any(not isinstance(s, int) or s < 1 for s in sizes):
                raise ValueError(
                    f"MatrixView: {name}={getattr(self, name)} must be one or more sizes >= 1"
                )
        if isinstance(self.heads, tuple) and len(self.heads) != len(self.blocks or (0,)):
            raise ValueError(
                f"MatrixView: heads={self.heads} needs one entry for each of "
                f"blocks={self.blocks}, or one number for all"
            )

    @classmethod
    def linear(cls) -> MatrixView:
        """``nn.Linear.weight``, ``[out, in]``: the parameter itself."""
        return cls()

    @classmethod
    def transposed(cls) -> MatrixView:
        """``[in, out]``, as transformers' ``Conv1D`` stores it: neurons are columns."""
        return cls(neuron_dim=1)

    @classmethod
    def conv(cls) -> MatrixView:
        """``nn.Conv*d.weight``, ``[out, in, *kernel]``: one matrix ``[out, in * kernel]``."""
        return cls()

    @classmethod
    def experts(cls, *, transposed: bool = False) -> MatrixView:
        """``[E, out, in]`` (or ``[E, in, out]`` when transposed): one matrix per expert."""
        return cls(neuron_dim=2 if transposed else 1, batch_dims=1)

    @classmethod
    def fused(
        cls,
        *blocks: int,
        heads: int | tuple[int, ...] | None = None,
        neuron_dim: int = 0,
    ) -> MatrixView:
        """Matrices stacked along the neuron dim: ``fused(q, k, v)``, each updated separately."""
        return cls(neuron_dim=neuron_dim, blocks=blocks, heads=heads)

    @property
    def is_whole(self) -> bool:
        """Whether neither blocks nor heads split the parameter."""
        return self.blocks is None and self.heads in (None, 1)

    def parts(self, shape: Sequence[int]) -> tuple[MatrixBlock, ...]:
        """The blocks of a parameter of this shape.

        Raises:
            ValueError: the view does not fit the shape; says which size is wrong.
        """
        if torch.compiler.is_compiling():
            return _cut(self, tuple(shape))  # A traced step runs this once, and caches confuse it.
        return _remembered_cut(self, tuple(shape))

    def shapes(self, shape: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        """``(batch, m, n)`` of each block of a parameter of this shape."""
        return tuple((part.batch, part.m, part.n) for part in self.parts(shape))

    def native(self, tensor: Tensor, part: MatrixBlock) -> Tensor:
        """One block as a view in its own layout, ``[*batch, neurons, *inputs]``.

        Args:
            tensor: the parameter, or a gradient or momentum of its shape.
            part: one of `parts`.
        """
        if part.rows != tensor.shape[self.neuron_dim]:
            tensor = tensor.narrow(self.neuron_dim, part.start, part.rows)
        if self.neuron_dim == self.batch_dims:
            return tensor
        return tensor.movedim(self.neuron_dim, self.batch_dims)

    def matrices(self, tensor: Tensor, part: MatrixBlock) -> Tensor:
        """One block as ``[batch, m, n]``: a view of the tensor where its strides allow one."""
        return self.native(tensor, part).reshape(part.batch, part.m, part.n)

    def runs(self, shape: Sequence[int]) -> Iterator[MatrixRun]:
        """The matrices of a parameter of this shape, equal neighbours as one run.

        In the order of `matrices`: block after block, in a block by batch dims and then by heads.

        Example:
            >>> [run.count for run in MatrixView.experts().runs((8, 4, 3))]
            [8]
            >>> view = MatrixView.fused(6, 2, heads=(3, 1))
            >>> [(run.offsets, run.count) for run in view.runs((8, 4))]
            [((0, 0), 3), ((6, 0), 1)]
        """
        first = 0
        for part in self.parts(shape):
            sizes = list(shape)
            sizes[self.neuron_dim] = part.m
            sizes[: self.batch_dims] = [1] * self.batch_dims
            outer = list(shape[: self.batch_dims])
            if part.heads > 1:
                dim, step, count = self.neuron_dim, part.m, part.heads
            else:
                dim, step, count = max(self.batch_dims - 1, 0), 1, outer.pop() if outer else 1
            for place in product(*map(range, outer)):
                offsets = [*place, *[0] * (len(shape) - len(place))]
                offsets[self.neuron_dim] = part.start
                yield MatrixRun(part, tuple(offsets), tuple(sizes), dim, step, count, first)
                first += count

    def vector_dims(self, shape: Sequence[int], dim_of: DimOf) -> tuple[int, ...] | None:
        """The parameter's dims along which a vector of every matrix lies: the shape of its state.

        If every block has an entry per row, these are the parameter's dims without the inputs; if a
        whole parameter has one per column, without the neurons. None if a split parameter has
        entries for columns: its state is then a flat list, block after block.

        Example:
            >>> MatrixView.experts().vector_dims((8, 4, 3), lambda m, n: -2)
            (0, 1)
            >>> MatrixView.conv().vector_dims((4, 3, 5, 5), lambda m, n: -1)
            (1, 2, 3)
        """
        lying = {dim_of(part.m, part.n) for part in self.parts(shape)}
        if lying == {-2}:
            return (*range(self.batch_dims), self.neuron_dim)
        if lying == {-1} and self.is_whole:
            return tuple(dim for dim in range(len(shape)) if dim != self.neuron_dim)
        return None

    def matrix_dims(self, ndim: int, dim: int) -> tuple[int, ...]:
        """The parameter's dims along which one matrix's rows (-2) or columns (-1) lie.

        Example:
            >>> MatrixView.experts().matrix_dims(3, -2), MatrixView.conv().matrix_dims(4, -1)
            ((1,), (1, 2, 3))
        """
        if dim == -2:
            return (self.neuron_dim,)
        return tuple(d for d in range(self.batch_dims, ndim) if d != self.neuron_dim)

    def vector_shape(self, shape: Sequence[int], dim_of: DimOf) -> tuple[int, ...]:
        """Shape of the state of a vector of every matrix; see `vector_dims`."""
        dims = self.vector_dims(shape, dim_of)
        if dims is not None:
            return tuple(shape[dim] for dim in dims)
        parts = self.parts(shape)
        return (sum(p.batch * (p.m if dim_of(p.m, p.n) == -2 else p.n) for p in parts),)

    def second_moment_shape(
        self, shape: Sequence[int], *, neuron_axis: NeuronAxis
    ) -> tuple[int, ...]:
        """Shape of NorMuon's second moments: one entry per neuron.

        Example:
            >>> MatrixView.experts().second_moment_shape((8, 4, 3), neuron_axis="row")
            (8, 4)
        """
        return self.vector_shape(shape, lambda m, n: neuron_dim(m, n, neuron_axis))


@dataclass(frozen=True, slots=True)
class MatrixRun:
    """Matrices of one parameter that follow one another along one of its dims.

    Args:
        block: their block.
        offsets: where the first begins in the parameter.
        shape: what each spans of the parameter.
        dim: the parameter's dim along which they follow one another.
        step: distance from one to the next.
        count: how many there are.
        first: place of the first among the parameter's matrices.
    """

    block: MatrixBlock
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dim: int
    step: int
    count: int
    first: int

    def offsets_of(self, index: int) -> tuple[int, ...]:
        """Where matrix ``index`` of the run begins."""
        moved = list(self.offsets)
        moved[self.dim] += index * self.step
        return tuple(moved)


def _cut(view: MatrixView, shape: tuple[int, ...]) -> tuple[MatrixBlock, ...]:
    if view.neuron_dim >= len(shape) or len(shape) - view.batch_dims < 2:
        raise ValueError(
            f"{view} needs at least {max(view.neuron_dim + 1, view.batch_dims + 2)} dims"
        )
    neurons = shape[view.neuron_dim]
    batch = math.prod(shape[: view.batch_dims])
    columns = math.prod([shape[dim] for dim in view.matrix_dims(len(shape), -1)])
    sizes = view.blocks or (neurons,)
    if sum(sizes) != neurons:
        raise ValueError(
            f"blocks={sizes} sum to {sum(sizes)}, but dim {view.neuron_dim} has {neurons}"
        )
    heads = view.heads or 1
    counts = heads if isinstance(heads, tuple) else (heads,) * len(sizes)
    for size, count in zip(sizes, counts, strict=True):
        if size % count:
            raise ValueError(f"a block of {size} neurons is not divisible into {count} heads")
    starts = accumulate(sizes, initial=0)
    return tuple(
        MatrixBlock(batch * count, size // count, columns, start, size, count)
        for size, count, start in zip(sizes, counts, starts, strict=False)
    )


# Asked for every parameter at every step; the answer never changes.
_remembered_cut = lru_cache(maxsize=4096)(_cut)
