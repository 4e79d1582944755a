"""The optimizer against the float64 loop of `tests/reference.py`, on every spectrum and view."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normuon import MatrixView, NorMuon
from normuon.orthogonalize import resolve_coefficients
from tests.reference import ReferenceNorMuon, relative_to_distance_moved
from tests.spectra import spectrum_zoo

NUM_STEPS = 20
# Relative to the distance moved. Float32: 20 steps of about 5 Newton-Schulz products each,
# amplified by at most 3.4^5 ~ 500 for the smallest singular values: 500 * 2^-24 = 3e-5.
# Float64: the same with 2^-53, 6e-14, and the SVD's own error of the oracle on top.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def gradients(first: Tensor, *, seed: int = 1) -> list[Tensor]:
    """Twenty gradients of one character: rows of the first mixed a little, which keeps its rank."""
    generator = torch.Generator().manual_seed(seed)
    m = first.shape[0]
    mixes = torch.randn(NUM_STEPS, m, m, generator=generator, dtype=first.dtype) * 0.3 / m**0.5
    return [first + (mix @ first.flatten(1)).view_as(first) for mix in mixes]


def run(weight: Tensor, grads: list[Tensor], view: MatrixView | None, **options: object) -> Tensor:
    param = torch.nn.Parameter(weight.clone())
    group = {"params": [param], "view": view}
    # Computed in the parameter's own precision: bfloat16 where the CPU has it is another claim.
    optimizer = NorMuon([group], lr=1e-2, ns_dtype=weight.dtype, **options)
    for grad in grads:
        param.grad = grad.to(weight.dtype)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(spectrum_zoo()))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False},
        {"adjust_lr_fn": "original"},
        {"neuron_axis": "short"},
        {"ns_coefficients": "polar_express"},
        {"equilibrate": True},
        {"ns_coefficients": "you", "adjust_lr_fn": "original", "neuron_axis": "short"},
        {"ns_coefficients": "cans", "beta2": 0.5, "momentum": 0.8, "weight_decay": 0.0},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_twenty_steps_equal_the_plain_loop(name, dtype, options):
    """Algorithm 1, step by step, for every kind of gradient the zoo holds."""
    first = spectrum_zoo()[name]
    if dtype == torch.float32:
        first = first.float().double()
    m, n = first.shape
    start = torch.randn(m, n, dtype=torch.float64).to(dtype)
    grads = [g.to(dtype) for g in gradients(first)]
    oracle = ReferenceNorMuon(
        start,
        weight_decay=options.get("weight_decay", 0.1),
        beta1=options.get("momentum", 0.95),
        beta2=options.get("beta2", 0.95),
        nesterov=options.get("nesterov", True),
        scaling=options.get("adjust_lr_fn", "match_rms_adamw"),
        columns_are_neurons=options.get("neuron_axis") == "short" and m < n,
        coefficients=resolve_coefficients(options.get("ns_coefficients", "jordan"), 5),
        equilibrated=options.get("equilibrate", False),
    )
    for grad in grads:
        oracle.step(grad)
    actual = run(start, grads, None, **options)
    error = relative_to_distance_moved(actual, oracle.weight, start)
    assert error <= TOLERANCE[dtype], f"{error:.2e} of the distance moved"


VIEWS = {
    "linear": (MatrixView.linear(), (24, 40)),
    "transposed": (MatrixView.transposed(), (40, 24)),
    "conv": (MatrixView.conv(), (16, 6, 3, 3)),
    "conv_transposed": (MatrixView(neuron_dim=1), (6, 16, 3, 3)),
    "experts": (MatrixView.experts(), (5, 12, 20)),
    "experts_transposed": (MatrixView.experts(transposed=True), (5, 20, 12)),
    "fused_qkv_unequal": (MatrixView.fused(24, 8, 8), (40, 24)),
    "fused_qkv_conv1d": (MatrixView.fused(24, 24, 24, neuron_dim=1), (24, 72)),
    "heads": (MatrixView(heads=4), (32, 24)),
    "blocks_and_heads": (MatrixView.fused(24, 8, 8, heads=(6, 2, 2)), (40, 24)),
    "experts_with_blocks": (
        MatrixView(neuron_dim=1, batch_dims=1, blocks=(8, 4), heads=(2, 1)),
        (3, 12, 10),
    ),
}


def separate_matrices(view: MatrixView, tensor: Tensor) -> list[Tensor]:
    """The view's matrices, cut out by hand: no code of the library's views is used."""
    moved = tensor.movedim(view.neuron_dim, view.batch_dims)
    batch = moved.flatten(0, view.batch_dims - 1) if view.batch_dims else moved[None]
    sizes = view.blocks or (batch.shape[1],)
    heads = view.heads if isinstance(view.heads, tuple) else (view.heads or 1,) * len(sizes)
    found, start = [], 0
    for size, count in zip(sizes, heads, strict=True):
        for expert in batch:
            rows = expert[start : start + size]
            found += [head.flatten(1).clone() for head in rows.chunk(count)]
        start += size
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("axis", ["row", "short"])
@pytest.mark.parametrize("scaling", ["match_rms_adamw", "original", "spectral_unclamped"])
@pytest.mark.parametrize("name", list(VIEWS))
def test_a_view_gives_each_matrix_the_step_of_a_separate_parameter(name, scaling, axis, dtype):
    """Split, transposed and batched views: each part equals the oracle run on it alone."""
    view, shape = VIEWS[name]
    start = torch.randn(shape, dtype=torch.float64).to(dtype)
    grads = [g.to(dtype) for g in gradients(torch.randn(shape, dtype=torch.float64))]
    actual = run(start, grads, view, adjust_lr_fn=scaling, neuron_axis=axis)
    starts, ends = separate_matrices(view, start), separate_matrices(view, actual)
    steps = [separate_matrices(view, grad) for grad in grads]
    assert sum(m.numel() for m in starts) == start.numel()
    for index, (first, last) in enumerate(zip(starts, ends, strict=True)):
        m, n = first.shape
        oracle = ReferenceNorMuon(
            first, scaling=scaling, columns_are_neurons=axis == "short" and m < n
        )
        for step in steps:
            oracle.step(step[index])
        assert relative_to_distance_moved(last, oracle.weight, first) <= TOLERANCE[dtype]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolutions_memory_format_changes_no_value(memory_format):
    """channels_last weights cannot be flattened in place: they are copied out and back."""
    start = torch.randn(16, 6, 3, 3)
    grads = gradients(torch.randn(16, 6, 3, 3))
    plain = run(start, grads, MatrixView.conv())
    stored = start.to(memory_format=memory_format)
    grads = [g.to(memory_format=memory_format) for g in grads]
    assert torch.equal(run(stored, grads, MatrixView.conv()), plain)
