"""What the passes over memory move, counted operation by operation, beside the table of it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normuon import NorMuon
from normuon_lab.bench.traffic import elementwise_bytes
from tests.interpreted import interpreted_kernels

ROWS, COLS = 256, 192
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}
OVERWRITES = {"aten::copy_", "aten::_foreach_copy_"}


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write of tensors as large as the matrix; products left out."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        self.pauses = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        name = func._schema.name
        if (
            self.pauses
            or func.is_view
            or name in PRODUCTS
            or name.startswith(("aten::empty", "aten::detach"))
        ):
            return results
        given = {**dict(zip([a.name for a in func._schema.arguments], args)), **(kwargs or {})}  # noqa: B905
        mutated = False
        for argument in func._schema.arguments:
            num_bytes = self._bytes(given.get(argument.name))
            written = argument.alias_info is not None and argument.alias_info.is_write
            mutated |= written
            if written:
                self.moved += num_bytes
            if not (written and (name in OVERWRITES or argument.name == "out")):
                self.moved += num_bytes
        if not mutated:
            self.moved += self._bytes(results)
        return results

    def _bytes(self, values) -> int:
        tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
        return sum(x.numel() * x.itemsize for x in tensors if x.numel() >= ROWS * COLS)


def steady_traffic(step) -> int:
    """Of the second step."""
    step()
    with Traffic() as traffic:
        step()
    return traffic.moved


def stepped(device, **options):
    param = nn.Parameter(torch.randn(ROWS, COLS, device=device))
    param.grad = torch.randn(ROWS, COLS, device=device)
    # Plain: its squares are the products' own.
    return NorMuon([param], orthogonalizer="newton_schulz", **options).step


def test_torchs_operations_move_what_the_table_says():
    """On a device without values, which takes an accelerator's way."""
    found = steady_traffic(stepped("meta", ns_dtype=torch.bfloat16, ns_backend="eager"))
    assert found == elementwise_bytes(ROWS, COLS, fused=False)["moved"]


def test_the_kernels_move_what_the_table_says():
    """Loads and stores of Triton's interpreter, and torch's operations between the kernels."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    counted = {"bytes": 0}

    def count(mask, pointers):
        if pointers.data.size >= 64:  # Tables and factors are small beside matrices.
            element = pointers.get_element_ty().primitive_bitwidth // 8
            counted["bytes"] += int(mask.data.sum()) * element

    def counting_load(self, ptrs, mask, *args):
        count(mask, ptrs)
        return load(self, ptrs, mask, *args)

    def counting_store(self, ptrs, value, mask, *args):
        count(mask, ptrs)
        return store(self, ptrs, value, mask, *args)

    launch, traffic = interpreter.GridExecutor.__call__, Traffic()

    def uncounted_launch(*args, **kwargs):
        """The interpreter's own copies of tensors are no traffic."""
        traffic.pauses = True
        launch(*args, **kwargs)
        traffic.pauses = False

    with interpreted_kernels():
        step = stepped("cpu", ns_dtype=torch.float32, ns_backend="eager", fused=True)
        step()
        with (
            mock.patch.object(builder, "create_masked_load", counting_load),
            mock.patch.object(builder, "create_masked_store", counting_store),
            mock.patch.object(interpreter.GridExecutor, "__call__", uncounted_launch),
            traffic,
        ):
            step()
    expected = elementwise_bytes(ROWS, COLS, fused=True, ns_bytes=4)["moved"]
    assert expected <= counted["bytes"] + traffic.moved <= 1.03 * expected


def test_the_kernels_stay_within_their_budget():
    """Bytes over the least that any step must move."""
    fused, plain = (elementwise_bytes(1, 1, fused=fused) for fused in (True, False))
    assert fused["moved"] / fused["least"] <= 1.3
    assert plain["moved"] / plain["least"] > 4
