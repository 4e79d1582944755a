"""Lines 3 to 6 for one member of a team that divides a matrix.

Nothing here communicates. What needs the other members' part is a program, a generator: it yields a
`Swap`, what it sends to each member and where it wants what it receives, and goes on when that is
there. All members' programs yield equally often.

Shapes: a slab has all S entries of the short side and l of the long one, ``x_SL``; sums over
members are taken in their order, so that all of them find the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from normuon.distributed.slabs import Slab, Split, even_cuts, strips_of
from normuon.options import MatrixOptions
from normuon.orthogonalize import largest_magnitude, num_panels
from normuon.orthogonalize.coefficients import Triple
from normuon.orthogonalize.iteration import effective_rank, plus_identity
from normuon.orthogonalize.symmetric import product, symmetric_product
from normuon.step.figures import row_norms, update_row_norms, whole_figures
from normuon.step.normalizer import DividedNormalizer, Vectors

T = TypeVar("T")


@dataclass(slots=True)
class Swap:
    """One exchange of a member with the others; its own places are empty.

    Args:
        send: for each member, what it is sent.
        receive: for each member, where what it sends is written.
    """

    send: list[list[Tensor]]
    receive: list[list[Tensor]]


Program = Generator[Swap, None, T]
"""Yields what to exchange, and returns its result."""


class Member:
    """What one member of a team does with the others."""

    def __init__(self, slab: Slab) -> None:
        self.number, self.size = slab.number, slab.team.size
        self.shares_products = slab.team.shares_products
        self.others = [n for n in range(self.size) if n != self.number]

    def gathered(self, tensor: Tensor) -> Program[list[Tensor]]:
        """Every member's tensor, in their order."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        found[self.number] = tensor
        yield Swap(
            [[tensor] if n in self.others else [] for n in range(self.size)],
            [[found[n]] if n in self.others else [] for n in range(self.size)],
        )
        return found

    def summed(self, tensor: Tensor) -> Program[Tensor]:
        """The sum of every member's tensor."""
        return _sum((yield from self.gathered(tensor)))

    def sum_squares_(self, part_SS: Tensor) -> Program[None]:
        """Sums the members' symmetric matrices, each in its own strips, and shares the sum.

        Args:
            part_SS: of whose lower half the strips are summed in at least float32; written to.
        """
        own = self._strips(part_SS, self.number)
        received = [[torch.empty_like(strip) for strip in own] for _ in self.others]
        by_member = dict(zip(self.others, received, strict=True))
        yield Swap(
            [self._strips(part_SS, n) if n in by_member else [] for n in range(self.size)],
            [by_member.get(n, []) for n in range(self.size)],
        )
        by_member[self.number] = own
        wide = torch.promote_types(part_SS.dtype, torch.float32)
        for place, strip in enumerate(own):
            strip.copy_(_sum([by_member[n][place].to(wide) for n in range(self.size)]))
        yield from self._share([part_SS])

    def multiply_(
        self, a: Tensor, b: Tensor, *, add: Tensor, beta: float, out: Tensor, alpha: float = 1.0
    ) -> None:
        """``beta add + alpha a b`` of symmetric matrices that commute; see `share`.

        Args:
            a: ``[S, S]``, of which this member's strips are read, if it computes strips only.
            b: ``[S, S]``, complete.
            add: as ``a``.
            beta: factor of ``add``.
            out: of which this member's strips are written, up to the diagonal, or all.
            alpha: factor of the product.
        """
        if not self.shares_products:
            panels = num_panels(len(out), device_type=out.device.type)
            symmetric_product(a, b, add=add, beta=beta, alpha=alpha, panels=panels, out=out)
            return
        for start, stop in strips_of(len(out), self.size, self.number):
            into, plus = out[start:stop, :stop], add[start:stop, :stop]
            product(a[start:stop], b[:, :stop], add=plus, beta=beta, alpha=alpha, out=into)

    def multiply_rows_(
        self, a: Tensor, b: Tensor, *, add: Tensor, beta: float, out: Tensor
    ) -> None:
        """`multiply_` over the whole rows of this member's strips: nobody else needs them."""
        if not self.shares_products:
            self.multiply_(a, b, add=add, beta=beta, out=out)
            return
        for start, stop in strips_of(len(out), self.size, self.number):
            product(a[start:stop], b, add=add[start:stop], beta=beta, out=out[start:stop])

    def share(self, squares: Sequence[Tensor]) -> Program[None]:
        """Completes what `multiply_` has written in strips."""
        if self.shares_products:
            yield from self._share(squares)

    def _share(self, squares: Sequence[Tensor]) -> Program[None]:
        """Sends this member's strips to all, and completes the matrices with everybody's."""
        own = [strip for square in squares for strip in self._strips(square, self.number)]
        theirs = [
            [strip for square in squares for strip in self._strips(square, n)]
            for n in range(self.size)
        ]
        theirs[self.number] = []
        yield Swap([own if n in self.others else [] for n in range(self.size)], theirs)
        cuts = sorted(c for n in range(self.size) for c in strips_of(len(squares[0]), self.size, n))
        above = [s[:start, start:stop] for s in squares for start, stop in cuts if start]
        below = [s[start:stop, :start].mT for s in squares for start, stop in cuts if start]
        if above:
            torch._foreach_copy_(above, below)

    def _strips(self, square_SS: Tensor, member: int) -> list[Tensor]:
        cuts = strips_of(len(square_SS), self.size, member)
        return [square_SS[start:stop, :stop] for start, stop in cuts]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def update_slab(
    direction_MN: Tensor,
    state: Vectors,
    *,
    slab: Slab,
    split: Split,
    options: MatrixOptions,
    ns_dtype: torch.dtype,
    moves_1: Tensor | None = None,
    measures: bool = False,
) -> Program[tuple[Tensor, Vectors, Vectors, Tensor | None]]:
    """Lines 3 to 6 for a slab, as `order.orthogonalize_` does them for whole matrices.

    Args:
        direction_MN: this member's part of what line 3 takes; not written to.
        state: its part of the vectors before the step, each ``[1, V]``; all of those that lie along
            the side that is not cut.
        slab: which part it is.
        split: how the matrix is divided.
        options: of the group.
        ns_dtype: dtype to orthogonalise in.
        moves_1: a boolean: whether the matrix is stepped; for its figures alone. None: it is.
        measures: whether to find figures, by `NUM_MEASURING_SWAPS` exchanges more.

    Returns:
        The slab of O, the new state, the summary, and the figures of the whole matrix or None.
    """
    member = Member(slab)
    x_SL = direction_MN.mT if split.cuts_rows else direction_MN
    norms_1M = row_norms(direction_MN[None]) if measures else None
    rank_1 = None if norms_1M is None else norms_1M.new_empty(1)
    unit_SL = yield from _normalized(x_SL, member, ns_dtype)
    o_SL = yield from _iterated(unit_SL, options.coefficients, split.segments, member, rank_1)
    o_MN = o_SL.mT if split.cuts_rows else o_SL
    normalizer = options.normalizer
    assert isinstance(normalizer, DividedNormalizer), "a plan divides no other's matrices"
    updated, summary = yield from normalizer.update_slab(
        o_MN[None],
        state,
        shape=(slab.rows, slab.cols),
        cut=-2 if split.cuts_rows else -1,
        total=member.summed,
    )
    figures = None
    if norms_1M is not None and rank_1 is not None:
        shape = (slab.rows, slab.cols)
        factors = normalizer.factors(updated, summary, shape)
        update_1M = update_row_norms(o_MN[None], factors, options.lr * normalizer.constant(*shape))
        norms_1M, update_1M = yield from _whole_row_norms(norms_1M, update_1M, slab, split, member)
        figures = whole_figures(norms_1M, update_1M, rank_1, num_columns=slab.cols, moves_B=moves_1)
    return o_MN, updated, summary, figures


