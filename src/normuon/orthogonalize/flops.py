"""How many FLOPs an orthogonalisation takes, exactly, and which way of evaluating it takes fewest.

Pure Python: plans count with it on machines without devices.

Notation: s = min(m, n) and l = max(m, n) of an m x n matrix; a multiply-add counts as two.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

PANELS_BY_SIZE = ((2048, 8), (512, 4))
"""``(smallest s, panels)`` of a symmetric s x s product on a CPU, largest first; 1 below.

Measured in float32 on two threads (time over the full product's): 4 panels take 0.86 at 512, 0.68
at 768, 0.71 at 1024 and 0.69 at 2048; 8 panels 0.69 at 2048 and 0.64 at 4096. At 256 every cut is
slower.
"""


def num_panels(size: int, *, device_type: str) -> int:
    """Into how many panels a symmetric ``size x size`` product is cut.

    One on accelerators: a cut there launches more kernels and was not measured to pay.

    Example:
        >>> num_panels(768, device_type="cpu"), num_panels(768, device_type="cuda")
        (4, 1)
    """
    if device_type != "cpu":
        return 1
    return next((panels for smallest, panels in PANELS_BY_SIZE if size >= smallest), 1)


def panel_starts(size: int, panels: int) -> list[int]:
    """The first column of each panel, all but the last of equal width, and ``size`` at the end.

    Example:
        >>> panel_starts(10, 4)
        [0, 3, 6, 9, 10]
    """
    width = -(-size // panels)
    return [*range(0, size, width), size]


def symmetric_product_flops(s: int, inner: int, *, panels: int = 1) -> int:
    """FLOPs of a symmetric product ``[s, inner] x [inner, s]`` cut into panels.

    The panel of columns i to j computes the rows from i on: sum over panels of
    2 (j - i) inner (s - i), which is (p + 1) / 2p of the full 2 s^2 inner when p divides s.

    Example:
        >>> symmetric_product_flops(8, 10), symmetric_product_flops(8, 10, panels=4)
        (1280, 800)
    """
    starts = panel_starts(s, panels)
    return sum(2 * (stop - start) * inner * (s - start) for start, stop in pairwise(starts))


def orthogonalize_flops(m: int, n: int, *, segments: Sequence[int], panels: int = 1) -> int:
    """FLOPs of evaluating the Newton-Schulz polynomial in the given segments.

    Each segment forms one Gram matrix (s x l by l x s) and is applied once (s x s by s x l). Inside
    it, one step takes one product of symmetric s x s matrices, and each further step four: R^2, Q,
    and two for R. (The last step's R is never formed.)

    Args:
        m: rows.
        n: columns.
        segments: steps per segment; all ones is plain Newton-Schulz, one entry is Gram
            Newton-Schulz without a restart.
        panels: of the symmetric products.

    Returns:
        The FLOPs, as `torch.utils.flop_counter` counts them.

    Example:
        >>> orthogonalize_flops(2, 3, segments=[1] * 5)
        320
        >>> orthogonalize_flops(768, 3072, segments=[5]) / orthogonalize_flops(
        ...     768, 3072, segments=[1] * 5
        ... )
        0.5555555555555556
    """
    short, long = min(m, n), max(m, n)
    gram = symmetric_product_flops(short, long, panels=panels)
    square = symmetric_product_flops(short, short, panels=panels)
    apply = 2 * short * short * long
    return sum(gram + (4 * steps - 3) * square + apply for steps in segments)


def gram_pays(m: int, n: int, *, panels: int = 1) -> bool:
    """Whether a longer segment takes fewer FLOPs than two shorter ones.

    Joining two segments saves a Gram matrix and an application, and costs three square products
    more, whatever their lengths. Without panels that is 2 l > 3 s.

    Example:
        >>> gram_pays(768, 3072), gram_pays(768, 768)
        (True, False)
    """
    short, long = min(m, n), max(m, n)
    gram = symmetric_product_flops(short, long, panels=panels)
    square = symmetric_product_flops(short, short, panels=panels)
    return gram + 2 * short * short * long > 3 * square
