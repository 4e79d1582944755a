"""`normuon inspect`: the contents of a checkpoint and figures of its matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from normuon_lab.errors import counted, require

# The command line is read before torch is imported, which takes seconds.
if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from normuon import MatrixView

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class InspectCommand:
    """Check a checkpoint of `normuon train`, print its step and sizes, and measure its matrices."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """A checkpoint's folder, or a run's folder for its newest."""
    matrices: str = "*"
    """Pattern of the names of the hidden matrices to measure, such as '*layers.0.*'."""
    json: bool = False
    """Print everything as JSON."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        contents = inspect_checkpoint(self.checkpoint, pattern=self.matrices)
        if self.json:
            from json import dumps

            print(dumps(contents))
            return 0
        from rich.console import Console

        print_contents(contents, Console())
        return 0


def inspect_checkpoint(path: Path, *, pattern: str = "*") -> dict[str, Any]:
    """Everything that the command tells, in plain values.

    Raises:
        InputError: there is no checkpoint, it is damaged, or no matrix has such a name.
    """
    from normuon_lab.train.pretrain.checkpoint import resolve, verify
    from normuon_lab.train.pretrain.checkpoint_tensors import model_of, read_shapes

    path = resolve(path)
    description = verify(path)
    shapes = read_shapes(path)
    model = model_of(description, device="meta")
    matrices = list(_measured(path, model, shapes, pattern))
    require(bool(matrices), f"--matrices {pattern}: no hidden matrix of {path} has such a name")
    return {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": str(path),
        "step": description.step,
        "tokens": description.tokens,
        "world_size": description.world_size,
        "model": description.model_config["model_type"],
        "bytes": sum(entry["bytes"] for entry in description.files.values()),
        "elements": {
            # A tied weight has two names in the checkpoint, and is one parameter.
            "model": sum(parameter.numel() for parameter in model.parameters()),
            "optimizer": sum(
                prod(shape) for name, shape in shapes.items() if name.startswith("optimizer.")
            ),
        },
        "config": description.config,
        "matrices": matrices,
    }


def print_contents(contents: dict[str, Any], console: Console) -> None:
    """The contents as text: a few lines and a table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    elements = contents["elements"]
    console.print(
        f"{contents['checkpoint']}: every byte is intact\n"
        f"step {contents['step']:,}, {counted(contents['tokens'], 'token')}, written by "
        f"{counted(contents['world_size'], 'rank')}\n"
        f"{contents['model']}, {elements['model']:,} elements; optimizer {elements['optimizer']:,} "
        f"elements; {contents['bytes'] / 2**20:,.1f} MiB",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("matrix", overflow="fold")
    table.add_column("shape")
    table.add_column("of")
    for figure in ("condition", "eff. rank", "row CV", "RMS"):
        table.add_column(figure, justify="right", no_wrap=True)
    for matrix in contents["matrices"]:
        for kind in ("weight", "momentum"):
            figures = matrix[kind]
            if figures is not None:
                table.add_row(
                    matrix["name"] if kind == "weight" else "",
                    "x".join(map(str, matrix["shape"])) if kind == "weight" else "",
                    kind,
                    f"{figures['condition']:.3g}",
                    f"{figures['effective_rank']:.1f}",
                    f"{figures['row_norm_cv']:.3f}",
                    f"{figures['rms']:.2g}",
                )
    console.print(table)


def _measured(
    path: Path, model: nn.Module, shapes: dict[str, tuple[int, ...]], pattern: str
) -> Iterator[dict[str, Any]]:
    """Each hidden matrix of the model, its weight and momentum read and measured one at a time."""
    from normuon_lab.train.arms.builders import hidden_groups

    views = {name: group["view"] for group in hidden_groups(model) for name, _ in group["params"]}
    for name, view in views.items():
        if not fnmatchcase(name, pattern):
            continue
        stored = f"model.{name}"
        require(stored in shapes, f"{path} belongs to another model: it has no {stored}")
        # A model's own views keep fused parameters whole: one block each.
        (part,) = view.parts(shapes[stored])
        tensors = {
            "weight": _read(path, stored, shapes[stored]),
            "momentum": _momentum(path, name, shapes, view),
        }
        yield {
            "name": name,
            "shape": [part.m, part.n],
            "matrices": part.batch,
            **{
                kind: None if tensor is None else _figures(tensor, view.matrices(tensor, part))
                for kind, tensor in tensors.items()
            },
        }


def _momentum(
    path: Path, name: str, shapes: dict[str, tuple[int, ...]], view: MatrixView
) -> Tensor | None:
    """The momentum of a hidden matrix; None where the checkpoint has none."""
    from normuon.models.blocks import block_grid
    from normuon.step.int8 import decoded
    from normuon_lab.train.pretrain.diagnostics import MOMENTUM_KEYS

    momenta = [f"optimizer.{name}.{key}" for key in MOMENTUM_KEYS]
    stored = next((key for key in momenta if key in shapes), None)
    if stored is not None:
        return _read(path, stored, shapes[stored])
    codes, absmax = (f"optimizer.{name}.momentum_{part}" for part in ("codes", "absmax"))
    grid = block_grid(view, shapes[codes]) if codes in shapes else None
    if grid is None or shapes[absmax] != grid.shape:
        return None
    return decoded(_read(path, codes, shapes[codes]), _read(path, absmax, grid.shape), grid)


def _figures(tensor: Tensor, matrices: Tensor) -> dict[str, float] | None:
    """The figures of a tensor's matrices; None for one that is zero or not finite."""
    from normuon_lab.train.matrix_figures import matrix_figures

    figures = matrix_figures(matrices)
    if figures is None:
        return None
    return {**asdict(figures), "rms": float(tensor.double().square().mean().sqrt())}


def _read(path: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    import torch

    from normuon_lab.train.pretrain.checkpoint_tensors import load_tensors_

    tensor = torch.empty(shape)
    load_tensors_({name: tensor}, path)
    return tensor
