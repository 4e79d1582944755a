"""Which file may import which: arrows point down only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import normuon
from tests.module_imports import imports_of, module_name

PACKAGE = Path(normuon.__file__).parent

# Each file may import from normuon only what stands before it.
ORDER = [
    "orthogonalize.coefficients",
    "orthogonalize.precision",
    "orthogonalize.flops",
    "orthogonalize.segments",
    "orthogonalize.symmetric",
    "orthogonalize.workspace",
    "orthogonalize.triton_normalize",
    "orthogonalize.triton_symmetric",
    "orthogonalize.fused",
    "orthogonalize.normalize",
    "orthogonalize.iteration",
    "orthogonalize.compiled",
    "orthogonalize.kernels",
    "orthogonalize.backend",
    "orthogonalize",
    "step",
    "step.rule",
    "step.triton_passes",
    "step.fused_neurons",
    "step.addresses",
    "step.staging",
    "models",
    "models.view",
    "models.blocks",
    "step.int8",
    "models.wrappers",
    "momentum_forms",
    "learning_rate",
    "step.normalizer",
    "options",
    "params",
    "step.pieces",
    "state",
    "changes",
    "checkpoint",
    "step.coded_momenta",
    "step.fused",
    "step.figures",
    "step.order",
    "step.slabs",
    "step.adamw",
    "step.record",
    "step.local",
    "step.matrix_tasks",
    "step.team",
    "step.shared_params",
    "step.bucket",
    "step.flags",
    "step.shared_record",
    "step.shared_maxima",
    "step.owners",
    "step.sharded",
    "models.rules",
    "models.heads",
    "models.attention",
    "models.groups",
    "convert_sources",
    "convert",
    "statistics",
    "optimizer",
    "planning",
    "integrations",
    "integrations.loggers",
    "integrations.torchtitan",
    "integrations.transformers",
    "integrations.lightning",
    "integrations.attention_logits",
    "integrations.attention_rows",
    "integrations.qk_clip",
    "",
]


def inner_name(path: Path) -> str:
    return module_name(path).removeprefix("normuon").removeprefix(".")


OUTSIDE_DISTRIBUTED = [p for p in sorted(PACKAGE.rglob("*.py")) if "distributed" not in p.parts]


def test_every_place_in_the_order_is_taken():
    assert {inner_name(path) for path in OUTSIDE_DISTRIBUTED} == set(ORDER)
    assert {path.stem for path in DISTRIBUTED} == {*ORDER_IN_DISTRIBUTED, "__init__"}


@pytest.mark.parametrize("path", OUTSIDE_DISTRIBUTED, ids=inner_name)
def test_imports_point_down(path):
    name = inner_name(path)
    assert name in ORDER, f"{name} has no place in the order of the house"
    allowed = set(ORDER[: ORDER.index(name)])
    for imported in imports_of(path):
        if imported.startswith("normuon_lab"):
            pytest.fail(f"{name} imports the lab")
        if imported.startswith("normuon.distributed"):
            continue  # It stands below all of these: it imports none of them.
        if imported.startswith("normuon."):
            inner = imported.removeprefix("normuon.")
            assert inner in allowed, f"{name} imports {inner}, which stands above it"


ON_ONE_DEVICE = [
    *("rule", "normalizer", "pieces", "order", "local", "adamw"),
    *("addresses", "fused", "fused_neurons", "triton_passes", "staging", "figures", "record"),
    *("int8", "coded_momenta"),
]
"""The files of `step` that know nothing of ranks."""


@pytest.mark.parametrize("name", ON_ONE_DEVICE)
def test_the_step_on_one_device_imports_nothing_that_knows_of_ranks(name):
    inner = imports_of(PACKAGE / "step" / f"{name}.py")
    assert not any(module.startswith("normuon.distributed") for module in inner)
    others = {f"normuon.step.{other}" for other in ON_ONE_DEVICE}
    assert {m for m in inner if m.startswith("normuon.step.")} <= others


# Each file of `distributed` may import from it only what stands before it.
ORDER_IN_DISTRIBUTED = [
    "layout",
    "slabs",
    "task",
    "tiling",
    "balance",
    "cost",
    "assignment",
    "teams",
    "plan",
    "agreement",
    "copies",
    "exchange",
    "dtensor",
]

WITH_TORCH = ["agreement", "copies", "exchange", "dtensor"]
"""The files of `distributed` that touch tensors; all others are pure Python."""

DISTRIBUTED = sorted((PACKAGE / "distributed").glob("*.py"))


@pytest.mark.parametrize("name", ORDER_IN_DISTRIBUTED)
def test_imports_point_down_in_distributed_too(name):
    below = ORDER_IN_DISTRIBUTED[: ORDER_IN_DISTRIBUTED.index(name)]
    for imported in imports_of(PACKAGE / "distributed" / f"{name}.py"):
        if imported.startswith("normuon.distributed."):
            inner = imported.removeprefix("normuon.distributed.")
            assert inner in below, f"{name} imports {inner}, which stands above it"


@pytest.mark.parametrize("path", DISTRIBUTED, ids=lambda path: path.stem)
def test_the_planner_imports_no_torch(path):
    """Regions, costs and plans are pure Python: a plan needs neither processes nor devices."""
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert "normuon_lab" not in roots
    assert ("torch" in roots) == (path.stem in WITH_TORCH)
    assert "numpy" not in roots


@pytest.mark.parametrize("path", DISTRIBUTED, ids=lambda path: path.stem)
def test_plans_and_exchanges_know_nothing_of_the_optimizer(path):
    """`distributed` imports nothing of the library but itself."""
    inner = {name for name in imports_of(path) if name.startswith("normuon.")}
    assert all(name.startswith("normuon.distributed") for name in inner)


def test_the_library_imports_torch_and_the_standard_library_only():
    """An adapter may import its framework too, and kernels the language they are written in."""
    for path in PACKAGE.rglob("*.py"):
        allowed = {*sys.stdlib_module_names, "torch", "normuon"}
        if path.name.startswith("triton_"):
            allowed.add("triton")
        if path.parent.name == "integrations":
            allowed.add({"qk_clip": "transformers"}.get(path.stem, path.stem))
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert roots <= allowed, f"{path.name} imports {sorted(roots - allowed)}"


def test_importing_the_library_loads_no_optional_package():
    """triton is not in the list: torch's own tracer loads it where it is installed."""
    code = (
        "import normuon, sys; print([m for m in ('transformers', 'rich', 'gram_newton_schulz', "
        "'torchtitan', 'normuon_lab') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=inner_name)
def test_a_header_says_what_its_own_file_does(path):
    """What other files do, the imports say; a sentence about them goes stale unseen."""
    header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert not re.findall(r"`[a-z_/]+\.py`", header)
