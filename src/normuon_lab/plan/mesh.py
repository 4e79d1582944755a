"""A training mesh by its sizes, and how FSDP2 and tensor parallelism place a parameter on it.

Reads no DTensor: placements are spelled as the planner takes them, so no process is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normuon.distributed.layout import Placement
from normuon_lab.errors import require

AXES = ("dp_replicate", "dp_shard", "tp")
"""Mesh axes from the outermost, whose neighbours are far apart, to the innermost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Sizes of the mesh axes; ranks are numbered row-major, `tp` fastest.

    Attributes:
        dp_replicate: replicas of the model, which average their gradients (DDP, HSDP).
        dp_shard: ranks over which FSDP2 shards dim 0 of every parameter.
        tp: ranks that split matrices by tensor parallelism.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """A mesh from `dp_replicate=R,dp_shard=S,tp=T`; axes left out have size 1.

        Raises:
            InputError: an unknown or repeated axis, or a size that is not a positive integer.

        Example:
            >>> Mesh.parse("dp_shard=8,tp=2")
            Mesh(dp_replicate=1, dp_shard=8, tp=2)
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, separator, number = (word.strip() for word in part.partition("="))
            require(separator == "=", f"--mesh {text}: write AXIS=SIZE, such as dp_shard=8,tp=2")
            require(axis in AXES, f"--mesh: unknown axis {axis!r}; known are {', '.join(AXES)}")
            require(axis not in sizes, f"--mesh names {axis} twice")
            is_number = number.isascii() and number.isdigit() and len(number) <= 9
            require(
                is_number and int(number) >= 1,
                f"--mesh: {axis}={number} is not a positive integer",
            )
            sizes[axis] = int(number)
        return cls(**sizes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes in the order of `AXES`."""
        return (self.dp_replicate, self.dp_shard, self.tp)

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.dp_replicate * self.dp_shard * self.tp

    def placements(self, shape: Sequence[int], style: str | None) -> tuple[Placement, ...]:
        """How a parameter lies on the mesh, one placement per axis.

        FSDP2 shards dim 0. Where tensor parallelism shards dim 0 too, FSDP2 splits its shard, which
        DTensor calls a strided shard of as many parts as there are TP ranks.

        Args:
            shape: the parameter's whole shape.
            style: from its model's tensor-parallel plan; see `tp_placement`.

        Example:
            >>> Mesh(dp_shard=4, tp=2).placements((64, 32), "colwise")
            (('replicate',), ('strided_shard', 0, 2), ('shard', 0))
            >>> Mesh(dp_shard=4, tp=2).placements((64, 32), "rowwise")
            (('replicate',), ('shard', 0), ('shard', 1))
        """
        if not shape:
            return (("replicate",),) * 3
        split = tp_placement(style, num_dims=len(shape)) if self.tp > 1 else ("replicate",)
        sharded: Placement = ("shard", 0)
        if len(split) > 1 and split[1] == 0 and self.dp_shard > 1:
            sharded = ("strided_shard", 0, self.tp)
        return (("replicate",), sharded, split)


def tp_placement(style: str | None, *, num_dims: int) -> Placement:
    """Where a style of transformers' tensor-parallel plans puts a parameter on the TP axis.

    For a weight `[out, in]` or experts `[E, out, in]`, `colwise` shards the outputs and `rowwise`
    the inputs. `packed_` weights hold gate and up one after the other, and each of the two is
    sharded. transformers' Conv1D stores `[in, out]`. Other styles replicate weights.

    Example:
        >>> tp_placement("colwise", num_dims=3), tp_placement("rowwise", num_dims=2)
        (('shard', 1), ('shard', 1))
    """
    name = (style or "").removesuffix("_gather_output").removesuffix("_rep")
    name = name.removesuffix("_split_input")
    if num_dims < 2:  # Only a bias of the outputs is cut.
        return ("shard", 0) if name in ("colwise", "conv1d_colwise") else ("replicate",)
    dims: dict[str, Placement] = {
        "colwise": ("shard", num_dims - 2),
        "rowwise": ("shard", num_dims - 1),
        "packed_colwise": ("strided_shard", num_dims - 2, 2),
        "packed_rowwise": ("strided_shard", num_dims - 1, 2),
        "embedding_rowwise": ("shard", 0),
        "embedding_colwise": ("shard", 1),
        "conv1d_colwise": ("shard", num_dims - 1),
        "conv1d_rowwise": ("shard", num_dims - 2),
    }
    return dims.get(name, ("replicate",))


def placements_in_words(placements: Sequence[Placement]) -> str:
    """Placements as torch prints them.

    Example:
        >>> placements_in_words([("replicate",), ("strided_shard", 0, 2), ("shard", 1)])
        'Replicate, _StridedShard(0, 2), Shard(1)'
    """
    names = {"replicate": "Replicate", "shard": "Shard", "strided_shard": "_StridedShard"}
    return ", ".join(
        names[kind] + (f"({', '.join(map(str, numbers))})" if numbers else "")
        for kind, *numbers in placements
    )
