"""Gram Newton-Schulz: the same polynomial as the plain iteration, in the FLOPs that are counted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from normuon.orthogonalize import (
    Workspace,
    flops_per_matrix,
    gram_newton_schulz,
    newton_schulz,
    normalize_frobenius,
    orthogonalize,
    resolve_coefficients,
)
from normuon.orthogonalize.flops import (
    gram_pays,
    num_panels,
    orthogonalize_flops,
    panel_starts,
    symmetric_product_flops,
)
from normuon.orthogonalize.iteration import iterate, iterate_
from normuon.orthogonalize.segments import (
    MAGNIFICATION_LIMITS,
    gram_segments,
    plain_segments,
    segments_for,
)
from normuon.orthogonalize.symmetric import symmetric_product

JORDAN = resolve_coefficients("jordan", 5)
SHAPES = [(16, 16), (16, 48), (48, 16), (1, 9), (9, 1)]


def compositions(total: int) -> list[tuple[int, ...]]:
    """All ways to cut `total` steps into segments."""
    cuts = itertools.product([False, True], repeat=total - 1)
    found = []
    for cut in cuts:
        lengths = [1]
        for here in cut:
            if here:
                lengths.append(1)
            else:
                lengths[-1] += 1
        found.append(tuple(lengths))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("segments", compositions(5), ids=str)
def test_every_cut_into_segments_is_the_same_polynomial(segments, shape):
    x = normalize_frobenius(torch.randn(2, *shape, dtype=torch.float64), dtype=torch.float64)
    expected = newton_schulz(x, JORDAN)
    # 485, the product of the slopes at zero, times some roundings of 2^-53.
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(iterate(x, JORDAN, segments=segments), expected, **close)
    in_place = iterate_(x.clone(), JORDAN, segments=segments, workspace=Workspace())
    torch.testing.assert_close(in_place, expected, **close)


@pytest.mark.parametrize("table", ["jordan", "you", "polar_express", "cans"])
def test_gram_is_the_plain_iteration(table):
    coefficients = resolve_coefficients(table, 5)
    x = normalize_frobenius(torch.randn(3, 8, 24, dtype=torch.float64), dtype=torch.float64)
    torch.testing.assert_close(
        gram_newton_schulz(x, coefficients), newton_schulz(x, coefficients), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("panels", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [8, 13, 64])
def test_panels_give_the_full_symmetric_product(size, panels):
    a = torch.randn(size, 20, dtype=torch.float64)
    add = torch.randn(size, size, dtype=torch.float64)
    add = add + add.mT
    out = symmetric_product(
        a, a.mT, add=add, beta=0.5, alpha=-2.0, panels=panels, out=torch.empty_like(add)
    )
    # 20 products of two normal numbers, added in another order.
    torch.testing.assert_close(out, 0.5 * add - 2 * a @ a.mT, rtol=0, atol=1e-12)
    for start, stop in itertools.pairwise(panel_starts(size, panels)):
        assert torch.equal(out[stop:, start:stop], out[start:stop, stop:].mT)


@pytest.mark.parametrize("panels", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("size", [5, 8, 13, 768])
def test_panels_cover_every_row_once(size, panels):
    starts = panel_starts(size, panels)
    assert starts[0] == 0
    assert starts[-1] == size
    assert all(a < b for a, b in itertools.pairwise(starts))
    assert len(starts) - 1 <= panels


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16), (600, 600), (530, 1060)])
@pytest.mark.parametrize("method", ["auto", "newton_schulz", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_flop_model_is_the_flop_count(method, shape, dtype):
    """Exactly, panels and segments included, on what the optimizer really calls."""
    x = torch.randn(2, *shape)
    options = {"coefficients": JORDAN, "dtype": dtype, "orthogonalizer": method}
    with FlopCounterMode(display=False) as counter:
        orthogonalize(x, workspace=Workspace(), **options)
    expected = flops_per_matrix(*shape, device_type="cpu", **options)
    assert counter.get_total_flops() == 2 * expected


def test_plain_flops_by_hand():
    # One step on [2, 3]: X X^T 2*2*2*3 = 24, A A 2*2*2*2 = 16, B X 24.
    assert orthogonalize_flops(2, 3, segments=[1]) == 64
    assert orthogonalize_flops(768, 768, segments=[1] * 5) == 5 * 6 * 768**3


def test_flops_do_not_depend_on_orientation():
    for segments in ([1] * 5, [3, 2], [5]):
        tall = orthogonalize_flops(3072, 768, segments=segments)
        assert tall == orthogonalize_flops(768, 3072, segments=segments)


@pytest.mark.parametrize("panels", [1, 4, 8])
@pytest.mark.parametrize("ratio", [1.0, 1.125, 1.25, 1.5, 1.75, 2.0, 4.0])
def test_auto_takes_the_cut_with_the_fewest_flops(ratio, panels):
    """Among all cuts, not only the two it chooses from."""
    s, long = 768, int(768 * ratio)
    costs = {
        cut: orthogonalize_flops(s, long, segments=cut, panels=panels) for cut in compositions(5)
    }
    chosen = segments_for("auto", s, long, coefficients=JORDAN, dtype=torch.float64, panels=panels)
    assert costs[chosen] == min(costs.values())
    assert gram_pays(s, long, panels=panels) == (len(chosen) == 1)


def test_more_panels_approach_half_the_product():
    full = symmetric_product_flops(1024, 1024)
    assert symmetric_product_flops(1024, 1024, panels=8) == full * 9 / 16
    assert [num_panels(s, device_type="cpu") for s in (256, 512, 2048)] == [1, 4, 8]


@pytest.mark.parametrize("dtype", list(MAGNIFICATION_LIMITS), ids=str)
@pytest.mark.parametrize(
    ("table", "steps"), [("jordan", 1), ("jordan", 5), ("jordan", 12), ("polar_express", 8)]
)
def test_segments_keep_to_the_magnification_that_a_dtype_bears(table, steps, dtype):
    coefficients = resolve_coefficients(table, steps)
    segments = gram_segments(coefficients, dtype)
    assert sum(segments) == steps
    limit = MAGNIFICATION_LIMITS[dtype]
    slopes = [a for a, _, _ in coefficients]
    magnifications, start = [], 0
    for length in segments:
        magnifications.append(math.prod(slopes[start : start + length]))
        start += length
    assert _within(magnifications, limit)
    fewer = [cut for cut in compositions(min(steps, 8)) if len(cut) < len(segments)]
    if steps <= 8:
        assert not any(_bears(cut, slopes, limit) for cut in fewer)


def _bears(cut, slopes, limit) -> bool:
    ends = list(itertools.accumulate(cut))
    pieces = [math.prod(slopes[end - length : end]) for length, end in zip(cut, ends, strict=True)]
    return _within(pieces, limit)


def _within(magnifications, limit) -> bool:
    first, *others = magnifications
    return (first <= limit.first or not others) and all(
        magnification <= limit.other for magnification in others or [first]
    )


def test_a_step_steeper_than_any_bound_stands_alone():
    steep = ((100.0, -200.0, 101.0),) * 3
    assert gram_segments(steep, torch.bfloat16) == plain_segments(steep)


def test_a_workspace_is_reused_and_bounded():
    """From the second call on nothing new is asked for; six tensors serve float32."""
    workspace = Workspace()
    options = {"coefficients": JORDAN, "dtype": torch.float32, "workspace": workspace}
    orthogonalize(torch.randn(1, 64, 256), **options)
    held = workspace.num_bytes
    orthogonalize(torch.randn(1, 256, 64), **options)
    orthogonalize(torch.randn(1, 64, 64), **options)
    assert workspace.num_bytes == held == 4 * (2 * 64 * 256 + 4 * 64 * 64)
    workspace.clear()
    assert workspace.num_bytes == 0


def test_what_a_workspace_holds_does_not_leak_into_the_next_result():
    """Larger matrices, NaN included, leave memory behind that smaller ones must not read."""
    workspace = Workspace()
    options = {"coefficients": JORDAN, "dtype": torch.float32}
    orthogonalize(torch.full((2, 40, 90), float("nan")), workspace=workspace, **options)
    for shape in SHAPES:
        x = torch.randn(2, *shape)
        again = orthogonalize(x, workspace=workspace, **options)
        assert torch.equal(again, orthogonalize(x, **options))


class RowMajorOutputs(TorchDispatchMode):
    """Collects the products that write into a transposed view."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products = 0
        self.into_columns: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = (kwargs or {}).get("out")
        if out is not None and func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            self.num_products += 1
            if out.stride(-1) != 1:
                self.into_columns.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["newton_schulz", "gram"])
@pytest.mark.parametrize("shape", [(2, 48, 16), (1, 48, 16), (1, 1100, 520), (2, 16, 48)])
def test_no_product_writes_into_a_transposed_view(shape, method):
    """A tall matrix is iterated as its transpose, a view. A CPU's batched bfloat16 product into
    such a view falls back to a loop that takes a thousand times as long."""
    options = {"coefficients": JORDAN, "dtype": torch.bfloat16, "orthogonalizer": method}
    with RowMajorOutputs() as products:
        orthogonalize(torch.randn(shape), workspace=Workspace(), **options)
    assert products.num_products >= 10
    assert not products.into_columns


def test_matrices_cut_into_panels_come_out_alike_in_a_batch_and_alone():
    x = torch.randn(2, 520, 560)
    options = {"coefficients": JORDAN, "dtype": torch.float32, "orthogonalizer": "gram"}
    together = orthogonalize(x, **options)
    for index in range(2):
        alone = orthogonalize(x[index : index + 1], **options)
        assert torch.equal(together[index], alone[0])
