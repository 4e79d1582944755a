"""Bytes that the elementwise passes of a step move through memory, beside the fewest possible.

Counted pass by pass: every operand that a pass reads and every result that it writes, once each.
Of the matrix products only what they take and give is counted: the least is what any step must move
whose products are somebody else's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over all elements of a matrix.

    Attributes:
        what: it does.
        read: bytes of each element that it reads.
        written: bytes of each element that it writes.
    """

    what: str
    read: int
    written: int

    @property
    def num_bytes(self) -> int:
        """Of each element."""
        return self.read + self.written


def fused_passes(*, param_bytes: int = 4, ns_bytes: int = 2) -> tuple[Pass, ...]:
    """The passes of the Triton kernels.

    Args:
        param_bytes: of a weight, a gradient and an entry of the momentum.
        ns_bytes: of Newton-Schulz's dtype.
    """
    return (
        Pass("momentum, look-ahead, sum of squares", 2 * param_bytes, param_bytes + ns_bytes),
        Pass("division by the norm", ns_bytes, ns_bytes),
        Pass("mean square of each neuron", ns_bytes, 0),
        Pass("scale, decay and apply", ns_bytes + param_bytes, param_bytes),
    )


def plain_passes(*, param_bytes: int = 4, ns_bytes: int = 2) -> tuple[Pass, ...]:
    """The passes of torch's multi-tensor operations."""
    wide = max(param_bytes, 4)
    return (
        Pass("momentum", 2 * param_bytes, param_bytes),
        Pass("copy of the gradient", param_bytes, param_bytes),
        Pass("look-ahead", 2 * param_bytes, param_bytes),
        Pass("rounding to Newton-Schulz's dtype", param_bytes, ns_bytes),
        Pass("largest magnitude", ns_bytes, 0),
        Pass("division by it", ns_bytes, wide),
        Pass("norm", wide, 0),
        Pass("division by it", wide, wide),
        Pass("rounding to Newton-Schulz's dtype", wide, ns_bytes),
        Pass("mean square of each neuron", ns_bytes, 0),
        Pass("widening of O", ns_bytes, wide),
        Pass("scale", wide, wide),
        Pass("decay", param_bytes, param_bytes),
        Pass("apply", param_bytes + wide, param_bytes),
    )


def least_bytes(*, param_bytes: int = 4, ns_bytes: int = 2) -> int:
    """Of each element: gradient read, momentum and weight read and written, X written, O read."""
    return 5 * param_bytes + 2 * ns_bytes


def elementwise_bytes(
    rows: int, cols: int, *, fused: bool, param_bytes: int = 4, ns_bytes: int = 2
) -> dict[str, int]:
    """What the passes over one matrix move, and the least.

    Args:
        rows: of the matrix.
        cols: of the matrix.
        fused: whether by the Triton kernels.
        param_bytes: of a weight, a gradient and an entry of the momentum.
        ns_bytes: of Newton-Schulz's dtype.

    Example:
        >>> elementwise_bytes(10, 10, fused=True)
        {'moved': 3000, 'least': 2400}
        >>> elementwise_bytes(10, 10, fused=False)
        {'moved': 10000, 'least': 2400}
    """
    find = fused_passes if fused else plain_passes
    each = sum(one.num_bytes for one in find(param_bytes=param_bytes, ns_bytes=ns_bytes))
    least = least_bytes(param_bytes=param_bytes, ns_bytes=ns_bytes)
    return {"moved": rows * cols * each, "least": rows * cols * least}
