"""The Triton kernels of the step, in Triton's interpreter, beside torch's own operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normuon import MatrixView, NorMuon
from normuon.orthogonalize import (
    Workspace,
    newton_schulz,
    normalize_frobenius,
    orthogonalize,
    resolve_coefficients,
)
from normuon.orthogonalize import backend as backend_module
from normuon.orthogonalize import fused as fused_module
from normuon.orthogonalize.fused import divide_by_norm, sum_squares, symmetric_product_fused
from normuon.orthogonalize.iteration import iterate_
from normuon.step.addresses import AddressBook
from tests.interpreted import interpreted_kernels

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, for CUDA tensors: tests/gpu"
)

JORDAN = resolve_coefficients("jordan", 5)
SHAPES = [(40, 72), (40, 72), (72, 40), (33, 33), (1, 9), (130, 5)]


@pytest.fixture
def kernels():
    with interpreted_kernels():
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(
    fused,
    *,
    shapes=SHAPES,
    dtype=torch.float32,
    view=None,
    steps=3,
    grads=None,
    rate=1e-2,
    **options,
):
    """Parameters and their state after some steps in float32 Newton-Schulz."""
    numbers = generator(1)
    params = [
        nn.Parameter((torch.randn(shape, generator=numbers) / 10).to(dtype)) for shape in shapes
    ]
    group = {"params": params, **({"view": view} if view else {})}
    options = {"ns_dtype": torch.float32, "ns_backend": "eager", **options}
    optimizer = NorMuon([group], lr=rate, fused=fused, **options)
    for step in range(steps):
        for number, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=numbers).to(dtype)
            if grads is not None:
                grads(step, number, param)
        optimizer.step()
    return params, [optimizer.state[param] for param in params]


def assert_alike(fused, plain, *, atol=1e-6):
    for (ours, our_state), (theirs, their_state) in zip(
        zip(*fused, strict=True), zip(*plain, strict=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
        assert our_state.keys() == their_state.keys()
        for name, value in our_state.items():
            torch.testing.assert_close(value, their_state[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False},
        {"maximize": True},
        {"momentum": 0.3},
        {"momentum": 0.0},
        {"momentum_dtype": torch.int8},
        {"weight_decay": 0.0},
        {"cautious_weight_decay": True},
        {"skip_nonfinite": True},
        {"skip_nonfinite": True, "maximize": True, "cautious_weight_decay": True},
        {"adjust_lr_fn": "original"},
        {"neuron_axis": "short"},
        {"adjust_lr_fn": "original", "neuron_axis": "short"},
        {"equilibrate": True},
        {"orthogonalizer": "newton_schulz"},
        {"ns_dtype": torch.float64},
        {"eps": 1e-3, "beta2": 0.2},
        {"max_scratch_bytes": 1},
        {"rate": torch.tensor(1e-2)},
        {"weight_decay": torch.tensor(0.1)},
    ],
    ids=str,
)
def test_a_fused_step_is_the_step(kernels, options):
    assert_alike(trained(True, **options), trained(False, **options))


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original", "spectral_unclamped"])
def test_a_neuron_that_barely_moves_stops_no_other_without_epsilon(kernels, adjust):
    """Row 0's O is 1e-25 of the others', so that its v is subnormal."""

    def uneven(step, number, param):
        param.grad[0] *= 1e-25

    options = {"shapes": [(6, 8)], "grads": uneven, "eps": 0.0, "adjust_lr_fn": adjust}
    fused, plain = (trained(on, weight_decay=0.0, **options) for on in (True, False))
    assert_alike(fused, plain)
    started = torch.randn((6, 8), generator=generator(1)) / 10
    assert (fused[0][0].detach() - started).abs().amax(1)[1:].min() > 1e-4


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original", "spectral_unclamped"])
def test_a_muon_group_is_fused_too(kernels, adjust):
    def stepped(fused):
        params = [nn.Parameter(torch.randn(12, 20, generator=generator())) for _ in range(2)]
        optimizer = NorMuon(
            [{"params": params, "algorithm": "muon"}],
            lr=1e-2,
            fused=fused,
            adjust_lr_fn=adjust,
            ns_dtype=torch.float32,
        )
        for param in params:
            param.grad = torch.randn(12, 20, generator=generator(1))
        optimizer.step()
        return params

    for ours, theirs in zip(stepped(True), stepped(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kahan_sum", [False, True])
def test_half_precision_weights(kernels, dtype, kahan_sum):
    """Weights and what was rounded away add up to the same; the interpreter truncates bfloat16."""

    def sums(fused):
        params, states = trained(fused, dtype=dtype, kahan_sum=kahan_sum)
        residuals = [s.get("weight_residual", torch.zeros(())) for s in states]
        return [p.float() + r.float() for p, r in zip(params, residuals, strict=True)]

    for ours, theirs in zip(sums(True), sums(False), strict=True):
        atol = 6 * 2**-8 * 0.4 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (MatrixView.conv(), (16, 3, 5, 5)),
        (MatrixView.experts(), (4, 24, 32)),
        (MatrixView(neuron_dim=1), (24, 40)),
        (MatrixView(blocks=(16, 8, 8)), (32, 24)),
        (MatrixView(heads=4), (32, 24)),
    ],
    ids=str,
)
def test_every_view_is_found_in_memory(kernels, view, shape):
    options = {"shapes": [shape, shape], "view": view}
    assert_alike(trained(True, **options), trained(False, **options))


def test_tensors_that_are_not_contiguous(kernels):
    def turned(fused):
        def transposed(_, __, param):
            param.grad = param.grad.T.contiguous().T

        params, states = trained(fused, shapes=[(24, 40), (24, 40)], grads=transposed)
        return params, states

    assert_alike(turned(True), turned(False))


def test_a_gradient_that_is_not_finite_moves_nothing(kernels):
    def one_is_nan(step, number, param):
        if (step, number) == (1, 0):
            param.grad[0, 0] = float("nan")

    found = trained(True, skip_nonfinite=True, grads=one_is_nan)
    assert_alike(found, trained(False, skip_nonfinite=True, grads=one_is_nan))
    assert all(param.isfinite().all() for param in found[0])
    assert [int(state["skipped_steps"].sum()) for state in found[1]] == [1, 0, 0, 0, 0, 0]


def test_a_nan_reaches_the_weights_by_default(kernels):
    def one_is_nan(_, number, param):
        if number == 2:
            param.grad[0, 0] = float("nan")

    params, _ = trained(True, grads=one_is_nan, steps=1)
    assert params[2].isnan().all()
    assert all(param.isfinite().all() for number, param in enumerate(params) if number != 2)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 0.0, 1e-42])
def test_the_scale_of_gradients_does_not_matter(kernels, scale):
    x = torch.randn(2, 7, 11, generator=generator()) * scale
    expected = normalize_frobenius(x.clone(), dtype=torch.float32)
    found = normalize_frobenius(x.clone(), dtype=torch.float32, workspace=Workspace())
    if scale == 1e-42:  # No normal number: torch's own way gives zero as well.
        assert not found.any()
    torch.testing.assert_close(found, expected)


def test_sums_of_squares_take_any_size(kernels):
    for numel in (1, 4095, 4096, 4097, 9000):
        x = torch.randn(3, 1, numel, generator=generator(numel))
        torch.testing.assert_close(sum_squares(x), x.double().square().sum((-2, -1)))
    x = torch.randn(2, 3, 5, generator=generator())
    out = torch.full_like(x, float("nan"))
    divide_by_norm(x, sum_squares(x), out=out)
    torch.testing.assert_close(out.double().square().sum((-2, -1)), torch.ones(2).double())


@pytest.mark.parametrize("shape", [(5, 5), (40, 72), (130, 64), (257, 300)])
@pytest.mark.parametrize("tall", [False, True])
def test_a_symmetric_product(kernels, shape, tall):
    x = torch.randn(2, *(shape[::-1] if tall else shape), generator=generator())
    wide = x.mT if tall else x
    r = symmetric_product_fused(wide, wide.mT, out=torch.full((2, shape[0], shape[0]), torch.nan))
    torch.testing.assert_close(r, wide @ wide.mT, rtol=0, atol=1e-3)
    r = r / r.norm()
    found = symmetric_product_fused(r, r, add=r, beta=0.5, alpha=2.0)
    torch.testing.assert_close(found, 0.5 * r + 2 * r @ r, rtol=0, atol=1e-5)
    # Of factors that do not quite commute too, in the diagonal's tiles as well.
    other = torch.randn(2, shape[0], shape[0], generator=generator(1))
    found = symmetric_product_fused(r, other + other.mT)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
@pytest.mark.parametrize("segments", [(1,) * 5, (3, 2), (5,)], ids=str)
def test_the_iteration_by_symmetric_products(kernels, shape, segments):
    x = normalize_frobenius(torch.randn(2, *shape, generator=generator()), dtype=torch.float32)
    found = iterate_(
        x.clone(),
        JORDAN,
        segments=segments,
        workspace=Workspace(),
        symmetric=symmetric_product_fused,
    )
    # 485, the product of the slopes at zero, times some roundings of 2^-24.
    torch.testing.assert_close(found, newton_schulz(x, JORDAN), rtol=0, atol=1e-3)


def test_the_backend_is_taken_from_its_size_on(kernels, monkeypatch):
    """And below it nothing is launched."""
    sides = []

    def counted(a, b, **options):
        sides.append(a.shape[-2])
        return symmetric_product_fused(a, b, **options)

    monkeypatch.setattr(backend_module, "why_not_symmetric", lambda *_: None)
    monkeypatch.setattr(backend_module, "SYMMETRIC_SIDE", 24)
    monkeypatch.setattr(backend_module, "SYMMETRIC_TILES", 2)
    monkeypatch.setattr(backend_module, "symmetric_product_fused", counted)
    options = {"coefficients": JORDAN, "dtype": torch.float32}
    for count, side in ((2, 16), (1, 24), (2, 24)):
        x = torch.randn(count, side, 40, generator=generator())
        found = orthogonalize(x, backend="triton", **options)
        torch.testing.assert_close(found, orthogonalize(x, **options), rtol=0, atol=2e-4)
        assert set(sides) == ({24} if (count, side) == (2, 24) else set())


def test_what_cannot_be_fused_says_so():
    param = nn.Parameter(torch.zeros(2, 3))
    param.grad = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"fused=True, but Triton kernels run on CUDA.*not on cpu"):
        NorMuon([param], fused=True).step()
    with pytest.raises(ValueError, match="fused='yes' must be True or False"):
        NorMuon([param], fused="yes")
    assert not param.any(), "nothing has moved"


def test_float64_is_not_fused(kernels):
    param = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="float64"):
        NorMuon([param], fused=True).step()
    NorMuon([param]).step()
    assert param.all()


def test_the_products_say_where_they_were_measured(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(fused_module, "why_not_fused", lambda device_type: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "this device has 8.0" in fused_module.why_not_symmetric(cuda, torch.bfloat16)
    assert "not float32" in fused_module.why_not_symmetric(cuda, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fused_module.why_not_symmetric(cuda, torch.float16) is None


class OneRun:
    """A matrix of 2 rows and 3 columns."""

    count = 1

    def layout_in(self, local, rows, cols):
        return 0, rows * cols, *local.stride()


def test_addresses_are_found_anew_when_tensors_move():
    book = AddressBook([OneRun(), OneRun()], 2, 3)
    tensors = [torch.zeros(2, 3), torch.zeros(2, 3)]
    first = book.of("weight", tensors)
    assert first.table_K.tolist() == [tensor.data_ptr() for tensor in tensors]
    assert book.of("weight", tensors) is first
    moved = [tensors[0], torch.zeros(2, 3)]
    assert book.of("weight", moved).table_K.tolist() == [tensor.data_ptr() for tensor in moved]
    assert book.of("weight", [tensors[0], None]).table_K.tolist() == [tensors[0].data_ptr(), 0]
    assert book.of("weight", [None, None]) is None
    assert book.of("weight", [tensors[0], torch.zeros(3, 2).T]) is None, "other strides"
    assert book.of("weight", [tensors[0], tensors[1].half()]) is None, "another dtype"
