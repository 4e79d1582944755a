"""The sources of a run's settings: named presets and TOML files.

The presets are the paper's four models with its figures, and small ones that run anywhere. A
comment marks each value that the paper does not give.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from normuon_lab.atomic_files import write_text
from normuon_lab.data.config import DataConfig
from normuon_lab.errors import InputError, require
from normuon_lab.train.pretrain.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_PRESET = "llama-tiny"

# modded-nanogpt's runs of 6,200 steps decay over the last 1,800 and do not warm up; the paper names
# the kind of the schedule and its length only.
_WSD_DECAY_FRACTION = 1800 / 6200

_LONG_RUN_CHECKPOINTS = CheckpointConfig(
    save_every=500, keep_last=3, keep_every=5000, async_checkpoint=True
)


def _paper_llama(name: str, *, depth: int, micro_batch_size: int) -> PretrainConfig:
    """50B tokens in batches of 2M, 1B of them warmup, linear decay; depth-muP's learning rate.

    The paper's rate is 4e-4 at depth 16, scaled by 1 / sqrt(depth).
    """
    sequence_length, batch_size = 4096, 512
    tokens_per_step = sequence_length * batch_size
    return PretrainConfig(
        preset=name,
        model=ModelConfig(model=name, activation_checkpointing=True),
        batch=BatchConfig(
            steps=round(50e9 / tokens_per_step),
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
        ),
        optimizer=OptimizerConfig(lr=4e-4 * math.sqrt(16 / depth)),
        schedule=ScheduleConfig(schedule="linear", warmup_steps=round(1e9 / tokens_per_step)),
        # The tokenizer is not the paper's word: an open copy of Llama's, of 32,000 tokens.
        data=DataConfig(
            source=("hub:cerebras/SlimPajama-627B",), tokenizer="TinyLlama/TinyLlama_v1.1"
        ),
        evaluation=EvaluationConfig(eval_every=250, eval_tokens=10 * 2**20),
        checkpoint=_LONG_RUN_CHECKPOINTS,
        metrics=MetricsConfig(log_every=10),
    )


def _paper_gpt2(name: str, *, steps: int, optimizer: OptimizerConfig) -> PretrainConfig:
    """512 sequences of 1,024 tokens, warmup-stable-decay."""
    return PretrainConfig(
        preset=name,
        model=ModelConfig(model=name),
        batch=BatchConfig(steps=steps, batch_size=512, micro_batch_size=32, sequence_length=1024),
        optimizer=optimizer,
        schedule=ScheduleConfig(schedule="wsd", warmup_steps=0, decay_fraction=_WSD_DECAY_FRACTION),
        data=DataConfig(source=("hub:HuggingFaceFW/fineweb:sample-10BT",), tokenizer="gpt2"),
        evaluation=EvaluationConfig(eval_every=125, eval_tokens=10 * 2**20),
        checkpoint=_LONG_RUN_CHECKPOINTS,
        metrics=MetricsConfig(log_every=10),
    )


PRETRAIN_PRESETS: dict[str, PretrainConfig] = {
    # A few seconds on one core: to try the command, and for tests.
    "llama-tiny": PretrainConfig(),
    # Minutes to hours on a CPU.
    "llama-small": PretrainConfig(
        preset="llama-small",
        model=ModelConfig(model="llama-small"),
        batch=BatchConfig(steps=2000, batch_size=16, micro_batch_size=8, sequence_length=256),
        optimizer=OptimizerConfig(lr=2e-3),
        schedule=ScheduleConfig(warmup_steps=100),
        evaluation=EvaluationConfig(eval_every=250, eval_tokens=32_768),
        checkpoint=CheckpointConfig(save_every=250),
    ),
    "gpt2-124m": _paper_gpt2(
        "gpt2-124m", steps=6200, optimizer=OptimizerConfig(lr=3.6e-4, adam_lr=3.6e-3)
    ),
    # Norms and biases have no rate in the paper and take the head's. The model is transformers'
    # GPT-2, whose head is tied to the embedding: the one matrix takes the head's rate, since the
    # embedding's would be a hundred times too large for a head.
    "gpt2-350m": _paper_gpt2(
        "gpt2-350m",
        steps=7500,
        optimizer=OptimizerConfig(
            lr=7.5e-4, adam_lr=3e-3, embedding_lr=0.3, head_lr=3e-3, betas=(0.8, 0.95)
        ),
    ),
    "llama-1.1b": _paper_llama("llama-1.1b", depth=16, micro_batch_size=4),
    "llama-5.4b": _paper_llama("llama-5.4b", depth=28, micro_batch_size=2),
}


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
    return PRETRAIN_PRESETS[name]


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
