"""Parameters on the host, orthogonalised on a CUDA device: the same step, nothing read early."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normuon import MatrixView, NorMuon, param_groups
from normuon.step import local
from normuon.step.staging import Loan
from tests.gpu.conftest import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(64, 128), (64, 128), (128, 64), (96, 96), (3, 48, 64), (64, 128), (64,)]
STEPS = 3
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}


class Products(TorchDispatchMode):
    """Notes on which devices matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func._schema.name in PRODUCTS:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.devices |= {t.device.type for t in tensors}
        return func(*args, **(kwargs or {}))


def params_and_optimizer(device, *, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES
    ]
    groups = [
        {"params": params[:4]},
        {"params": params[4:5], "view": MatrixView.experts()},
        {"params": params[5:6], "algorithm": "muon"},
        {"params": params[6:], "algorithm": "adamw", "cautious_weight_decay": False},
    ]
    return params, NorMuon(groups, lr=1e-3, **options)


def set_gradients(params, step, *, poisoned=False):
    generator = torch.Generator().manual_seed(1 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator)
        if poisoned and step == 1 and param is params[0]:
            grad[0, 0] = float("nan")
        param.grad = grad.to(param.device, param.dtype)


def trained(device, **options):
    params, optimizer = params_and_optimizer(device, **options)
    for step in range(STEPS):
        set_gradients(params, step, poisoned=bool(options.get("skip_nonfinite")))
        optimizer.step()
    return [{"weight": p.detach().cpu(), **optimizer.state[p]} for p in params]


OPTIONS = [
    {},
    {"skip_nonfinite": True},
    {"momentum_dtype": torch.bfloat16},
    {"neuron_axis": "short", "equilibrate": True, "nesterov": False},
]


@pytest.mark.parametrize("most_bytes", [1, local.MOST_STAGED_BYTES])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_step_is_that_of_parameters_on_the_device(monkeypatch, options, most_bytes):
    """float32 on both; one matrix at a time, so that three are on the way at once, or all."""
    monkeypatch.setattr(local, "MOST_STAGED_BYTES", most_bytes)
    options = {"ns_dtype": torch.float32, "ns_backend": "eager", **options}
    there = trained("cuda", fused=False, **options)
    here = trained("cpu", compute_device="cuda", **options)
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value.device.type == "cpu", "parameters and state stay on the host"
            # Three steps of RMS 2e-4 whose sums are taken in other orders; TF32 is off.
            torch.testing.assert_close(value, b[key].cpu(), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_what_a_cuda_device_computes_in():
    """The default dtype is the computing device's.

    Directions that are rounded to another neighbour change O by about 1%, and its largest entries
    are some 5 times the RMS: 3 steps of 2e-4 differ by 3e-5 there.
    """
    here, there = trained("cpu", compute_device="cuda"), trained("cuda")
    exact = trained("cpu", compute_device="cuda", ns_dtype=torch.float32)
    for a, b, c in zip(here, there, exact, strict=True):
        torch.testing.assert_close(a["weight"], b["weight"], rtol=0, atol=1e-4)
        if a["weight"].ndim > 1:
            assert not torch.equal(a["weight"], c["weight"])


def test_products_run_on_the_device():
    params, optimizer = params_and_optimizer("cpu", compute_device="cuda")
    set_gradients(params, 0)
    with Products() as products:
        optimizer.step()
    assert products.devices == {"cuda"}


def test_a_step_makes_no_other_waits_than_for_what_comes_down():
    """Waits for an event are not counted; a copy of unpinned memory or a read would be."""
    params, optimizer = params_and_optimizer("cpu", compute_device="cuda", skip_nonfinite=True)
    set_gradients(params, 0)
    optimizer.step()
    set_gradients(params, 1)
    with no_waiting():
        optimizer.step()
    (staging,) = optimizer._stagings._made.values()
    assert all(memory.is_pinned() for memory in staging._memory.values())


def slow(x_BMN):
    """An orthogonaliser that the host is long ahead of."""
    torch.cuda._sleep(50_000_000)
    return x_BMN * 2


def test_a_copy_that_is_not_waited_for_is_found():
    options = {"compute_device": "cuda", "orthogonalizer": slow, "ns_dtype": torch.float32}
    right = trained("cpu", **options)
    with mock.patch.object(Loan, "wait", return_value=None):
        wrong = trained("cpu", **options)
    torch.cuda.synchronize()
    again = trained("cpu", **options)
    assert all(torch.equal(a["weight"], b["weight"]) for a, b in zip(right, again, strict=True))
    assert not torch.equal(right[0]["weight"], wrong[0]["weight"])


def model_on(device):
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)]
    return nn.Sequential(*layers).to(device)


def test_fsdp2_with_cpu_offload_takes_the_step_of_the_device(one_rank):
    plain, offloaded = model_on("cuda"), model_on("cuda")
    for layer in offloaded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=one_rank, offload_policy=CPUOffloadPolicy())
    fully_shard(offloaded, mesh=one_rank, offload_policy=CPUOffloadPolicy())
    options = {"lr": 1e-3, "ns_dtype": torch.float32, "ns_backend": "eager"}
    alone = NorMuon(param_groups(plain), fused=False, **options)
    sharded = NorMuon(param_groups(offloaded), **options)
    products = Products()
    for step in range(STEPS):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step)).cuda()
        for model, optimizer in ((plain, alone), (offloaded, sharded)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
        alone.step()
        with products:
            sharded.step()
    assert products.devices == {"cuda"}
    for a, b in zip(plain.parameters(), offloaded.parameters(), strict=True):
        assert isinstance(b, DTensor)
        assert b.to_local().is_cpu
        assert all(t.to_local().is_cpu for t in sharded.state[b].values() if isinstance(t, DTensor))
        # Three steps of RMS 2e-4; the gradients are those of the same kernels.
        torch.testing.assert_close(b.to_local(), a.detach().cpu(), rtol=0, atol=1e-5)
    saved = sharded.state_dict()
    sharded.load_state_dict(saved)
    assert all(t.device.type == "cpu" for s in sharded.state.values() for t in s.values())
