"""The file that a sweep writes: what it is called, and reading it without Optuna."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normuon_lab.atomic_files import read_json

KIND = "normuon sweep"
SCHEMA_VERSION = 1


def read_tuned_arms(path: Path) -> dict[str, Any]:
    """What an export says of the arms that were tried; nothing where there is no file.

    Raises:
        InputError: the file is not what it should be.
    """
    if not path.exists():
        return {}
    contents = read_json(path, kind=KIND, schema_version=SCHEMA_VERSION)
    return {name: arm for name, arm in contents["arms"].items() if arm["trials"]}
