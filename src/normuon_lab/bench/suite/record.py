"""gpu.json, the results of a run so far, and the page made from it.

The file is written whole after every result, so that a killed run keeps them.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normuon_lab.atomic_files import read_json, write_json, write_text
from normuon_lab.bench.suite.options import PARTS, WAITING, SuiteOptions
from normuon_lab.errors import in_words
from normuon_lab.machine import utc_now

KIND = "normuon gpu suite"
SCHEMA_VERSION = 1


def json_path(out: Path) -> Path:
    """The file of the folder `out`."""
    return out / "gpu.json"


def page_path(out: Path) -> Path:
    """The page of the folder `out`."""
    return out / "gpu.html"


def new_record(options: SuiteOptions, *, device: str, dry_run: bool) -> dict[str, Any]:
    """A record in which every part waits."""
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "command": options.command,
        "created": utc_now(),
        "finished": None,
        "dry_run": dry_run,
        "device": device,
        "seed": options.seed,
        "options": plain(asdict(options)),
        "seconds": options.seconds,
        "elapsed_seconds": 0.0,
        "parts": {
            name: {
                "status": WAITING,
                "reason": None,
                "budget_seconds": None,
                "seconds": None,
                "values": {},
            }
            for name in PARTS
        },
    }


def read_record(path: Path) -> dict[str, Any]:
    """A gpu.json of this version.

    Raises:
        InputError: it is none.
    """
    return read_json(path, kind=KIND, schema_version=SCHEMA_VERSION)


def write_record(record: Mapping[str, Any], out: Path) -> None:
    """Writes gpu.json and, where jinja2 is installed, gpu.html."""
    write_json(json_path(out), plain(record))
    try:
        from normuon_lab.bench.suite.page import render_page
    except ModuleNotFoundError as error:
        if error.name != "jinja2":
            raise
        return  # `page_note` says so.
    try:
        write_text(page_path(out), render_page(plain(record)))
    except Exception as error:  # A page that cannot be made must not cost the measurements.
        print(f"the page could not be made: {in_words(error)}", file=sys.stderr)


def page_note(out: Path) -> str:
    """The message about the page at the end."""
    if page_path(out).exists():
        return f"Page: {page_path(out)}"
    return "No page: jinja2 is not installed, and gpu.json has everything."


def plain(value: Any) -> Any:
    """The same for JSON: infinities and NaN become None, and paths text.

    Example:
        >>> plain({"loss": [1.5, float("nan")], "shape": (2, 3)})
        {'loss': [1.5, None], 'shape': [2, 3]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
