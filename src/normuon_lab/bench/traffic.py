"""Bytes that the elementwise passes of a step move through memory, beside the fewest possible.

Counted pass by pass: every operand that a pass reads and every result that it writes, once each.
Of matrix products only inputs and outputs are counted: the least is what any step must move apart
from its products.
"""

from __future__ import annotations

WIDE = 4
"""Bytes of a weight, a gradient, an entry of the momentum and a float32 intermediate."""


def _fused_passes(ns: int) -> dict[str, tuple[int, int]]:
    """Bytes of each element that the Triton kernels read and write, pass by pass."""
    return {
        "momentum, look-ahead, sum of squares": (2 * WIDE, WIDE + ns),
        "division by the norm": (ns, ns),
        "mean square of each neuron": (ns, 0),
        "scale, decay and apply": (ns + WIDE, WIDE),
    }


def _plain_passes(ns: int) -> dict[str, tuple[int, int]]:
    """Bytes of each element that torch's multi-tensor operations read and write, pass by pass."""
    return {
        "momentum": (2 * WIDE, WIDE),
        "copy of the gradient": (WIDE, WIDE),
        "look-ahead": (2 * WIDE, WIDE),
        "rounding to Newton-Schulz's dtype": (WIDE, ns),
        "largest magnitude": (ns, 0),
        "division by the largest magnitude": (ns, WIDE),
        "norm": (WIDE, 0),
        "division by the norm": (WIDE, WIDE),
        "rounding to Newton-Schulz's dtype again": (WIDE, ns),
        "mean square of each neuron": (ns, 0),
        "widening of O": (ns, WIDE),
        "scale": (WIDE, WIDE),
        "decay": (WIDE, WIDE),
        "apply": (2 * WIDE, WIDE),
    }


def elementwise_bytes(rows: int, cols: int, *, fused: bool, ns_bytes: int = 2) -> dict[str, int]:
    """Bytes that the passes over one matrix move, and the minimum.

    The least reads the gradient and O, reads and writes the momentum and the weight, and writes
    Newton-Schulz's input, whose dtype has `ns_bytes`. Fused passes are the Triton kernels.

    Example:
        >>> elementwise_bytes(10, 10, fused=True)
        {'moved': 3000, 'least': 2400}
        >>> elementwise_bytes(10, 10, fused=False)
        {'moved': 10000, 'least': 2400}
    """
    passes = _fused_passes(ns_bytes) if fused else _plain_passes(ns_bytes)
    moved = sum(map(sum, passes.values()))
    return {"moved": rows * cols * moved, "least": rows * cols * (5 * WIDE + 2 * ns_bytes)}
