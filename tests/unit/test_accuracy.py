"""The accuracy that docs/accuracy.md prints: bounds that must hold on any machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from normuon.orthogonalize import METHODS, newton_schulz, orthogonalize, resolve_coefficients
from normuon.orthogonalize.iteration import iterate
from normuon.orthogonalize.segments import gram_segments
from normuon_lab.bench.accuracy import (
    accuracy_of_methods,
    error_of_updates,
    hard_spectra,
    image_of_interval,
)

TABLES = [("jordan", 5), ("you", 5), ("polar_express", 5), ("polar_express", 8), ("cans", 5)]
# Plain float32 rounding magnified by 485 to 1049 at the steepest; through one Gram matrix, squared.
FLOAT32_ERROR = {"newton_schulz": 1e-3, "gram": 4e-3}


@pytest.mark.parametrize(("table", "steps"), TABLES)
def test_every_dtype_survives_every_spectrum(table, steps):
    """No NaN and no singular value above 1.3, from condition 1e6 to half the rank."""
    found = list(accuracy_of_methods(resolve_coefficients(table, steps), m=96, n=288))
    assert {entry.method for entry in found} == set(METHODS)
    for entry in found:
        assert entry.largest_singular_value <= 1.3, entry  # False for NaN too
        if entry.dtype == "float32":
            assert entry.error <= FLOAT32_ERROR[entry.method], entry


@pytest.mark.parametrize("segments", [(5,), (1, 4), (2, 3)], ids=str)
def test_half_precision_needs_the_restart_where_it_is(segments):
    """No restart, or an earlier one, lets rounding out; three steps and two do not."""
    jordan = resolve_coefficients("jordan", 5)

    spectra = [x[None].bfloat16() for x in hard_spectra(96, 288).values()]

    def largest(cut):
        out = [iterate(x, jordan, segments=cut)[0].double() for x in spectra]
        return max(float(torch.linalg.matrix_norm(o, 2)) for o in out)

    assert largest((3, 2)) <= 1.25 < largest(segments)


SLOPE_OF_THREE = (3.0, -16 / 5, 6 / 5)


@pytest.mark.parametrize("steps", [6, 8, 10, 12])
@pytest.mark.parametrize("coefficients", ["jordan", SLOPE_OF_THREE], ids=str)
def test_half_precision_bears_any_number_of_steps(coefficients, steps):
    """A later segment sees R after rounding near 1, and may be no steeper than the last."""
    found = accuracy_of_methods(resolve_coefficients(coefficients, steps), m=96, n=288)
    for entry in found:
        assert entry.largest_singular_value <= 1.25, entry


def test_a_later_segment_bears_less_than_the_first():
    jordan = resolve_coefficients("jordan", 10)
    assert gram_segments(jordan, torch.bfloat16) == (2, 2, 2, 2, 2)
    spectra = [x[None].bfloat16() for x in hard_spectra(96, 288).values()]
    out = [iterate(x, jordan, segments=(3, 3, 2, 2)) for x in spectra]
    assert not all(float(o.abs().max()) < 100 for o in out)  # NaN is not below it either.


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_the_float64_polynomial_to_its_rounding(method, dtype, shape):
    coefficients = resolve_coefficients("jordan", 5)
    x = torch.randn(3, *shape, dtype=torch.float64)
    rounded = (x / torch.linalg.norm(x, dim=(-2, -1), keepdim=True)).to(dtype)
    exact = newton_schulz(rounded.double(), coefficients)
    o = orthogonalize(rounded, coefficients=coefficients, dtype=dtype, orthogonalizer=method)
    # A dozen roundings of 2^-8 or 2^-11 in each entry's sums.
    relative = torch.linalg.norm(o.double() - exact) / torch.linalg.norm(exact)
    assert relative <= 12 * torch.finfo(dtype).eps


def test_the_whole_update_keeps_its_accuracy():
    for dtype, worst in ((torch.float32, 5e-4), (torch.float16, 0.03), (torch.bfloat16, 0.2)):
        for method in METHODS:
            errors = error_of_updates(dtype, method, m=48, n=144, steps=4)
            assert max(errors.values()) <= worst, (dtype, method, errors)


def test_the_documented_ranges_are_those_of_the_tables():
    page = Path(__file__).parents[2] / "docs" / "accuracy.md"
    rows = re.findall(r"^\| `(\w+)` \| (\d) \| ([\d.]+) \| ([\d.]+) \|$", page.read_text(), re.M)
    assert [(table, int(steps)) for table, steps, _, _ in rows] == TABLES
    for table, steps, low, high in rows:
        lowest, highest = image_of_interval(resolve_coefficients(table, int(steps)))
        assert (float(low), float(high)) == (round(lowest, 3), round(highest, 3))
