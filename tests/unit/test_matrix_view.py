"""Views: the shapes they give, the state they ask for, and what they refuse.

That a view's matrices get the right updates is `test_oracle_parity.py`'s.
"""

from __future__ import annotations

import pickle

import pytest
import torch

from normuon import MatrixView
from normuon.matrix_view import flattens_in_place


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
    slices = view.native_second_moments(torch.zeros(expected), shape, neuron_axis=axis)
    assert sum(s.numel() for s in slices) == torch.Size(expected).numel()
    for slice_, part in zip(slices, view.parts(shape), strict=True):
        assert slice_.numel() % part.batch == 0


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
        native = view.native(tensor, part)
        assert flattens_in_place(native, batch_dims=view.batch_dims, heads=part.heads)
        view.matrices(tensor, part).add_(1)
    assert torch.equal(tensor, torch.ones(12, 12))


@pytest.mark.parametrize(
    ("view", "tensor"),
    [
        (MatrixView.conv(), torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last)),
        (MatrixView(neuron_dim=1), torch.zeros(3, 4, 5, 5)),
        (MatrixView(neuron_dim=1, batch_dims=1, blocks=(2, 2), heads=2), torch.zeros(3, 4, 5)),
    ],
)
def test_what_cannot_be_flattened_in_place_is_known_from_its_strides(view, tensor):
    """reshape copies exactly where `flattens_in_place` says so."""
    for part in view.parts(tensor.shape):
        native = view.native(tensor, part)
        copied = view.matrices(tensor, part).untyped_storage().data_ptr() != (
            tensor.untyped_storage().data_ptr()
        )
        assert copied
        assert not flattens_in_place(native, batch_dims=view.batch_dims, heads=part.heads)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MatrixView(neuron_dim=-1), "neuron_dim=-1 must come after"),
        (lambda: MatrixView(neuron_dim=0, batch_dims=1), "must come after the batch_dims=1"),
        (lambda: MatrixView(blocks=()), r"blocks=\(\) must be sizes >= 1"),
        (lambda: MatrixView.fused(4, 0), r"blocks=\(4, 0\) must be sizes >= 1"),
        (lambda: MatrixView(heads=0), "heads=0 must be sizes >= 1"),
        (lambda: MatrixView(heads=(2, 2)), r"heads=\(2, 2\) needs one entry for each of"),
        (lambda: MatrixView.fused(4, 4, heads=(2,)), r"heads=\(2,\) needs one entry"),
        (lambda: MatrixView.fused(4, 4).shapes((9, 3)), r"blocks=\(4, 4\) sum to 8, and dim 0 has"),
        (lambda: MatrixView(heads=4).shapes((6, 3)), "6 neurons does not split into 4 heads"),
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
