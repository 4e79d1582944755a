"""What the files of a package under `src` import."""

from __future__ import annotations

import ast
from pathlib import Path

import normuon

SOURCE = Path(normuon.__file__).parents[1]


def module_name(path: Path) -> str:
    """`a.b.c` of ``src/a/b/c.py``, `a.b` of ``src/a/b/__init__.py``."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """The modules that a file names in imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
            # `from normuon import rule` imports a module, not a name.
            found |= {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if (SOURCE / str(node.module).replace(".", "/") / f"{alias.name}.py").exists()
            }
    return found
