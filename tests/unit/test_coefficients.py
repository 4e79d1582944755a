"""Coefficient tables: what each does to singular values, and what is refused."""

from __future__ import annotations

import pytest
import torch

from normuon.orthogonalize import COEFFICIENT_TABLES, resolve_coefficients


def image_of(coefficients, lowest: float = 1e-3) -> tuple[float, float]:
    s = torch.logspace(torch.log10(torch.tensor(lowest)), 0, 20_001, dtype=torch.float64)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return float(s.min()), float(s.max())


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("jordan", 0.471, 1.202),
        ("you", 0.475, 1.145),
        ("polar_express", 0.846, 1.124),
        ("cans", 0.839, 1.113),
    ],
)
def test_five_steps_send_singular_values_from_1e_3_near_one(name, lowest, highest):
    """The range that each table's five steps map [1e-3, 1] to, known in float64."""
    low, high = image_of(resolve_coefficients(name, 5))
    assert low == pytest.approx(lowest, abs=1e-3)
    assert high == pytest.approx(highest, abs=1e-3)


def test_polar_express_is_minimax_before_its_safety_factor():
    """Undoing the factor 1.01, five steps leave the error of the optimal polynomial: 1 +- e."""
    rows = resolve_coefficients("polar_express", 5)
    unscaled = [(a * 1.01, b * 1.01**3, c * 1.01**5) for a, b, c in rows]
    low, high = image_of(unscaled)
    assert 1 - low == pytest.approx(high - 1, abs=1e-4)


def test_polar_express_converges_when_all_its_rows_are_used():
    low, high = image_of(resolve_coefficients("polar_express", 8))
    assert low == pytest.approx(1, abs=1e-3)
    assert high == pytest.approx(1, abs=1e-3)


def test_every_table_names_its_source():
    assert all(len(table.source) > 20 for table in COEFFICIENT_TABLES.values())


def test_one_triple_serves_every_step_and_lists_serve_as_tuples():
    assert resolve_coefficients([2.0, -1.5, 0.5], 3) == ((2.0, -1.5, 0.5),) * 3
    assert resolve_coefficients([[2, -1.5, 0.5], [1, 0, 0]], 2) == (
        (2.0, -1.5, 0.5),
        (1.0, 0.0, 0.0),
    )


@pytest.mark.parametrize(
    ("given", "steps", "message"),
    [
        ("jordann", 5, "'jordann' is not a known table; choose from 'jordan', 'polar_express'"),
        ("you", 6, "'you' is a table for ns_steps=5, not 6"),
        ("cans", 4, "'cans' is a table for ns_steps=5, not 4"),
        ("polar_express", 9, "'polar_express' is a table for ns_steps=1 to 8, not 9"),
        ([(1, 2, 3)] * 4, 5, "has 4 rows, but ns_steps=5; make them equal"),
        ((1.0, 2.0), 5, "three finite numbers"),
        ((1.0, 2.0, float("nan")), 5, "three finite numbers"),
        ([], 5, "three finite numbers"),
        (3.0, 5, "three finite numbers"),
    ],
)
def test_a_table_that_does_not_fit_its_steps_is_refused(given, steps, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        resolve_coefficients(given, steps)
