"""A parameter of any shape seen as batches of matrices whose rows are neurons.

Which view a parameter of a model gets is decided in `groups.py`; what is done with the matrices is
`matrix_step.py`'s. Views hold no tensors: they map shapes and slice what they are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from normuon.rule import NeuronAxis, neuron_dim


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

    The neuron dim becomes the rows, every other dim after the batch dims is flattened, in order,
    into the columns. A split view gives each part exactly the update that a separate, ordinary
    parameter holding it would get, its scale included.

    Args:
        neuron_dim: the tensor dim that counts output neurons: 0 for ``nn.Linear`` and convolutions,
            1 for transformers' ``Conv1D``, which stores ``[in, out]``.
        batch_dims: how many leading dims only count matrices: 1 for experts ``[E, m, n]``.
        blocks: sizes, along the neuron dim, of matrices fused into one parameter: ``(q, k, v)``,
            unequal under grouped-query attention. None keeps the parameter whole.
        heads: how many equal matrices each block splits into along the neuron dim; one number for
            all blocks or one per block. None or 1 keeps blocks whole.

    Raises:
        ValueError: negative dims, a neuron dim among the batch dims, sizes below 1.

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
                raise ValueError(f"MatrixView: {name}={getattr(self, name)} must be sizes >= 1")
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
        """Matrices stacked along the neuron dim: ``fused(q, k, v)``, each updated on its own."""
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

    def second_moment_shape(
        self, shape: Sequence[int], *, neuron_axis: NeuronAxis
    ) -> tuple[int, ...]:
        """Shape of the second-moment state: one entry per neuron.

        ``[*batch, neurons]``, the parameter's shape without its input dims, when rows are the
        neurons of every block; ``[*batch, *inputs]`` when columns are and the parameter is whole;
        a flat ``[entries]``, block after block, in a split one of which some neurons are columns.
        """
        parts = self.parts(shape)
        batch = tuple(shape[: self.batch_dims])
        if _rows_are_neurons(parts, neuron_axis):
            return (*batch, shape[self.neuron_dim])
        if self.is_whole:
            rest = range(self.batch_dims, len(shape))
            return (*batch, *(shape[dim] for dim in rest if dim != self.neuron_dim))
        return (sum(part.batch * _num_neurons(part, neuron_axis) for part in parts),)

    def native_second_moments(
        self, v: Tensor, shape: Sequence[int], *, neuron_axis: NeuronAxis
    ) -> tuple[Tensor, ...]:
        """Each block's slice of the second-moment state, a view; ``batch * V`` entries each."""
        parts = self.parts(shape)
        if _rows_are_neurons(parts, neuron_axis):
            return tuple(v.narrow(-1, part.start, part.rows) for part in parts)
        if self.is_whole:
            return (v.flatten(self.batch_dims),)
        sizes = [part.batch * _num_neurons(part, neuron_axis) for part in parts]
        return tuple(torch.split(v, sizes))


def _cut(view: MatrixView, shape: tuple[int, ...]) -> tuple[MatrixBlock, ...]:
    if view.neuron_dim >= len(shape) or len(shape) - view.batch_dims < 2:
        raise ValueError(
            f"{view} needs at least {max(view.neuron_dim + 1, view.batch_dims + 2)} dims"
        )
    neurons = shape[view.neuron_dim]
    batch = math.prod(shape[: view.batch_dims])
    columns = math.prod(shape[view.batch_dims :]) // neurons if neurons else 0
    sizes = view.blocks or (neurons,)
    if sum(sizes) != neurons:
        raise ValueError(
            f"blocks={sizes} sum to {sum(sizes)}, and dim {view.neuron_dim} has {neurons}"
        )
    heads = view.heads or 1
    counts = heads if isinstance(heads, tuple) else (heads,) * len(sizes)
    for size, count in zip(sizes, counts, strict=True):
        if size % count:
            raise ValueError(f"a block of {size} neurons does not split into {count} heads")
    starts = accumulate(sizes, initial=0)
    return tuple(
        MatrixBlock(batch * count, size // count, columns, start, size, count)
        for size, count, start in zip(sizes, counts, starts, strict=False)
    )


# Asked for every parameter at every step; the answer never changes.
_remembered_cut = lru_cache(maxsize=4096)(_cut)


def flattens_in_place(native: Tensor, *, batch_dims: int, heads: int) -> bool:
    """Whether ``[*batch, neurons, *inputs]`` becomes ``[batch * heads, m, n]`` without a copy.

    Decided on strides alone. Where it is False (a channels_last convolution, say) whoever writes to
    the matrices must copy them back.
    """
    sizes, strides = native.shape, native.stride()
    head_stride = strides[batch_dims] * (sizes[batch_dims] // heads)
    leading = [*zip(sizes[:batch_dims], strides[:batch_dims], strict=True), (heads, head_stride)]
    inputs = [*zip(sizes[batch_dims + 1 :], strides[batch_dims + 1 :], strict=True)]
    return _collapses(leading) and _collapses(inputs)


def _rows_are_neurons(parts: Sequence[MatrixBlock], neuron_axis: NeuronAxis) -> bool:
    return all(neuron_dim(part.m, part.n, neuron_axis) == -2 for part in parts)


def _num_neurons(part: MatrixBlock, neuron_axis: NeuronAxis) -> int:
    return part.n if neuron_dim(part.m, part.n, neuron_axis) == -1 else part.m


def _collapses(dims: Sequence[tuple[int, int]]) -> bool:
    """Whether neighbouring dims, as (size, stride), flatten into one."""
    kept = [dim for dim in dims if dim[0] != 1]
    return all(
        stride == inner_stride * inner_size
        for (_, stride), (inner_size, inner_stride) in pairwise(kept)
    )
