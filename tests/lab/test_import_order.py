"""The lab's files import one another in one direction, imports inside functions included."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import normuon_lab

PACKAGE = Path(normuon_lab.__file__).parent


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            # `from normuon_lab.runs import train` imports a module, not a name.
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= modules & MODULES.keys() or {str(node.module)}
    return found & MODULES.keys()


def test_no_file_imports_itself_by_a_detour():
    """`TopologicalSorter` raises `CycleError`, which names the circle."""
    order = list(TopologicalSorter({name: imports_of(name) for name in MODULES}).static_order())
    assert len(order) == len(MODULES) > 100
    assert order.index("normuon_lab.errors") < order.index("normuon_lab.arms")


def test_no_folder_imports_itself_by_a_detour():
    def folder(name: str) -> str:
        return ".".join(name.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for name in MODULES:
        inner = {folder(imported) for imported in imports_of(name)}
        graph.setdefault(folder(name), set()).update(inner - {folder(name)})
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("normuon_lab.runs") < order.index("normuon_lab.compare")
