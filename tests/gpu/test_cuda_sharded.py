"""A sharded step on a CUDA device: its values on one rank, its launches on one of four."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from normuon import NorMuon, param_groups
from tests.gpu.conftest import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(64, 128), (64, 128), (128, 64), (96, 96), (50, 30), (64,)]
OPTIONS = [
    {},
    {"skip_nonfinite": True},
    {"momentum_dtype": torch.int8},
    {"neuron_axis": "short", "equilibrate": True, "cautious_weight_decay": True},
]


def sharded(mesh):
    """Parameters of rows and their optimizer's groups; whole gradients differ from rank to rank."""
    params = []
    for shape in SHAPES:
        local = distribute_tensor(
            torch.randn(shape, device="cuda"), mesh, [Shard(0)], src_data_rank=None
        )
        params.append(nn.Parameter(local))
        params[-1].grad = torch.zeros_like(params[-1])
    return params, [{"params": params[:-1]}, {"params": params[-1:], "algorithm": "adamw"}]


def fill_gradients(params):
    for param in params:
        param.grad.to_local().normal_()


def test_fsdp2_takes_the_step_of_one_device(one_rank):
    torch.manual_seed(0)
    plain, shared = (
        nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).cuda() for _ in range(2)
    )
    shared.load_state_dict(plain.state_dict())
    fully_shard(shared, mesh=one_rank)
    options = {"lr": 1e-3, "ns_dtype": torch.float32, "ns_backend": "eager"}
    pair = [(m, NorMuon(param_groups(m), **options)) for m in (plain, shared)]
    for step in range(3):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step)).cuda()
        for model, optimizer in pair:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(plain.parameters(), shared.parameters(), strict=True):
        assert isinstance(b, DTensor)
        # Three steps of RMS 2e-4; the gradients are those of the same kernels.
        torch.testing.assert_close(b.full_tensor(), a.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_rank_never_waits_for_the_device(rank_of_four, options):
    params, groups = sharded(rank_of_four)
    optimizer = NorMuon(groups, lr=torch.tensor(1e-3, device="cuda"), **options)
    for _ in range(2):
        fill_gradients(params)
        optimizer.step()
    with no_waiting():
        optimizer.step()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_rank_replays_as_the_eager_one(one_rank, options):
    """The whole sharded step with its collectives in one graph."""
    torch.manual_seed(0)
    (eager, groups), (captured, others) = sharded(one_rank), sharded(one_rank)
    with torch.no_grad():
        for one, other in zip(eager, captured, strict=True):
            other.to_local().copy_(one.to_local())
    plain, recorded = (
        NorMuon(one, lr=1e-3, ns_dtype=torch.float32, ns_backend="eager", **options)
        for one in (groups, others)
    )

    def take():
        fill_gradients(eager)
        for one, other in zip(eager, captured, strict=True):
            other.grad.to_local().copy_(one.grad.to_local())
        plain.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            take()
            recorded.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # NCCL's own threads must be free to ask the device while this one records.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        recorded.step()
    for _ in range(3):
        take()
        graph.replay()
    for expected, actual in zip(eager, captured, strict=True):
        torch.testing.assert_close(actual.to_local(), expected.to_local(), rtol=1e-5, atol=1e-6)