NUM_MEASURING_SWAPS = 1
"""How much more often members exchange at a step that is measured."""


def _whole_row_norms(
    norms_1m: Tensor, update_1m: Tensor, slab: Slab, split: Split, member: Member
) -> Program[tuple[Tensor, Tensor]]:
    """The norms of whole rows of the whole matrix, from those of a slab."""
    squares_2M = norms_1m.new_zeros(2, slab.rows)
    first = even_cuts(slab.rows, member.size)[member.number][0] if split.cuts_rows else 0
    squares_2M[:, first : first + norms_1m.shape[1]] = torch.cat([norms_1m, update_1m]).square()
    whole_2M = yield from member.summed(squares_2M)
    norms_1M, update_1M = torch.split(whole_2M.sqrt(), 1)
    return norms_1M, update_1M


def _normalized(x_SL: Tensor, member: Member, dtype: torch.dtype) -> Program[Tensor]:
    """The slab of X / ||X||_F, without under- or overflow; see `normalize.normalize_frobenius`."""
    stats = torch.promote_types(x_SL.dtype, torch.float32)
    x_SL = x_SL.to(stats)  # Scalars do not widen what they divide.
    largest = largest_magnitude(x_SL[None])[0, 0]
    tiny = torch.finfo(stats).tiny
    scaled_SL = x_SL / largest.masked_fill(largest < tiny, math.inf)
    square = torch.linalg.vector_norm(scaled_SL).square().view(1)
    parts = torch.stack((yield from member.gathered(torch.cat([largest, square]))))
    whole = parts[:, 0].amax()
    # Each member divided by its own largest magnitude, to which the squares are brought back.
    divisor = whole.masked_fill(whole < tiny, math.inf)
    norm = (parts[:, 1] * (parts[:, 0] / divisor).square()).sum().sqrt()
    norm = norm + (norm == 0)
    return torch.div(x_SL / divisor, norm).to(dtype)


