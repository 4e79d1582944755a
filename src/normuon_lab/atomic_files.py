"""Files that are written whole or not at all, and JSON and TOML that is read with clear errors."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from normuon_lab.errors import InputError, in_words, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROBE = ".normuon."
"""Prefix of the temporary files that check whether a folder can be written."""


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON beside `path` and rename it there, so that a reader never sees half a file."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text beside `path` and rename it there."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes beside `path` and rename them there; of a symbolic link, beside its target."""
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def prove_file(path: Path, what: str) -> None:
    """Makes the file's folder and checks that the file can be written, before any work.

    Raises:
        InputError: it cannot be; the message begins with `what`, such as ``"--out tuned.json"``.
    """
    target = Path(os.path.realpath(path))
    require(not os.path.isdir(target), f"{what} is a folder; give a file")
    require(not os.path.islink(target), f"{what} is a symbolic link that leads to itself")
    # Renaming a file onto a device or a pipe would put the file in its place.
    is_free = not os.path.exists(target) or os.path.isfile(target)
    require(is_free, f"{what} is a device or a pipe; give a file")
    prove_folder(target.parent, what)


def prove_folder(folder: Path, what: str) -> None:
    """Makes a folder and checks that files can be written in it, before any work.

    Raises:
        InputError: they cannot; the message begins with `what`, such as ``"--out runs/compare"``.
    """
    # Not Path's own questions, which raise for a name that is too long.
    above = (folder, *folder.absolute().parents)
    standing = next(part for part in above if os.path.exists(part))
    require(os.path.isdir(standing), f"{what}: {standing} is a file, not a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without a name where the system can, so that others who look into the folder see nothing.
        with TemporaryFile(dir=folder, prefix=PROBE):
            pass
    except OSError as error:
        raise InputError(f"{what} cannot be written: {error.strerror}") from None


def read_json(path: Path, *, kind: str, schema_version: int) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote.

    Raises:
        InputError: it is unreadable, of another kind, or of another schema version.
    """
    try:
        # An editor may have put a byte order mark in front.
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text, parse_constant=_refuse_constant)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON") from error
    found = values.get("kind") if isinstance(values, dict) else None
    require(found == kind, f"{path} was not written by `{kind}`")
    version = values.get("schema_version")
    require(
        version == schema_version,
        f"{path} has schema version {version}; this version of normuon reads {schema_version}",
    )
    return dict(values)


def read_toml(path: Path, *, what: str = "") -> dict[str, Any]:
    """The nested values of a TOML file.

    Raises:
        InputError: it cannot be read or is not TOML; names it as `what`, such as
            ``"--config a.toml"``, or by its path.
    """
    what = what or str(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {what}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{what} is not text") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{what} is not TOML: {error}") from None


@contextmanager
def damage_named(path: Path | str) -> Iterator[None]:
    """Around what takes a file of ours apart: an entry that is missing or odd is one line.

    Raises:
        InputError: names the file.
    """
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {in_words(error)}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
