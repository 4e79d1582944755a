"""Sharded parameters on an accelerator: no step waits, whatever the ranks and options.

The ranks only pretend: this shows what rank 0 does between its collectives, not what they carry.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from normuon.distributed.cost import CostModel
from normuon.step.shared_params import SharedParams
from tests.accelerator import cases

MESHES = {"4 ranks": (4,), "16 ranks": (16,), "HSDP": (2, 4)}

OPTIONS = [
    {"skip_nonfinite": True},
    {"nesterov": False, "equilibrate": True, "cautious_weight_decay": True},
    {"maximize": True, "adjust_lr_fn": "original", "neuron_axis": "short"},
    {"algorithm": "muon", "orthogonalizer": "newton_schulz"},
    {"orthogonalizer": "callable"},
    {"dtype": torch.bfloat16, "kahan_sum": True},
    {"dtype": torch.bfloat16, "kahan_sum": True, "skip_nonfinite": True, "lr": "device"},
    {"momentum_dtype": torch.bfloat16, "ns_dtype": torch.bfloat16},
    {"momentum_dtype": torch.int8, "all_kinds": True},
    {"momentum_dtype": torch.int8, "skip_nonfinite": True, "dtype": torch.bfloat16},
    {"lr": "device of one dim", "weight_decay": "device of one dim"},
    {"lr": "host", "weight_decay": "host", "skip_nonfinite": True},
    {"bucket_bytes": 1, "max_scratch_bytes": 1},
    {"balance": "paper"},
]


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_no_mesh_makes_a_step_wait(on_accelerator, sizes):
    on_accelerator(cases.step_optimizer, {"mesh_sizes": sizes, "all_kinds": True})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_option_makes_a_sharded_step_wait(on_accelerator, options):
    on_accelerator(cases.step_optimizer, {"mesh_sizes": (2, 4), **options})


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}], ids=str)
def test_copies_under_a_process_group_step_without_a_wait(on_accelerator, options):
    on_accelerator(cases.step_optimizer, {"mesh_sizes": (4,), "copies": True, **options})


def step_with_teams(**options):
    """Steps two matrices on four ranks; returns in how many slabs teams divide them."""
    free = CostModel(
        flops_per_second=1.0, bytes_per_second=1e18, latency_seconds=0.0, node_latency_seconds=0.0
    )
    exchanges_cost_nothing = mock.patch.object(SharedParams, "cost_model", return_value=free)
    with (
        exchanges_cost_nothing,
        cases.built(mesh_sizes=(4,), teams="auto", **options) as optimizer,
    ):
        cases.watch_steps(optimizer, is_sharded=True)
        (sharded,) = optimizer._sharded_steps
        return sum(task.slab is not None for task in sharded.plan.tasks)


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}], ids=str)
def test_teams_divide_a_matrix_without_a_wait(on_accelerator, options):
    assert on_accelerator(step_with_teams, **options) > 2


def steps_with_missing_gradients(**options):
    """Where each step copied something from the host."""
    missing = [(), (0, 2), (0, 2), (), (), (0, 1, 2, 3)]
    with cases.built(mesh_sizes=(4,), **options) as optimizer:
        watches = cases.watch_steps(
            optimizer, is_sharded=True, missing=missing, may_copy_from_host=True
        )
    return [watch.host_copies for watch in watches]


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}], ids=str)
def test_gradients_come_and_go_with_one_small_copy(on_accelerator, options):
    """Nothing is read, and only the step at which they come or go copies the flags that say so."""
    copies = on_accelerator(steps_with_missing_gradients, **options)
    assert [len(places) for places in copies] == [0, 1, 0, 1, 0, 1]
    assert all("flags.py" in place for places in copies for place in places)
