"""One matrix to orthogonalise, as the planner sees it: a rectangle of a sharded parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from normuon.distributed.layout import Region, ShardLayout
from normuon.distributed.slabs import Slab, Split, Team, even_cuts

Dims = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixTask:
    """One [rows, cols] matrix of a parameter.

    Args:
        name: the parameter's name, for people.
        param: the parameter's place in the optimizer, (group, index): what tells tasks apart.
        index: which of the parameter's matrices (fused block, head, expert) this is.
        region: the rectangle of the parameter that the matrix is, in the parameter's own dims.
        rows: m of the [m, n] matrix that is orthogonalised; rows * cols == region.numel.
        cols: n.
        layout: where the parameter is stored; share one object among equal layouts.
        flops: to orthogonalise the matrix once.
        key: matrices with the same rows, cols and key may be orthogonalised as one batch.
        state_dims: for each vector that travels to the owner and back, the parameter's dims along
            which it lies: NorMuon's second moments lie along (0,) for nn.Linear, (1,) for
            transformers' Conv1D and for experts [experts, m, n]. A piece of the matrix carries the
            entries that it spans.
        summary_dims: the same of each vector that comes back only; () for a single number.
        wire_bytes: size of an element of the matrix on the wire.
        side_bytes: size of an entry of a vector on the wire.
        split: how a team may divide the matrix; None where it must stay whole.
        slab: which part of a divided matrix this is; the region, rows and cols are the slab's.

    Raises:
        ValueError: an empty matrix, or a size or count that is not positive.

    Example:
        >>> whole = ((0, 4),), ((0, 8),)
        >>> layout = ShardLayout((4, 8), (whole,), (0,))
        >>> MatrixTask(
        ...     name="w", region=Region.whole((4, 8)), rows=4, cols=8, layout=layout, flops=1
        ... ).numel
        32
    """

    name: str
    region: Region
    rows: int
    cols: int
    layout: ShardLayout
    flops: int
    param: tuple[int, int] = (0, 0)
    index: int = 0
    key: str = ""
    state_dims: tuple[Dims, ...] = ()
    summary_dims: tuple[Dims, ...] = ()
    wire_bytes: int = 2
    side_bytes: int = 4
    split: Split | None = None
    slab: Slab | None = None

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.rows * self.cols != self.region.numel:
            raise ValueError(
                f"{self.label} {list(self.region.shape)} of {list(self.layout.global_shape)}: pass "
                f"rows and cols whose product is the region's {self.region.numel} elements, not "
                f"{self.rows} x {self.cols}"
            )
        if self.flops < 1:
            raise ValueError(f"{self.label}: flops={self.flops} must be at least 1")

    @property
    def label(self) -> str:
        """The matrix's name for people: `name[index]`."""
        return f"{self.name}[{self.index}]"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the whole matrix."""
        return (self.rows, self.cols) if self.slab is None else (self.slab.rows, self.slab.cols)

    @property
    def numel(self) -> int:
        """Elements of the matrix."""
        return self.rows * self.cols

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the whole matrix on the wire, without vectors."""
        return self.numel * self.wire_bytes

    def vector_bytes(self, dims: tuple[Dims, ...]) -> int:
        """Bytes of whole vectors that lie along `dims`."""
        entries = (math.prod(self.region.shape[dim] for dim in lying) for lying in dims)
        return self.side_bytes * sum(entries)

    @property
    def returned_dims(self) -> tuple[Dims, ...]:
        """The dims of the vectors that come back: the state's, and the summary's."""
        return (*self.state_dims, *self.summary_dims)

    @property
    def batch_key(self) -> tuple[int, int, str, int]:
        """Matrices with the same batch key may be orthogonalised together."""
        return (self.rows, self.cols, self.key, self.wire_bytes)

    @property
    def num_swaps(self) -> int:
        """How often the members of this slab's team exchange; 0 for a whole matrix."""
        if self.slab is None or self.split is None:
            return 0
        return self.split.num_swaps(self.slab.team)

    @property
    def swapped_bytes(self) -> int:
        """What this slab's member sends to the others, statistics left out; it receives as much."""
        if self.slab is None or self.split is None:
            return 0
        return self.split.swapped_bytes(self.slab.team, self.slab.number)

    @property
    def largest_team(self) -> int:
        """How many ranks may have a slab of this matrix."""
        return 1 if self.split is None else self.region.shape[self.split.dim]

    def slabs(self, team: Team, ranks: Sequence[int]) -> list[MatrixTask]:
        """The matrix divided among a team, one task for each member.

        Args:
            team: how.
            ranks: its members.
        """
        assert self.split is not None
        split, found = self.split, []
        size = self.region.shape[split.dim]
        for number, (start, stop) in enumerate(even_cuts(size, team.size)):
            offsets, shape = list(self.region.offsets), list(self.region.shape)
            offsets[split.dim] += start
            shape[split.dim] = stop - start
            length = (stop - start) * split.long // size
            found.append(
                replace(
                    self,
                    region=Region(tuple(offsets), tuple(shape)),
                    rows=length if split.cuts_rows else self.rows,
                    cols=self.cols if split.cuts_rows else length,
                    flops=split.flops(team, number, length),
                    key=f"{self.key}, a slab of {self.rows} x {self.cols} by {team}",
                    slab=Slab(team, number, tuple(ranks), self.rows, self.cols),
                )
            )
        return found
