"""A parameter's matrices as the distributed planner sees them: rectangles, neurons, batch keys.

Serves the live optimizer and offline plans alike; where the parameter is stored is the layout's,
which the caller brings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from normuon.distributed.region import Region, ShardLayout
from normuon.distributed.task import MatrixTask
from normuon.matrix_view import MatrixBlock, MatrixView
from normuon.rule import NeuronAxis, neuron_dim


def matrix_regions(view: MatrixView, shape: Sequence[int]) -> Iterator[tuple[MatrixBlock, Region]]:
    """Each matrix of a parameter as a rectangle of it, in the order of `MatrixView.matrices`.

    Example:
        >>> [region.offsets for _, region in matrix_regions(MatrixView(heads=2), (6, 4))]
        [(0, 0), (3, 0)]
    """
    for part in view.parts(shape):
        for index in range(part.batch):
            batch_index, head = divmod(index, part.heads)
            offsets, sizes = [0] * len(shape), list(shape)
            for dim in reversed(range(view.batch_dims)):
                batch_index, offsets[dim] = divmod(batch_index, shape[dim])
                sizes[dim] = 1
            offsets[view.neuron_dim] = part.start + head * part.m
            sizes[view.neuron_dim] = part.m
            yield part, Region(tuple(offsets), tuple(sizes))


def neuron_dims(
    view: MatrixView, shape: Sequence[int], part: MatrixBlock, neuron_axis: NeuronAxis
) -> tuple[int, ...]:
    """The parameter's dims along which a block's neurons lie.

    Example:
        >>> view = MatrixView.conv()
        >>> (block,) = view.parts((4, 3, 5, 5))
        >>> neuron_dims(view, (4, 3, 5, 5), block, "row")
        (0,)
        >>> neuron_dims(view, (4, 3, 5, 5), block, "short")
        (1, 2, 3)
    """
    if neuron_dim(part.m, part.n, neuron_axis) == -2:
        return (view.neuron_dim,)
    inputs = range(view.batch_dims, len(shape))
    return tuple(dim for dim in inputs if dim != view.neuron_dim)


def second_moment_dims(
    view: MatrixView, shape: Sequence[int], neuron_axis: NeuronAxis
) -> tuple[int, ...] | None:
    """The parameter's dims that its second-moment state has; None where it is a flat list.

    Example:
        >>> second_moment_dims(MatrixView.experts(), (8, 4, 3), "row")
        (0, 1)
    """
    parts = view.parts(shape)
    found = {neuron_dims(view, shape, part, neuron_axis) for part in parts}
    if len(found) > 1 or (not view.is_whole and found != {(view.neuron_dim,)}):
        return None
    return (*range(view.batch_dims), *found.pop())


def tasks_of_param(
    name: str,
    shape: Sequence[int],
    view: MatrixView,
    *,
    layout: ShardLayout,
    neuron_axis: NeuronAxis,
    normalizes_neurons: bool,
    key: str,
    wire_dtype: str,
    neuron_dtype: str,
) -> list[MatrixTask]:
    """One task per matrix of a parameter.

    Args:
        name: the parameter's.
        shape: its global shape.
        view: how it becomes matrices.
        layout: where it is stored.
        neuron_axis: rows, or the short side's.
        normalizes_neurons: False for `muon`, whose matrices have no second moments to send.
        key: matrices of equal shape and key may be orthogonalised together.
        wire_dtype: dtype of matrices on the wire.
        neuron_dtype: dtype of second moments on the wire.
    """
    return [
        MatrixTask(
            name=name,
            index=index,
            region=region,
            rows=part.m,
            cols=part.n,
            layout=layout,
            key=f"{key} as {list(region.shape)}",
            neuron_dims=neuron_dims(view, shape, part, neuron_axis) if normalizes_neurons else (),
            wire_dtype=wire_dtype,
            neuron_dtype=neuron_dtype,
        )
        for index, (part, region) in enumerate(matrix_regions(view, shape))
    ]


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as the planner spells it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def as_matrices(native: Tensor, view: MatrixView, rows: int, columns: int) -> Tensor:
    """Matrices in their parameter's layout, ``[B, *region]``, as ``[B, rows, columns]``."""
    return native.movedim(view.neuron_dim + 1, view.batch_dims + 1).reshape(-1, rows, columns)


def as_native(matrices: Tensor, view: MatrixView, region_shape: Sequence[int]) -> Tensor:
    """The inverse of `as_matrices`: ``[B, rows, columns]`` as ``[B, *region]``, a view."""
    moved = list(region_shape)
    moved.insert(view.batch_dims, moved.pop(view.neuron_dim))
    native = matrices.view(len(matrices), *moved)
    return native.movedim(view.batch_dims + 1, view.neuron_dim + 1)