def _iterated(
    x_SL: Tensor,
    coefficients: Sequence[Triple],
    segments: Sequence[int],
    member: Member,
    rank_1: Tensor | None,
) -> Program[Tensor]:
    """The Newton-Schulz polynomial; see `iteration.gram_newton_schulz`."""
    short = len(x_SL)
    squares = list(x_SL.new_empty((5, short, short)).unbind(0))
    for stop, length in zip(accumulate(segments), segments, strict=True):
        of_segment = coefficients[stop - length : stop]
        x_SL = yield from _segment(x_SL, of_segment, squares, member, rank_1)
        rank_1 = None
    return x_SL


def _segment(
    x_SL: Tensor,
    coefficients: Sequence[Triple],
    squares: Sequence[Tensor],
    member: Member,
    rank_1: Tensor | None,
) -> Program[Tensor]:
    r, z, t, q, spare = squares
    panels = num_panels(len(r), device_type=r.device.type)
    symmetric_product(x_SL, x_SL.mT, panels=panels, out=r)
    yield from member.sum_squares_(r)
    if rank_1 is not None:
        rank_1.copy_(effective_rank(r))
    for number, (a, b, c) in enumerate(coefficients):
        is_first, is_last = number == 0, number == len(coefficients) - 1
        member.multiply_(r, r, add=r, beta=b, alpha=c, out=z)
        yield from member.share([z])
        if is_first and is_last:
            # a X is added in the product's own accumulator, not rounded into Z first.
            return product(z, x_SL, add=x_SL, beta=a, out=torch.empty_like(x_SL))
        written = []
        if is_first:
            plus_identity(z, a, out=q)
        else:
            member.multiply_(z, q, add=q, beta=a, out=spare)
            q, spare = spare, q
            written.append(q)
        if not is_last:  # No step follows the last, so nothing needs its R.
            member.multiply_rows_(z, r, add=r, beta=a, out=t)
            member.multiply_(t, z, add=t, beta=a, out=r)
            written.append(r)
        yield from member.share(written)
    return product(q, x_SL, out=torch.empty_like(x_SL))  # Strided as the slab.
