"""The library's Triton kernels on a CUDA device, beside torch's own operations there."""

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
from normuon.orthogonalize.fused import symmetric_product_fused, why_not_symmetric

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

JORDAN = resolve_coefficients("jordan", 5)
SHAPES = [(40, 72), (40, 72), (72, 40), (33, 33), (1, 9), (700, 515), (256, 1024)]
MULTIPLIES_SYMMETRIC = torch.cuda.is_available() and (
    why_not_symmetric(torch.device("cuda"), torch.bfloat16) is None
)


def trained(fused, *, shapes=SHAPES, dtype=torch.float32, view=None, rate=1e-2, **options):
    """Parameters, and all of their state, after three steps."""
    numbers = torch.Generator("cuda").manual_seed(1)

    def normal(shape):
        return torch.randn(shape, generator=numbers, device="cuda").to(dtype)

    params = [nn.Parameter(normal(shape) / 10) for shape in shapes]
    group = {"params": params, **({"view": view} if view else {})}
    options = {"ns_dtype": torch.float32, "ns_backend": "eager", **options}
    optimizer = NorMuon([group], lr=rate, fused=fused, **options)
    for _ in range(3):
        for param in params:
            param.grad = normal(param.shape)
        optimizer.step()
    return [(param, optimizer.state[param]) for param in params]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False},
        {"maximize": True},
        {"momentum": 0.3},
        {"cautious_weight_decay": True},
        {"skip_nonfinite": True},
        {"adjust_lr_fn": "original", "neuron_axis": "short"},
        {"equilibrate": True},
        {"max_scratch_bytes": 1},
        {"momentum_dtype": torch.bfloat16},
        {"view": MatrixView.conv(), "shapes": [(16, 3, 5, 5)] * 2},
        {"view": MatrixView.experts(), "shapes": [(4, 24, 32)] * 2},
        {"view": MatrixView(neuron_dim=1), "shapes": [(96, 200)] * 2},
        {"view": MatrixView(blocks=(16, 8, 8)), "shapes": [(32, 24)] * 2},
    ],
    ids=str,
)
def test_a_fused_step_is_the_step(options):
    # A step whose last bit turns its sign decays a weight, or does not: lr times 0.1 of it.
    turned = 1e-3 if options.get("cautious_weight_decay") else 0
    for (ours, our_state), (theirs, their_state) in zip(
        trained(True, **options), trained(False, **options), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=turned, atol=2e-6)
        for name, value in our_state.items():
            rtol = 1e-2 if value.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(value, their_state[name], rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kahan_sum", [False, True])
def test_half_precision_weights(dtype, kahan_sum):
    """Equal but where a last bit of a weight is rounded the other way."""

    def sums(fused):
        pairs = trained(fused, dtype=dtype, kahan_sum=kahan_sum)
        return [p.float() + s.get("weight_residual", torch.zeros_like(p)).float() for p, s in pairs]

    for ours, theirs in zip(sums(True), sums(False), strict=True):
        ulp = torch.finfo(dtype).eps * theirs.abs() * (1 / 32 if kahan_sum else 2)
        assert ((ours - theirs).abs() <= ulp + 1e-4).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 0.0])
def test_the_scale_of_gradients_does_not_matter(scale):
    x = torch.randn(2, 70, 1100, device="cuda") * scale
    expected = normalize_frobenius(x.clone(), dtype=torch.float32)
    found = normalize_frobenius(x.clone(), dtype=torch.float32, workspace=Workspace())
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not MULTIPLIES_SYMMETRIC, reason="the symmetric product does not run here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (1024, 1024), (1100, 3000), (2050, 2049)])
@pytest.mark.parametrize("tall", [False, True])
def test_a_symmetric_product(shape, dtype, tall):
    side = min(shape)
    x = torch.randn(2, side, max(shape), device="cuda")
    # Rows of norm 1: small numbers would be rounded to float16's subnormal ones.
    x = (normalize_frobenius(x, dtype=torch.float32) * side**0.5).to(dtype)
    wide = x.mT.contiguous().mT if tall else x
    nowhere = torch.full((2, side, side), torch.nan, dtype=dtype, device="cuda")
    r = symmetric_product_fused(wide, wide.mT, out=nowhere)
    exact = x.double() @ x.double().mT
    eps = torch.finfo(dtype).eps
    assert torch.linalg.norm(r.double() - exact) <= eps * torch.linalg.norm(exact)
    z = symmetric_product_fused(r, r, add=r, beta=0.5, alpha=0.3)
    exact = 0.5 * r.double() + 0.3 * r.double() @ r.double()
    assert torch.linalg.norm(z.double() - exact) <= eps * torch.linalg.norm(exact)
    assert torch.equal(z, z.mT), "halves are equal bit by bit"


@pytest.mark.skipif(not MULTIPLIES_SYMMETRIC, reason="the symmetric product does not run here")
@pytest.mark.parametrize("shape", [(2048, 2048), (2048, 4096), (4096, 2048)])
def test_orthogonalised_as_well_as_by_full_products(shape):
    x = torch.randn(4, *shape, device="cuda")
    exact = newton_schulz(normalize_frobenius(x.double(), dtype=torch.float64), JORDAN)
    options = {"coefficients": JORDAN, "dtype": torch.bfloat16}

    def error(backend):
        o = orthogonalize(x, backend=backend, **options).double()
        return float(torch.linalg.norm(o - exact) / torch.linalg.norm(exact))

    # Mirrored halves share their roundings, which full products average: 1.12 on an H100.
    assert error("triton") <= 1.25 * error("eager")


def test_another_device_than_the_current_one():
    """Kernels run on the tensors' device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    param = nn.Parameter(torch.ones(8, 8, device="cuda:1"))
    param.grad = torch.randn(8, 8, device="cuda:1")
    NorMuon([param], fused=True).step()
    assert not torch.equal(param, torch.ones_like(param))


def test_a_step_whose_gradients_are_made_in_the_graph():
    """Their addresses are known only when the graph is captured."""
    numbers = torch.randn(64, 64, device="cuda")
    eager, captured = (nn.Parameter(torch.ones(64, 64, device="cuda")) for _ in range(2))
    optimizers = [NorMuon([param], lr=1e-2, ns_backend="eager") for param in (eager, captured)]

    def train(param, optimizer):
        param.grad = None
        (param * numbers).sin().sum().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for param, optimizer in zip((eager, captured), optimizers, strict=True):
                train(param, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(captured, optimizers[1])
    for _ in range(3):
        train(eager, optimizers[0])
        graph.replay()
    torch.testing.assert_close(captured, eager)
