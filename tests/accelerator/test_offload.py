"""Parameters on the host of an accelerator: what travels, what computes where, and nothing early.

The ranks only pretend, as in `test_sharded_steps`; the streams are those of `streams`.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from importlib import import_module
from unittest import mock

import pytest
import torch
from torch import nn

from normuon import MatrixView, NorMuon
from normuon.step import local, sharded
from normuon.step.staging import Leg, Loan, Staging
from tests.accelerator import cases
from tests.accelerator.watch import Fault

MATRICES = [(16, 32)] * 4 + [(64, 16)] * 4 + [(24, 24)]
OFFLOADED = {"ns_dtype": torch.bfloat16, "ns_steps": 2, "bucket_bytes": 1024}
LOCAL = "one process"
MESHES = {LOCAL: (), "4 ranks": (4,), "HSDP": (2, 4)}


@contextmanager
def built(sizes, *, dtype=torch.float32, **options):
    """An optimizer of parameters on the host."""
    from tests.accelerator.device import NAME, FakeDevices, pretended_mesh, sharded

    def param(shape):
        if mesh is None:
            return nn.Parameter(torch.empty(shape, device="cpu", dtype=dtype))
        return nn.Parameter(sharded(shape, mesh, dtype).to("cpu"))

    with pretended_mesh(sizes) if sizes else nullcontext() as mesh, FakeDevices():
        groups = [
            {"params": [param(shape) for shape in MATRICES]},
            {"params": [param((4, 16, 32))], "view": MatrixView.experts()},
            {"params": [param((32,))], "algorithm": "adamw"},
        ]
        given = {} if sizes else {"compute_device": NAME}
        yield NorMuon(groups, lr=1e-3, **{**OFFLOADED, **given, **options})


def stepped(sizes, *, missing=((), (), ()), measures=False, **options):
    """The races of the last step, where all tensors of the optimizer are, and what it steps."""
    from tests.accelerator.streams import Races, streams

    with streams() as line, built(sizes, **options) as optimizer:
        optimizer.record_statistics(every=int(measures))
        for step, without in enumerate(missing):
            cases.set_gradients(optimizer, missing=without)
            races = Races(line)
            with races if step else nullcontext():
                optimizer.step()
        params = cases.all_params(optimizer)
        kept = [getattr(t, "_local_tensor", t) for p in params for t in optimizer.state[p].values()]
        local_params = [getattr(p, "_local_tensor", p) for p in params]
        return {
            "up": races.bytes_up,
            "down": races.bytes_down,
            "waits": races.host_waits,
            "products": races.products,
            "devices": {t.device.type for t in (*kept, *local_params)},
            "elements": sum(p.numel() for p in local_params if p.ndim > 1),
        }


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_matrices_travel_once_each_way_and_are_multiplied_on_the_accelerator(on_accelerator, sizes):
    found = on_accelerator(stepped, sizes)
    assert found["products"] == {"faked"}
    assert found["devices"] == {"cpu"}, "parameters and state stay on the host"
    # Each rank sends up what it stores, once, in the wire dtype; with HSDP only one of two copies
    # of a matrix goes to its owner, and both come back.
    assert found["down"][torch.bfloat16] == 2 * found["elements"]
    if sizes == (2, 4):
        assert 0 < found["up"][torch.bfloat16] <= 2 * found["elements"]
    else:
        assert found["up"][torch.bfloat16] == 2 * found["elements"]
    assert found["waits"] == []


OPTIONS = [
    {"skip_nonfinite": True},
    {"dtype": torch.bfloat16, "kahan_sum": True, "skip_nonfinite": True},
    {"momentum_dtype": torch.bfloat16},
    {"momentum_dtype": torch.int8, "skip_nonfinite": True},
    {"neuron_axis": "short", "equilibrate": True},
    {"missing": [(), (), (0, 5), (0, 5)]},
    {"bucket_bytes": 1},
    {"bucket_bytes": 2**20},
]


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_option_lets_a_stream_run_ahead(on_accelerator, sizes, options):
    found = on_accelerator(stepped, sizes, **options)
    assert found["products"] == {"faked"}
    assert found["waits"] == []


def planted(sizes, fault):
    with FAULTS[fault]():
        stepped(sizes, bucket_bytes=1)


def forgets_to_join():
    return mock.patch.object(Leg, "join", return_value=None)


def forgets_to_wait():
    return mock.patch.object(Loan, "wait", return_value=None)


def comes_down_at_once():
    """The way down does not wait for what computes."""

    def enter(leg):
        if leg._side is not None:
            leg._context = leg._streams.stream(leg._side)
            leg._context.__enter__()
        return leg

    return mock.patch.object(Leg, "__enter__", enter)


@contextmanager
def uses_memory_at_once():
    """Host memory is written to again while it is still copied from."""

    def wait(loan):
        loan._staging._copied[loan._name].synchronize()

    with (
        mock.patch.object(local, "NUM_SLOTS", 1),
        mock.patch.object(local, "MOST_STAGED_BYTES", 1),
        mock.patch.object(sharded, "NUM_SLOTS", 1),
        mock.patch.object(Staging, "wait_for", return_value=None),
        mock.patch.object(Loan, "wait", wait),
    ):
        yield


@contextmanager
def lets_matrices_go():
    """The device's memory is let go when the way home has begun."""
    bring = sharded.ShardedStep._bring_home

    def brought(self, number):
        bring(self, number)
        self._matrices_here[number] = []

    with mock.patch.object(sharded.ShardedStep, "_bring_home", brought):
        yield


