"""One matrix to orthogonalise, as the planner sees it: a rectangle of a sharded parameter.

Built by whoever knows the parameters (`layout` for DTensors, the offline planner for a model's
shapes); says nothing about who computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from normuon.distributed.cost import DTYPE_BYTES
from normuon.distributed.region import Region, ShardLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixTask:
    """One [rows, cols] matrix of a parameter.

    Args:
        name: the parameter's qualified name.
        index: which of the parameter's matrices (fused block, head, expert) this is.
        region: the rectangle of the parameter that the matrix is, in the parameter's own dims.
        rows: m of the [m, n] matrix that is orthogonalised; rows * cols == region.numel.
        cols: n.
        layout: where the parameter is stored; share one object among equal layouts.
        key: matrices with the same rows, cols and key may be orthogonalised as one batch.
        neuron_dims: the parameter's dims along which neurons lie: (0,) for nn.Linear, (1,) for
            transformers' Conv1D and for experts [experts, m, n]. The second moment v has one entry
            per index of these dims, so a piece carries the entries that it spans. Empty for Muon,
            which has no v.
        wire_dtype: dtype in which the matrix and its orthogonalisation travel.
        neuron_dtype: dtype in which v travels.

    Raises:
        ValueError: an empty matrix, a region outside the parameter, or sizes that do not match.

    Example:
        >>> whole = Region.whole((4, 8))
        >>> layout = ShardLayout((4, 8), ((whole,),))
        >>> MatrixTask(name="w", region=whole, rows=4, cols=8, layout=layout).num_neurons
        4
    """

    name: str
    region: Region
    rows: int
    cols: int
    layout: ShardLayout
    index: int = 0
    key: str = ""
    neuron_dims: tuple[int, ...] = (0,)
    wire_dtype: str = "bfloat16"
    neuron_dtype: str = "float32"

    def __post_init__(self) -> None:
        where = f"{self.label} {list(self.region.shape)} of {list(self.layout.global_shape)}"
        if len(self.region.shape) != len(self.layout.global_shape) or not Region.whole(
            self.layout.global_shape
        ).contains(self.region):
            raise ValueError(f"{where}: {self.region} is not a rectangle of the parameter")
        if self.rows < 1 or self.cols < 1 or self.rows * self.cols != self.region.numel:
            raise ValueError(
                f"{where}: pass rows and cols of which the product is the region's "
                f"{self.region.numel} elements, not {self.rows} x {self.cols}"
            )
        dims = self.neuron_dims
        if len(set(dims)) != len(dims) or not all(0 <= d < self.num_dims for d in dims):
            raise ValueError(f"{where}: neuron_dims {dims} must be distinct dims of the parameter")
        if dims and self.num_neurons not in (self.rows, self.cols):
            raise ValueError(
                f"{where}: neuron_dims {dims} span {self.num_neurons} neurons; pass dims that span "
                f"the {self.rows} rows or the {self.cols} columns"
            )
        for dtype in (self.wire_dtype, self.neuron_dtype):
            if dtype not in DTYPE_BYTES:
                raise ValueError(f"{where}: dtype {dtype!r}; pass one of {sorted(DTYPE_BYTES)}")

    @property
    def label(self) -> str:
        """The matrix's name for people: `name[index]`."""
        return f"{self.name}[{self.index}]"

    @property
    def num_dims(self) -> int:
        """Dims of the parameter."""
        return len(self.layout.global_shape)

    @property
    def numel(self) -> int:
        """Elements of the matrix."""
        return self.rows * self.cols

    @property
    def num_neurons(self) -> int:
        """Entries of v for this matrix: the extents of `neuron_dims`, multiplied."""
        if not self.neuron_dims:
            return 0
        return math.prod(self.region.shape[dim] for dim in self.neuron_dims)

    @property
    def wire_bytes(self) -> int:
        """Bytes of one element of the matrix on the wire."""
        return DTYPE_BYTES[self.wire_dtype]

    @property
    def neuron_bytes(self) -> int:
        """Bytes of one entry of v on the wire."""
        return DTYPE_BYTES[self.neuron_dtype]

    @property
    def batch_key(self) -> tuple[int, int, str, str]:
        """Matrices with the same batch key may be orthogonalised together."""
        return (self.rows, self.cols, self.key, self.wire_dtype)
