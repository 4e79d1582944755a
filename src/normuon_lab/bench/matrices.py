"""Which matrices a benchmark steps: shapes as the user writes them, or those of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from normuon_lab.errors import InputError, require
from normuon_lab.layer_names import layer_of

MAX_SIDE = 65_536
"""A typing error should not ask for terabytes."""


@dataclass(frozen=True, slots=True)
class MatrixClass:
    """Equal matrices: `count` of `rows` output neurons and `cols` inputs."""

    rows: int
    cols: int
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.cols

    @property
    def numel(self) -> int:
        """Elements of all of them."""
        return self.count * self.rows * self.cols

    def __str__(self) -> str:
        return f"{self.count}x{self.rows}x{self.cols}"


def parse_shapes(text: str) -> tuple[MatrixClass, ...]:
    """Matrices written as ``rows x cols`` or ``count x rows x cols``, separated by commas.

    Raises:
        InputError: names the part that is neither.

    Example:
        >>> [str(matrices) for matrices in parse_shapes("4x768x768,3072x768")]
        ['4x768x768', '1x3072x768']
    """
    counts: Counter[tuple[int, int]] = Counter()
    for part in text.split(","):
        sizes = part.strip().lower().split("x")
        if len(sizes) not in (2, 3) or not all(re.fullmatch("[0-9]{1,9}", size) for size in sizes):
            raise InputError(
                f"--shapes {part.strip() or text!r}: write ROWSxCOLS or COUNTxROWSxCOLS, such as "
                "4x768x768,3072x768"
            )
        count, rows, cols = (int(size) for size in (["1", *sizes] if len(sizes) == 2 else sizes))
        require(
            count >= 1 and 1 <= rows <= MAX_SIDE and 1 <= cols <= MAX_SIDE,
            f"--shapes {part.strip()}: counts and sides are at least 1, sides at most {MAX_SIDE:,}",
        )
        counts[rows, cols] += count
    return _classes(counts)


def model_matrices(model: str, *, num_layers: int | None = None) -> tuple[MatrixClass, ...]:
    """The hidden matrices of a model's first layers, as `normuon.param_groups` sees them.

    The model is a preset, a transformers config.json, or the folder of one.

    Raises:
        InputError: no such model, or one without that many layers.
    """
    from normuon_lab.plan.model_matrices import model_shapes

    counts: Counter[tuple[int, int]] = Counter()
    layers: set[int] = set()
    for param in model_shapes(model).params:
        layer = layer_of(param.name)
        if param.view is None:
            continue
        if layer is not None:
            layers.add(layer)
            if num_layers is not None and layer >= num_layers:
                continue
        for count, rows, cols in param.view.shapes(param.shape):
            counts[rows, cols] += count
    require(bool(counts), f"{model} has no hidden matrices to orthogonalise")
    require(
        num_layers is None or num_layers <= len(layers),
        f"--layers {num_layers}: {model} has {len(layers)}",
    )
    return _classes(counts)


def _classes(counts: Mapping[tuple[int, int], int]) -> tuple[MatrixClass, ...]:
    return tuple(MatrixClass(rows, cols, count) for (rows, cols), count in counts.items())