def multiplies_on_the_host():
    module = import_module("normuon.step.owners")
    given = module.orthogonalize_

    def wrong(direction_BMN, *args, **kwargs):
        torch.mm(torch.empty(2, 2, device="cpu"), torch.empty(2, 2, device="cpu"))
        return given(direction_BMN, *args, **kwargs)

    return mock.patch.object(module, "orthogonalize_", wrong)


FAULTS = {
    f.__name__: f
    for f in (
        forgets_to_join,
        forgets_to_wait,
        comes_down_at_once,
        uses_memory_at_once,
        lets_matrices_go,
    )
}
OF_SHARDS_ALONE = {"lets_matrices_go"}


@pytest.mark.parametrize("sizes", [(), (4,)], ids=[LOCAL, "4 ranks"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_race_is_found(on_accelerator, fault, sizes):
    if not sizes and fault in OF_SHARDS_ALONE:
        pytest.skip("of shards alone")
    with pytest.raises(Fault, match=r"may not have|still needs"):
        on_accelerator(planted, sizes, fault)


def step_with_products_on_the_host():
    with multiplies_on_the_host():
        return stepped((4,))["products"]


def test_a_product_on_the_host_is_seen(on_accelerator):
    assert on_accelerator(step_with_products_on_the_host) == {"faked", "cpu"}


def errors():
    """What an optimizer says of a device that its parameters are not taken to."""
    from tests.accelerator.device import NAME, FakeDevices, pretended_mesh, sharded

    found = []
    with FakeDevices():
        on_device = nn.Parameter(torch.empty(8, 4, device=NAME))
        try:
            NorMuon([{"params": [("w", on_device)]}], compute_device="cpu")
        except ValueError as error:
            found.append(str(error))
    with pretended_mesh((2,)) as mesh, FakeDevices():
        shard = nn.Parameter(sharded((8, 4), mesh, torch.float32).to("cpu"))
        try:
            NorMuon([{"params": [("w", shard)]}], compute_device="cpu")
        except ValueError as error:
            found.append(str(error))
        optimizer = NorMuon([{"params": [("w", shard)]}], fused=True)
        shard.grad = torch.empty_like(shard).detach()
        try:
            optimizer.step()
        except ValueError as error:
            found.append(str(error))
        other = nn.Parameter(torch.empty(8, 4, device="cpu"))
        group = {"params": [("b", other)], "process_group": mesh.get_group()}
        optimizer = NorMuon([{"params": [("w", shard)]}, group])
        for param in (shard, other):
            param.grad = torch.empty_like(param).detach()
        try:
            optimizer.step()
        except ValueError as error:
            found.append(str(error))
    return found


def test_other_devices_are_refused(on_accelerator):
    assert on_accelerator(errors) == [
        "w [8, 4]: compute_device='cpu', but the parameter is on faked:0; this option is for "
        "parameters on the host: leave compute_device=None",
        "w [8, 4]: compute_device='cpu', but the parameter's mesh has faked devices; leave "
        "compute_device=None",
        "w [8, 4]: fused=True, but Triton kernels run on CUDA devices, not on cpu; fused=None "
        "fuses where possible",
        "b [8, 4]: its group computes on cpu, but other parameters of the same ranks on faked:0; "
        "give all groups one compute_device",
    ]
