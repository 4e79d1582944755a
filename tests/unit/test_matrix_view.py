"""Views: the shapes they give, the state they ask for, and what they refuse.

That a view's matrices get the right updates is `test_oracle_parity.py`'s.
"""

from __future__ import annotations

import pickle

import pytest
import torch

from normuon import MatrixView
from normuon.step.rule import neuron_dim


@pytest.mark.parametrize(
    ("view", "shape", "expected"),
    [
        (MatrixView.linear(), (6, 4), ((1, 6, 4),)),
        (MatrixView.transposed(), (4, 6), ((1, 6, 4),)),
        (MatrixView.conv(), (8, 3, 5, 5), ((1, 8, 75),)),
        (MatrixView(neuron_dim=1), (3, 8, 5, 5), ((1, 8, 75),)),
        (MatrixView.experts(), (7, 6, 4), ((7, 6, 4),)),
        (MatrixView.experts(transposed=True), (7, 4, 6), ((7, 6, 4),)),
        (MatrixView.fused(8, 2, 2), (12, 5), ((1, 8, 5), (1, 2, 5), (1, 2, 5))),
        (MatrixView.fused(4, 4, 4, neuron_dim=1), (5, 12), ((1, 4, 5),) * 3),
        (MatrixView(heads=3), (12, 5), ((3, 4, 5),)),
        (MatrixView.fused(8, 2, 2, heads=(4, 1, 1)), (12, 5), ((4, 2, 5), (1, 2, 5), (1, 2, 5))),
        (MatrixView(neuron_dim=1, batch_dims=1, heads=2), (3, 8, 5), ((6, 4, 5),)),
    ],
    ids=str,
)
def test_shapes(view, shape, expected):
    assert view.shapes(shape) == expected


@pytest.mark.parametrize(
    ("view", "shape", "axis", "expected"),
    [
        (MatrixView.linear(), (6, 9), "row", (6,)),
        (MatrixView.linear(), (6, 9), "short", (9,)),
        (MatrixView.linear(), (9, 6), "short", (9,)),
        (MatrixView.transposed(), (9, 6), "row", (6,)),
        (MatrixView.experts(), (4, 6, 9), "row", (4, 6)),
        (MatrixView.experts(), (4, 6, 9), "short", (4, 9)),
        (MatrixView.conv(), (8, 3, 5, 5), "short", (3, 5, 5)),
        (MatrixView.transposed(), (9, 6), "short", (9,)),
        (MatrixView.conv(), (8, 3, 5, 5), "row", (8,)),
        (MatrixView.fused(12, 2), (14, 5), "row", (14,)),
        # The first block is tall (12 rows), the second wide (5 columns).
        (MatrixView.fused(12, 2), (14, 5), "short", (17,)),
        (MatrixView.fused(4, 4, heads=2), (8, 3), "short", (12,)),
    ],
)
def test_the_second_moment_has_one_entry_per_neuron(view, shape, axis, expected):
    assert view.second_moment_shape(shape, neuron_axis=axis) == expected


@pytest.mark.parametrize(
    "view",
    [
        MatrixView.linear(),
        MatrixView.fused(3, 3, 6),
        MatrixView.transposed(),
        MatrixView(heads=4),
        MatrixView.fused(4, 8, heads=(2, 4)),
    ],
    ids=str,
)
def test_the_matrices_of_a_matrix_are_views_that_cover_it_once(view):
    tensor = torch.zeros(12, 12)
    for part in view.parts(tensor.shape):
        view.matrices(tensor, part).add_(1)
    assert torch.equal(tensor, torch.ones(12, 12))


VIEWS = [
    (MatrixView.linear(), (6, 4)),
    (MatrixView.transposed(), (4, 6)),
    (MatrixView.conv(), (8, 3, 5, 5)),
    (MatrixView(neuron_dim=1), (3, 8, 5, 5)),
    (MatrixView.experts(), (7, 6, 4)),
    (MatrixView.experts(transposed=True), (7, 4, 6)),
    (MatrixView.fused(8, 2, 2), (12, 5)),
    (MatrixView.fused(4, 4, 4, neuron_dim=1), (5, 12)),
    (MatrixView(heads=3), (12, 5)),
    (MatrixView(neuron_dim=1, heads=3), (5, 12)),
    (MatrixView.fused(8, 2, 2, heads=(4, 1, 1)), (12, 5)),
    (MatrixView(neuron_dim=1, batch_dims=1, heads=2), (3, 8, 5)),
    (MatrixView(neuron_dim=1, batch_dims=1, blocks=(6, 2), heads=(3, 1)), (3, 8, 5)),
    (MatrixView(neuron_dim=2, batch_dims=2), (2, 3, 4, 5)),
    (MatrixView(neuron_dim=3, batch_dims=2, heads=2), (2, 3, 5, 4)),
]


def regions(view, shape):
    """For each matrix its run, and the index that cuts it out of the parameter."""
    for run in view.runs(shape):
        for index in range(run.count):
            corner = run.offsets_of(index)
            yield run, tuple(slice(o, o + s) for o, s in zip(corner, run.shape, strict=True))


