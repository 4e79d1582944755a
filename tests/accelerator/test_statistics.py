"""A step that is measured waits for nothing either, and only the question for numbers does."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from normuon.step import figures, local, order, shared_record
from tests.accelerator import cases
from tests.accelerator.test_offload import MESHES as OFFLOADED_MESHES
from tests.accelerator.test_offload import OPTIONS as OFFLOADED_OPTIONS
from tests.accelerator.watch import Fault, Watch

BFLOAT16 = {"dtype": torch.bfloat16}

OPTIONS = [
    {"all_kinds": True, "skip_nonfinite": True},
    {"neuron_axis": "short", "equilibrate": True, "all_kinds": True},
    {"algorithm": "muon", "adjust_lr_fn": "original"},
    {"orthogonalizer": "callable", "fused": False},
    {"orthogonalizer": "gram", "ns_dtype": torch.bfloat16},
    {**BFLOAT16, "kahan_sum": True, "skip_nonfinite": True, "lr": "device"},
    {"lr": "device of one dim", "weight_decay": "device of one dim"},
    {"lr": "host", "weight_decay": "host", "skip_nonfinite": True},
    {"max_scratch_bytes": 1, "momentum_dtype": torch.bfloat16},
]
MESHES = {"one process": (), "4 ranks": (4,), "HSDP": (2, 4)}


def step_measured(case):
    """Steps that are measured, under watch, and the figures after them, still on the device."""
    with cases.built(**case) as optimizer:
        optimizer.record_statistics(every=1)
        cases.watch_steps(optimizer, is_sharded=bool(case.get("mesh_sizes")))
        return asked_under_watch(optimizer)


def asked_under_watch(optimizer):
    """Which step was measured last, and where its figures are."""
    with Watch():
        statistics = optimizer.statistics()
        values = [*statistics.groups.values(), *statistics.matrices.values()]
    return statistics.step, {v.device.type for figures in values for v in figures.values()}


@pytest.mark.parametrize("sizes", [(), (2, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_measured_step_waits_or_keeps_anything(on_accelerator, sizes, options):
    step, devices = on_accelerator(step_measured, {"mesh_sizes": sizes, **options})
    assert step == 4
    assert devices == {"faked"}


def test_copies_under_a_process_group_are_measured_without_a_wait(on_accelerator):
    case = {"mesh_sizes": (4,), "copies": True, "skip_nonfinite": True}
    assert on_accelerator(step_measured, case)[0] == 4


def step_measured_with_missing_gradients():
    """What is kept of a step is the numbers of the rows of those that had gradients."""
    with cases.built(skip_nonfinite=True) as optimizer:
        optimizer.record_statistics(every=2)
        for missing in [(0, 2), (), (), (0, 2), (1, 3), ()]:
            cases.set_gradients(optimizer, missing=missing)
            with Watch():
                optimizer.step()
        return asked_under_watch(optimizer)


def test_gradients_come_and_go_at_measured_steps(on_accelerator):
    assert on_accelerator(step_measured_with_missing_gradients) == (5, {"faked"})


def operations(every, case):
    """Operations of the third step, counted."""
    with cases.built(**case) as optimizer:
        if every is not None:
            optimizer.record_statistics(every)
        count = Counting()
        for step in range(3):
            cases.set_gradients(optimizer)
            if step == 2:
                with count:
                    optimizer.step()
            else:
                optimizer.step()
        return count.operations


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of all operations."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented
        self.operations.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_a_step_that_is_not_measured_issues_no_operation_more(on_accelerator, sizes):
    case = {"mesh_sizes": sizes, "skip_nonfinite": True}
    never = on_accelerator(operations, None, case)
    assert on_accelerator(operations, 0, case) == never
    assert on_accelerator(operations, 4, case) == never
    measured = on_accelerator(operations, 2, case)
    assert len(measured) > len(never)
    reduced = [name for name in measured if "allreduce_" in name]
    assert len(reduced) == len([name for name in never if "allreduce_" in name]) + bool(sizes)


def ask_for_numbers():
    with cases.built() as optimizer:
        optimizer.record_statistics()
        cases.set_gradients(optimizer)
        optimizer.step()
        statistics = optimizer.statistics()
        with Watch():
            statistics.to_dict()


def test_the_question_for_numbers_is_what_waits(on_accelerator):
    with pytest.raises(Fault, match="copies to the host and waits"):
        on_accelerator(ask_for_numbers)


def read_row_norms(x_BMN):
    norm_BM = figures.row_norms(x_BMN)
    if isinstance(_get_current_dispatch_mode(), Watch):  # The first step of ranks is not watched.
        norm_BM.max().item()
    return norm_BM


def write_from_host(table, first, count, state):
    table[first, 0].copy_(torch.tensor(0.5, device="cpu"))


PLANTED = {
    "a value is read": (order, "row_norms", read_row_norms, "reads a value on the host"),
    "a number of the host is written": (
        shared_record,
        "write_skipped_",
        write_from_host,
        "of the host",
    ),
}


def plant(fault, sizes):
    """Measured steps with something in them that would wait."""
    module, name, planted, _ = PLANTED[fault]
    given = getattr(module, name)
    setattr(module, name, planted)
    try:
        step_measured({"mesh_sizes": sizes, "skip_nonfinite": True})
    finally:
        setattr(module, name, given)


@pytest.mark.parametrize(
    ("fault", "sizes"),
    [("a value is read", ()), ("a value is read", (4,)), ("a number of the host is written", (4,))],
)
def test_a_fault_planted_into_the_measuring_is_found(on_accelerator, fault, sizes):
    with pytest.raises(Fault, match=PLANTED[fault][-1]):
        on_accelerator(plant, fault, sizes)


def kept_by(rows_of_batch):
    """Measured steps whose rows stay where nobody needs them."""
    kept = []

    def note_(batch, update, rows):
        kept.append(update.figures)
        given(batch, update, rows)

    given, local._note_ = local._note_, note_
    try:
        step_measured({})
    finally:
        local._note_ = given


def test_figures_that_are_kept_are_found(on_accelerator):
    with pytest.raises(Fault, match=r"new tensor\(s\) kept after the step: .*figures.py"):
        on_accelerator(kept_by, None)


@pytest.mark.parametrize("sizes", OFFLOADED_MESHES.values(), ids=OFFLOADED_MESHES)
@pytest.mark.parametrize("options", [{}, *OFFLOADED_OPTIONS[:4]], ids=str)
def test_offloaded_parameters_are_measured_and_no_stream_runs_ahead(on_accelerator, sizes, options):
    from tests.accelerator import test_offload

    found = on_accelerator(test_offload.stepped, sizes, measures=True, **options)
    assert found["products"] == {"faked"}
    assert found["waits"] == []
