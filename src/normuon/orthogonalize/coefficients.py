"""The polynomial coefficients of the Newton-Schulz iteration, each table with its source.

A step maps every singular value s of a matrix with ||X||_2 <= 1 to ``a s + b s^3 + c s^5``; a table
says which ``(a, b, c)`` each step takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class CoefficientTable:
    """One named schedule of Newton-Schulz coefficients.

    Args:
        rows: one ``(a, b, c)`` per step, or a single row that every step repeats.
        repeats: True when the single row serves any number of steps.
        prefix: True when the first k rows are themselves a published schedule of k steps.
        source: where the numbers come from.
    """

    rows: tuple[Triple, ...]
    source: str
    repeats: bool = False
    prefix: bool = False

    def allowed_steps(self) -> str:
        """The step counts this table serves, in words."""
        if self.repeats:
            return "1 or more"
        return f"1 to {len(self.rows)}" if self.prefix else str(len(self.rows))

    def serves(self, ns_steps: int) -> bool:
        """Whether the table defines exactly ``ns_steps`` steps."""
        if self.repeats:
            return True
        return ns_steps <= len(self.rows) if self.prefix else ns_steps == len(self.rows)


def _with_safety_factor(rows: Sequence[Triple], factor: float) -> tuple[Triple, ...]:
    # p(x / factor): keeps a singular value that rounding pushed above 1 inside the design interval.
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in rows)


COEFFICIENT_TABLES: dict[str, CoefficientTable] = {
    "jordan": CoefficientTable(
        rows=((3.4445, -4.7750, 2.0315),),
        repeats=True,
        source="Jordan et al. 2024, 'Muon: An optimizer for hidden layers in neural networks'",
    ),
    "polar_express": CoefficientTable(
        # All rows but the last carry the paper's safety factor of 1.01.
        rows=(
            *_with_safety_factor(
                (
                    (8.28721201814563, -23.595886519098837, 17.300387312530933),
                    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                ),
                1.01,
            ),
            (1.875, -1.25, 0.375),
        ),
        # The construction is greedy: each row is optimal given those before it.
        prefix=True,
        source="Amsel, Persson, Musco, Gower 2025, arXiv 2505.16932, Algorithm 1",
    ),
    "you": CoefficientTable(
        rows=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        source="Jiacheng You 2025, x.com/YouJiacheng/status/1905861218138804534",
    ),
    "cans": CoefficientTable(
        # Differs: all rows but the last carry a safety factor, as polar_express's do, because the
        # published rows climb steeply above 1, where bfloat16 rounds to: singular values of 1.44
        # came out. With 1.01 some spectra still gave 4.7 through Gram matrices; with 1.02 none.
        rows=(
            *_with_safety_factor(
                (
                    (8.4703, -25.1081, 18.6293),
                    (4.1828, -3.1087, 0.5806),
                    (3.9619, -2.9541, 0.5630),
                    (3.2866, -2.4647, 0.5074),
                ),
                1.02,
            ),
            (2.2737, -1.6447, 0.4162),
        ),
        source="Grishina, Smirnov, Rakhuba 2025, arXiv 2506.10935, as tabulated by NVIDIA "
        "Emerging-Optimizers; safety factor ours",
    ),
}


def resolve_coefficients(
    ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]], ns_steps: int
) -> tuple[Triple, ...]:
    """The ``(a, b, c)`` of each of the ``ns_steps`` steps.

    Args:
        ns_coefficients: a table's name, one triple for every step, or one triple per step.
        ns_steps: number of Newton-Schulz steps, at least 1.

    Returns:
        ``ns_steps`` triples.

    Raises:
        ValueError: unknown name, a table whose length is not ``ns_steps``, or values that are
            not finite triples.

    Example:
        >>> resolve_coefficients("jordan", 2)
        ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
        >>> resolve_coefficients("you", 3)
        Traceback (most recent call last):
        ...
        ValueError: ns_coefficients='you' is a table for ns_steps=5, not 3
    """
    if isinstance(ns_coefficients, str):
        return _named(ns_coefficients, ns_steps)
    return _given(_hashable(ns_coefficients), ns_steps)


def _hashable(value: object) -> object:
    # A checkpoint that went through JSON or a DTensor planner gives lists back.
    return tuple(_hashable(v) for v in value) if isinstance(value, (list, tuple)) else value


def _named(name: str, ns_steps: int) -> tuple[Triple, ...]:
    table = COEFFICIENT_TABLES.get(name)
    if table is None:
        known = ", ".join(repr(n) for n in COEFFICIENT_TABLES)
        raise ValueError(f"ns_coefficients={name!r} is not a known table; choose from {known}")
    if not table.serves(ns_steps):
        raise ValueError(
            f"ns_coefficients={name!r} is a table for ns_steps={table.allowed_steps()}, "
            f"not {ns_steps}"
        )
    return table.rows * ns_steps if table.repeats else table.rows[:ns_steps]


def _given(value: object, ns_steps: int) -> tuple[Triple, ...]:
    if _is_triple(value):
        return (_triple(value),) * ns_steps
    if not isinstance(value, tuple) or not value or not all(_is_triple(row) for row in value):
        raise ValueError(
            "ns_coefficients must be a table's name, three finite numbers (a, b, c), or one such "
            f"triple per step; got {value!r}"
        )
    if len(value) != ns_steps:
        raise ValueError(
            f"ns_coefficients has {len(value)} rows, but ns_steps={ns_steps}; make them equal"
        )
    return tuple(_triple(row) for row in value)


def _is_triple(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 3
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)
    )


def _triple(value: object) -> Triple:
    assert isinstance(value, tuple)
    a, b, c = value
    return float(a), float(b), float(c)
