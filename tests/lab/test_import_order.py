"""The lab's files import one another in one direction, imports inside functions included."""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import normuon_lab
from tests.module_imports import imports_of, module_name

PACKAGE = Path(normuon_lab.__file__).parent
MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {name: imports_of(path) & MODULES.keys() - {name} for name, path in MODULES.items()}


def test_no_file_imports_itself_by_a_detour():
    """`TopologicalSorter` raises `CycleError`, which names the circle."""
    order = list(TopologicalSorter(IMPORTS).static_order())
    assert len(order) == len(MODULES) > 100
    assert order.index("normuon_lab.errors") < order.index("normuon_lab.train.arms.registry")


def test_no_folder_imports_itself_by_a_detour():
    def folder(name: str) -> str:
        return ".".join(name.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for name in MODULES:
        inner = {folder(imported) for imported in IMPORTS[name]}
        graph.setdefault(folder(name), set()).update(inner - {folder(name)})
    order = list(TopologicalSorter(graph).static_order())
    rooms = [name for name in order if (PACKAGE / name.rpartition(".")[2]).is_dir()]
    assert set(rooms) - {"normuon_lab"} == {
        f"normuon_lab.{room}" for room in ("plan", "data", "train", "bench", "study")
    }
    assert rooms.index("normuon_lab.train") < rooms.index("normuon_lab.study")


@pytest.mark.parametrize("room", ["train", "study"])
def test_no_part_of_a_room_imports_itself_by_a_detour(room: str) -> None:
    def part(name: str) -> str:
        return ".".join(name.split(".")[:3])

    graph: dict[str, set[str]] = {}
    for name in MODULES:
        if name.startswith(f"normuon_lab.{room}."):
            inside = {part(i) for i in IMPORTS[name] if i.startswith(f"normuon_lab.{room}.")}
            graph.setdefault(part(name), set()).update(inside - {part(name)})
    assert len(list(TopologicalSorter(graph).static_order())) >= 3
