"""`normuon plan`: its options and checks, and where its results go."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from normuon_lab.command_line import recorded_command
from normuon_lab.errors import InputError, require

MAX_RANKS = 16_384
"""Llama-3-70B on as many is planned in 5 s; a typing error should not cost hours."""


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Show which rank would orthogonalise which matrix on a mesh, and what that costs.

    Needs no GPU, no processes and no weights. It assumes float32 weights under FSDP2, which shards
    dim 0 over dp_shard and replicates over dp_replicate, and transformers' tensor-parallel plan for
    the model: q, k, v, gate and up are split by outputs, o and down by inputs,
    experts each by their intermediate width, GPT-2 as Megatron-LM splits it.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """gpt2-124m, gpt2-350m, llama-1.1b, llama-5.4b, llama3-8b, llama3-70b, mixtral-8x7b,
    llama-tiny, llama-small, or a transformers config.json."""
    mesh: str = "dp_shard=8"
    """Sizes of the mesh, as dp_replicate=R,dp_shard=S,tp=T; missing axes are 1."""
    split_heads: bool = False
    """Every attention head of the query, key and value projections is a separate matrix, as with
    param_groups(model, split_heads=True)."""
    json: bool = False
    """Print everything as JSON."""
    html: Path | None = None
    """File for a page with charts."""
    flops_per_second: float = 2e14
    """FLOP/s of one rank in Newton-Schulz, for predicted times."""
    bytes_per_second: float = 5e10
    """Bytes/s that one rank sends, for predicted times."""
    node_bytes_per_second: float | None = None
    """Bytes/s that one rank sends within its node; default: --bytes-per-second."""
    ranks_per_node: int = 8
    """Ranks of a node, numbered one after another."""
    teams: Literal["off", "auto"] = "off"
    """auto: up to eight ranks of a node divide a matrix where that shortens the predicted step."""
    balance: Literal["flops", "paper"] = "flops"
    """How owners are chosen: by FLOPs, or the paper's sort and round-robin."""
    bucket_bytes: int = 256 * 1024 * 1024
    """Bound on the bytes that a rank packs for one exchange, or twice the largest matrix."""
    wire_dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    """Dtype of matrices on the wire."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        from normuon_lab.plan.mesh import Mesh

        mesh = Mesh.parse(self.mesh)
        self._check(mesh.world_size)

        from normuon.distributed.cost import CostModel
        from normuon_lab.plan.contents import PlanRequest, plan_contents, plan_model
        from normuon_lab.plan.model_matrices import model_shapes

        shapes = model_shapes(self.model, split_heads=self.split_heads)
        request = PlanRequest(
            mesh=mesh,
            balance=self.balance,
            bucket_bytes=self.bucket_bytes,
            wire_dtype=self.wire_dtype,
            cost_model=CostModel(
                flops_per_second=self.flops_per_second,
                bytes_per_second=self.bytes_per_second,
                node_bytes_per_second=self.node_bytes_per_second,
                ranks_per_node=self.ranks_per_node,
            ),
            teams=self.teams,
        )
        contents = plan_contents(plan_model(shapes, request))
        if self.html is not None:
            from normuon_lab.atomic_files import write_text
            from normuon_lab.plan.page import render_page

            page = render_page(contents, command=recorded_command())
            try:
                write_text(self.html, page)
            except OSError as error:
                raise InputError(f"cannot write --html {self.html}: {error.strerror}") from None
        if self.json:
            print(json.dumps(contents))
            return 0
        from rich.console import Console

        from normuon_lab.plan.text import print_plan

        console = Console()
        print_plan(contents, console)
        if self.html is not None:
            console.print(f"Page: {self.html}", highlight=False, soft_wrap=True)
        return 0

    def _check(self, world_size: int) -> None:
        """Checks that do not depend on the model."""
        require(
            world_size <= MAX_RANKS, f"--mesh has {world_size:,} ranks; give at most {MAX_RANKS:,}"
        )
        for name in ("flops_per_second", "bytes_per_second", "node_bytes_per_second"):
            rate = getattr(self, name)
            if rate is None:
                continue
            option = f"--{name.replace('_', '-')}"
            require(rate > 0 and math.isfinite(rate), f"{option} {rate:g}: give a positive number")
        require(
            self.ranks_per_node >= 1, f"--ranks-per-node {self.ranks_per_node}: give at least 1"
        )
        require(
            self.teams == "off" or self.balance == "flops",
            "--teams auto divides matrices by FLOPs: leave --balance paper out",
        )
        require(self.bucket_bytes >= 1, f"--bucket-bytes {self.bucket_bytes}: give at least 1")
        if self.html is not None:
            from normuon_lab.atomic_files import prove_file

            folder = self.html.parent
            require(folder.is_dir(), f"--html {self.html}: there is no folder {folder}")
            prove_file(self.html, f"--html {self.html}")
