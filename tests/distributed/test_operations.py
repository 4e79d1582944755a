"""How many device operations a sharded step takes, and that a CUDA graph could hold them.

The ranks pretend: their collectives return at once. Nothing here looks at values.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from normuon import NorMuon
from normuon.step import flags

HOST_READS = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.is_nonzero.default"}


class Operations(TorchDispatchMode):
    """What is called, in order."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def built(mesh, num_layers, **options):
    def sharded(*shape):
        whole = torch.randn(shape)
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

    shapes = [(16, 16), (16, 16), (32, 16), (16, 32)] * num_layers
    matrices = [nn.Parameter(sharded(*shape)) for shape in shapes]
    vectors = [nn.Parameter(sharded(16)) for _ in range(num_layers)]
    for param in (*matrices, *vectors):
        param.grad = sharded(*param.shape)
    groups = [{"params": matrices}, {"params": vectors, "algorithm": "adamw"}]
    return NorMuon(groups, ns_dtype=torch.float32, **options)


def operations_of_a_step(optimizer):
    with Operations() as operations:
        optimizer.step()
    return operations.calls


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"nesterov": False}], ids=str)
def test_steady_steps_read_nothing_on_the_host_and_repeat_one_list_of_operations(
    mesh, options, monkeypatch
):
    """What a CUDA graph needs: the same operations, no host read, rates as tensors."""
    # The reads that find mistakes are for CPUs, where reading is free.
    monkeypatch.setattr(flags, "reading_is_free", lambda device: False)
    lr, decay = torch.tensor(1e-3), torch.tensor(0.1)
    optimizer = built(mesh, 3, lr=lr, weight_decay=decay, **options)
    for _ in range(3):
        optimizer.step()
    first = operations_of_a_step(optimizer)
    lr.fill_(5e-4)
    decay.fill_(0.05)
    assert operations_of_a_step(optimizer) == first
    assert not HOST_READS & set(first)


def test_operations_do_not_grow_with_the_number_of_matrices(mesh):
    counts = []
    for num_layers in (2, 8):
        optimizer = built(mesh, num_layers)
        for _ in range(3):
            optimizer.step()
        calls = operations_of_a_step(optimizer)
        changing = [call for call in calls if "_foreach" in call or "mm" in call]
        counts.append(len(changing))
    assert counts[0] == counts[1] > 0
