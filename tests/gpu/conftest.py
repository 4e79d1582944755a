"""What tests of a GPU share: process groups of one process, and a watch for waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def one_rank():
    """A mesh of one rank, whose collectives are NCCL's."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=None
    )
    try:
        yield init_device_mesh("cuda", (1,))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def rank_of_four():
    """The mesh of four ranks on rank 0; its collectives return at once and write nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        yield init_device_mesh("cuda", (4,))
    finally:
        dist.destroy_process_group()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where the host waits for the device, as reading a value or a pageable copy does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
