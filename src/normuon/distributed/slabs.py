"""How a team of ranks divides one matrix: slabs of its long side, strips of its square products.

S is the short side of a matrix, L the long one. Every member of a team of T holds a slab: all of
the short side and about L / T of the long one. The Gram matrix is the sum of the slabs' own. What
follows until a slab is multiplied are products of symmetric S x S matrices, which every member
repeats, or which members share out in strips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Interval = tuple[int, int]

SMALL_TEAM = 4
"""Members below which each has four strips instead of two."""


@dataclass(frozen=True, slots=True)
class Split:
    """What a planner must know of a matrix to divide it.

    Args:
        dim: the parameter's dim along which slabs are cut, on the long side.
        cuts_rows: whether that dim counts rows; else it counts columns, or groups of them.
        short: S.
        long: L, a multiple of the dim's size.
        segments: Newton-Schulz steps that follow each Gram matrix.
        gram_flops: FLOPs of a Gram matrix for each unit of the long side.
        square_flops: FLOPs of a product of symmetric S x S matrices by one rank.
        num_totals: how often statistics are summed over slabs.
        element_bytes: of what members exchange, in the dtype that they compute in.
    """

    dim: int
    cuts_rows: bool
    short: int
    long: int
    segments: tuple[int, ...]
    gram_flops: int
    square_flops: int
    num_totals: int
    element_bytes: int

    def flops(self, team: Team, number: int, length: int) -> int:
        """FLOPs of one member.

        A segment's first step takes one product of S x S matrices, and each further one four; of
        these one is of whole rows where members share products.

        Args:
            team: whose.
            number: which member.
            length: of its slab, along the long side.
        """
        squares = sum(4 * steps - 3 for steps in self.segments) * self.square_flops
        if team.shares_products:
            num_rows = sum(stop - start for start, stop in strips_of(self.short, team.size, number))
            halves = self._num_shared * strip_elements(self.short, team.size, number)
            whole = sum(steps - 1 for steps in self.segments) * num_rows * self.short
            squares = 2 * self.short * (halves + whole)
        each = self.gram_flops + 2 * self.short**2  # A Gram matrix, and the slab multiplied.
        return len(self.segments) * each * length + squares

    @property
    def _num_shared(self) -> int:
        """Products whose strips are shared: the polynomial's Z, R and Q."""
        return sum(3 * steps - 2 for steps in self.segments)

    def num_swaps(self, team: Team) -> int:
        """How often members exchange: norms, parts of Gram matrices, products, then statistics."""
        products = sum(2 * steps - (steps == 1) for steps in self.segments)
        own = 1 + self.num_totals + 2 * len(self.segments)
        return own + products * team.shares_products

    def swapped_bytes(self, team: Team, number: int) -> int:
        """Bytes that one member sends to the others, statistics left out; it receives as many."""
        own = strip_elements(self.short, team.size, number)
        everything = sum(strip_elements(self.short, team.size, n) for n in range(team.size))
        shared = len(self.segments) + self._num_shared * team.shares_products
        elements = len(self.segments) * (everything - own) + shared * own * (team.size - 1)
        return elements * self.element_bytes


@dataclass(frozen=True, slots=True, order=True)
class Team:
    """How many ranks divide a matrix, and whether they share out its square products."""

    size: int
    shares_products: bool


@dataclass(frozen=True, slots=True)
class Slab:
    """One member's part of a matrix.

    Args:
        team: whose.
        number: which member.
        ranks: all members, in their order.
        rows: of the whole matrix.
        cols: of the whole matrix.
    """

    team: Team
    number: int
    ranks: tuple[int, ...]
    rows: int
    cols: int

    @property
    def rank(self) -> int:
        """Who has this part."""
        return self.ranks[self.number]


def even_cuts(size: int, count: int) -> list[Interval]:
    """A range in ``count`` parts whose sizes differ by one at most.

    Example:
        >>> even_cuts(7, 3)
        [(0, 2), (2, 4), (4, 7)]
    """
    return [(size * n // count, size * (n + 1) // count) for n in range(count)]


def strips_of(size: int, team_size: int, number: int) -> Iterator[Interval]:
    """The rows of a symmetric ``size x size`` product that a member computes, up to the diagonal.

    Member n takes the n-th strip from the top, the n-th from the bottom, and so on inwards:
    together their lower halves are 1 / T of the whole. Small teams have more strips, since a strip
    is computed to the diagonal of its last row.

    Example:
        >>> list(strips_of(16, 4, 0)), list(strips_of(16, 4, 3))
        ([(0, 2), (14, 16)], [(6, 8), (8, 10)])
    """
    pairs = 1 if team_size >= SMALL_TEAM else 2
    cuts = even_cuts(size, 2 * pairs * team_size)
    places = (number + pair * team_size for pair in range(pairs))
    mine = sorted(cut for place in places for cut in (cuts[place], cuts[-1 - place]))
    for start, stop in mine:
        if start < stop:
            yield start, stop


def strip_elements(size: int, team_size: int, number: int) -> int:
    """Elements of a member's strips: of every row as many as the strip's last one has.

    Example:
        >>> [strip_elements(8, 2, member) for member in range(2)]
        [18, 18]
    """
    return sum((stop - start) * stop for start, stop in strips_of(size, team_size, number))