@pytest.mark.parametrize(("view", "shape"), VIEWS, ids=str)
def test_runs_are_the_matrices_one_after_another(view, shape):
    """What the planner takes for matrix i is what the step on one device takes for matrix i."""
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    matrices = [m for part in view.parts(shape) for m in view.matrices(tensor, part)]
    found = list(regions(view, shape))
    assert len(found) == len(matrices)
    for (run, index), matrix in zip(found, matrices, strict=True):
        native = tensor[index].movedim(view.neuron_dim, view.batch_dims)
        assert (run.block.m, run.block.n) == matrix.shape
        assert torch.equal(native.reshape(run.block.m, run.block.n), matrix)


@pytest.mark.parametrize(("view", "shape"), VIEWS, ids=str)
def test_runs_number_the_matrices_without_gaps(view, shape):
    numbered = [run.first + index for run in view.runs(shape) for index in range(run.count)]
    assert numbered == list(range(sum(batch for batch, _, _ in view.shapes(shape))))


@pytest.mark.parametrize(("view", "shape"), VIEWS, ids=str)
def test_the_dims_of_a_matrix_are_its_rows_and_its_columns(view, shape):
    for run in view.runs(shape):
        sizes = {
            dim: torch.Size(run.shape[d] for d in view.matrix_dims(len(shape), dim)).numel()
            for dim in (-2, -1)
        }
        assert sizes == {-2: run.block.m, -1: run.block.n}


@pytest.mark.parametrize("axis", ["row", "short"])
@pytest.mark.parametrize(("view", "shape"), VIEWS, ids=str)
def test_a_vector_lies_along_the_parameters_dims_or_is_a_flat_list(view, shape, axis):
    """Where it has the parameter's dims, each entry belongs to the neurons of one matrix alone."""
    dim_of = lambda m, n: neuron_dim(m, n, axis)  # noqa: E731
    dims, vector_shape = view.vector_dims(shape, dim_of), view.vector_shape(shape, dim_of)
    parts = view.parts(shape)
    lengths = [p.m if dim_of(p.m, p.n) == -2 else p.n for p in parts for _ in range(p.batch)]
    if dims is None:
        assert not view.is_whole
        assert vector_shape == (sum(lengths),)
        return
    counts = torch.zeros(vector_shape)
    for (_, index), length in zip(regions(view, shape), lengths, strict=True):
        entries = counts[tuple(index[dim] for dim in dims)]
        assert entries.numel() == length
        entries += 1
    assert torch.equal(counts, torch.ones(vector_shape))


@pytest.mark.parametrize(
    ("view", "shape", "dim", "expected"),
    [
        (MatrixView.linear(), (6, 9), -2, (0,)),
        (MatrixView.linear(), (6, 9), -1, (1,)),
        (MatrixView.transposed(), (9, 6), -2, (1,)),
        (MatrixView.conv(), (8, 3, 5, 5), -1, (1, 2, 3)),
        (MatrixView.experts(), (4, 6, 9), -2, (0, 1)),
        (MatrixView.experts(), (4, 6, 9), -1, (0, 2)),
        (MatrixView.fused(8, 4), (12, 5), -2, (0,)),
        # Two blocks have their own columns, and the parameter has them once.
        (MatrixView.fused(8, 4), (12, 5), -1, None),
    ],
    ids=str,
)
def test_the_dims_of_a_vector_of_every_matrix(view, shape, dim, expected):
    assert view.vector_dims(shape, lambda m, n: dim) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MatrixView(neuron_dim=-1), "neuron_dim=-1 must come after"),
        (lambda: MatrixView(neuron_dim=0, batch_dims=1), "must come after the batch_dims=1"),
        (lambda: MatrixView(blocks=()), r"blocks=\(\) must be one or more sizes >= 1"),
        (lambda: MatrixView.fused(4, 0), r"blocks=\(4, 0\) must be one or more sizes >= 1"),
        (lambda: MatrixView(heads=0), "heads=0 must be one or more sizes >= 1"),
        (lambda: MatrixView(heads=(2, 2)), r"heads=\(2, 2\) needs one entry for each of"),
        (lambda: MatrixView.fused(4, 4, heads=(2,)), r"heads=\(2,\) needs one entry"),
        (lambda: MatrixView.fused(4, 4).shapes((9, 3)), r"blocks=\(4, 4\) sum to 8, but dim 0 has"),
        (lambda: MatrixView(heads=4).shapes((6, 3)), "6 neurons is not divisible into 4 heads"),
        (lambda: MatrixView.experts().shapes((6, 3)), "needs at least 3 dims"),
        (lambda: MatrixView.transposed().shapes((6,)), "needs at least 2 dims"),
    ],
)
def test_a_view_that_cannot_be_or_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_views_are_values():
    """Equal views are one group's key, and they survive pickling."""
    view = MatrixView.fused(8, 2, 2, heads=(4, 1, 1))
    assert view == MatrixView(blocks=[8, 2, 2], heads=[4, 1, 1])
    assert hash(view) == hash(MatrixView.fused(8, 2, 2, heads=(4, 1, 1)))
    assert pickle.loads(pickle.dumps(view)) == view
