"""The sources of a run's settings: named presets and TOML files."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from normuon_lab.atomic_files import read_toml, write_text
from normuon_lab.errors import require
from normuon_lab.train.pretrain.config import PretrainConfig

DEFAULT_PRESET = "llama-tiny"

PRETRAIN_PRESETS = read_toml(Path(__file__).with_name("presets.toml"))


def pretrain_preset(name: str) -> PretrainConfig:
    """The configuration of a named run.

    Raises:
        InputError: there is no such preset; lists them.

    Example:
        >>> pretrain_preset("llama-1.1b").batch.tokens_per_step
        2097152
    """
    require(
        name in PRETRAIN_PRESETS,
        f"unknown preset {name}; known are {', '.join(PRETRAIN_PRESETS)}",
    )
    values = {**PRETRAIN_PRESETS[name], "preset": name}
    base = values.pop("base", None)
    start = PretrainConfig() if base is None else pretrain_preset(base)
    return merged(start, values, source="presets.toml")


Config = TypeVar("Config")


def write_config(path: Path, config: PretrainConfig) -> None:
    """Save a resolved configuration, so that `--config` on it alone repeats the run."""
    import tomli_w

    write_text(path, tomli_w.dumps(config.to_values()))


def merged(config: Config, values: Mapping[str, Any], *, source: str, where: str = "") -> Config:
    """A configuration with some values replaced.

    Raises:
        InputError: an unknown key or a value of another type; names it.

    Example:
        >>> merged(PretrainConfig(), {"batch": {"steps": 9}}, source="a.toml",).batch.steps
        Traceback (most recent call last):
        ...
        normuon_lab.errors.InputError: --warmup-steps 10: give fewer than the 9 steps of the run
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
