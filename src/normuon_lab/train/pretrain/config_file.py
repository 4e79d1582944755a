"""Configurations in TOML files: `--config` reads what a run saved, or a few values of one's own."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from normuon_lab.atomic_files import write_text
from normuon_lab.errors import InputError, require
from normuon_lab.train.pretrain.config import PretrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")


def read_values(path: Path) -> dict[str, Any]:
    """The nested values of a TOML file.

    Raises:
        InputError: it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read --config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"--config {path} is not text") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--config {path} is not TOML: {error}") from None


def write_config(path: Path, config: PretrainConfig) -> None:
    """Save a resolved configuration, so that `--config` on it alone repeats the run."""
    import tomli_w

    write_text(path, tomli_w.dumps(config.to_values()))


def merged(config: Config, values: Mapping[str, Any], *, source: str, where: str = "") -> Config:
    """A configuration with some values replaced.

    Args:
        config: a dataclass, possibly of dataclasses.
        values: nested as the configuration is.
        source: what errors call the origin of the values.
        where: dotted name of the section, for errors.

    Raises:
        InputError: an unknown key or a value of another type; names it.

    Example:
        >>> merged(PretrainConfig(), {"batch": {"steps": 9}}, source="a.toml",).batch.steps
        Traceback (most recent call last):
        ...
        normuon_lab.errors.InputError: warmup_steps 10: give fewer than the 9 steps of the run
        >>> merged(PretrainConfig(), {"batch": {"step": 90}}, source="a.toml")
        Traceback (most recent call last):
        ...
        normuon_lab.errors.InputError: a.toml: unknown key batch.step; known are steps, \
batch_size, micro_batch_size, sequence_length
    """
    hints = get_type_hints(type(config), include_extras=True)
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}{key}"
        require(key in hints, f"{source}: unknown key {name}; known are {', '.join(hints)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            require(isinstance(value, Mapping), f"{source}: {name} is a section, not a value")
            changes[key] = merged(current, value, source=source, where=f"{name}.")
        else:
            changes[key] = _converted(hints[key], value, f"{source}: {name}")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _converted(hint: Any, value: Any, label: str) -> Any:
    """`value` as a field of type `hint` holds it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _converted(arguments[0], value, label)
    if origin in (Union, types.UnionType):
        (inner,) = (option for option in arguments if option is not type(None))
        return _converted(inner, value, label)
    if origin is Literal:
        known = ", ".join(map(str, arguments))
        require(value in arguments, f"{label} = {value!r}: choose from {known}")
        return value
    if origin is tuple:
        entries = arguments[:-1] * len(value) if arguments[-1] is Ellipsis else arguments
        is_fitting = isinstance(value, list) and len(entries) == len(value)
        require(is_fitting, f"{label} = {value!r}: give a list of {len(arguments)} values")
        pairs = zip(entries, value, strict=True)
        return tuple(_converted(entry, part, label) for entry, part in pairs)
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, f"{label} = {value!r}: give a value of type {hint.__name__}")
    return value
