"""Bytes that the elementwise passes of a step move through memory, beside the fewest possible.

Of matrix products only inputs and outputs are counted: the least is what any step must move apart
from its products.
"""

from __future__ import annotations

WIDE_BYTES = 4
"""Of a weight, a gradient, an entry of the momentum and a float32 intermediate."""

FUSED_PASSES = {
    "momentum, look-ahead, sum of squares": (3, 1),
    "division by the norm": (0, 2),
    "mean square of each neuron": (0, 1),
    "scale, decay and apply": (2, 1),
}
"""The Triton kernels: how many operands of each pass, read or written, are wide, and how many have
Newton-Schulz's dtype; each counts once."""

PLAIN_PASSES = {
    "momentum": (3, 0),
    "copy of the gradient": (2, 0),
    "look-ahead": (3, 0),
    "rounding to Newton-Schulz's dtype": (1, 1),
    "largest magnitude": (0, 1),
    "division by the largest magnitude": (1, 1),
    "norm": (1, 0),
    "division by the norm": (2, 0),
    "rounding to Newton-Schulz's dtype again": (1, 1),
    "mean square of each neuron": (0, 1),
    "widening of O": (1, 1),
    "scale": (2, 0),
    "decay": (2, 0),
    "apply": (3, 0),
}
"""The same of torch's multi-tensor operations."""


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
    passes = FUSED_PASSES if fused else PLAIN_PASSES
    moved = sum(wide * WIDE_BYTES + narrow * ns_bytes for wide, narrow in passes.values())
    return {"moved": rows * cols * moved, "least": rows * cols * (5 * WIDE_BYTES + 2 * ns_bytes)}
