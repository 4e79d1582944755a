"""The configuration of a training run, as frozen and validated values; each field is a flag.

Nothing here imports torch: the command line reads and checks a configuration before anything slow
starts.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from normuon_lab.data.config import DataConfig
from normuon_lab.errors import flag, require
from normuon_lab.train.arms.registry import PRETRAINING_ARMS

TRACKERS = ("tensorboard", "wandb", "trackio")


def _require_at_least(config: object, **least: float) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        is_good = math.isfinite(value) and value >= bound
        require(is_good, f"{flag(name)} {value}: give at least {bound:g}")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        is_good = value is None or (math.isfinite(value) and value > 0)
        require(is_good, f"{flag(name)} {value}: give a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model is trained."""

    model: str = "llama-tiny"
    """A named model, a transformers configuration (config.json or its folder), or a Hub name."""
    pretrained: bool = False
    """Start from the weights (safetensors) beside the configuration, not from random ones."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of forward and backward. Weights, gradients and optimizer state stay float32.
    auto: bfloat16 on CUDA, float32 on CPU."""
    activation_checkpointing: bool = False
    """Recompute the activations of each layer in the backward pass instead of keeping them."""
    compile: bool = False
    """torch.compile each layer; needs a C++ compiler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """How much is read per step and in all."""

    steps: int = 200
    """Optimizer steps of the whole run."""
    batch_size: int = 16
    """Sequences per optimizer step, over all ranks and micro batches."""
    micro_batch_size: int = 16
    """Sequences that one rank takes through the model at once; the rest of its share of the batch
    is accumulated."""
    sequence_length: int = 128
    """Tokens per sequence."""

    def __post_init__(self) -> None:
        _require_at_least(self, steps=1, batch_size=1, micro_batch_size=1, sequence_length=1)

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one optimizer step."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer; hidden matrices on one side, embeddings, head, norms, biases on the other."""

    arm: str = "normuon"
    """adamw, muon or normuon."""
    lr: float = 4e-3
    """Peak learning rate of hidden matrices."""
    adam_lr: float | None = None
    """Peak learning rate of the AdamW parameters; by default `lr`."""
    embedding_lr: float | None = None
    """Peak learning rate of the input embedding; by default `adam_lr`."""
    head_lr: float | None = None
    """Peak learning rate of the output head, also if it is tied to the embedding; by default
    `adam_lr`."""
    weight_decay: float = 0.1
    """Decoupled, on hidden matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    momentum: float = 0.95
    """Muon's momentum, and NorMuon's first beta."""
    beta2: float = 0.95
    """NorMuon's second beta."""
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of NorMuon's Newton-Schulz; auto: as the forward pass. (Muon's is bfloat16.)"""
    momentum_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Dtype of NorMuon's momentum; auto: the weights'. int8: 1.03 bytes a weight."""
    split_heads: bool = False
    """NorMuon orthogonalises each attention head's queries, keys and values separately."""
    equilibrate: bool = False
    """NorMuon equalises the rows and columns of a direction before orthogonalising it."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0: no clipping."""

    def __post_init__(self) -> None:
        require(
            self.arm in PRETRAINING_ARMS,
            f"unknown arm {self.arm!r}: choose from {', '.join(PRETRAINING_ARMS)}",
        )
        for name, unset in (
            ("split_heads", False),
            ("equilibrate", False),
            ("momentum_dtype", "auto"),
        ):
            require(
                self.arm == "normuon" or getattr(self, name) == unset,
                f"{flag(name)} is an option of NorMuon: leave it out with --arm {self.arm}",
            )
        _require_positive(self, "lr", "adam_lr", "embedding_lr", "head_lr")
        _require_at_least(self, weight_decay=0, max_grad_norm=0)
        for name, value in (
            *(("betas", beta) for beta in self.betas),
            ("momentum", self.momentum),
            ("beta2", self.beta2),
        ):
            require(0.0 <= value < 1.0, f"{flag(name)} {value}: give a number from 0 to below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run, as a factor on the peak."""

    schedule: Literal["linear", "wsd"] = "linear"
    """linear: warmup, then decay to 0 over the rest. wsd: warmup, stable, decay to 0 at the end."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises to its peak."""
    decay_fraction: float = 0.29
    """wsd: share of all steps, at the end, over which it falls."""

    def __post_init__(self) -> None:
        _require_at_least(self, warmup_steps=0)
        is_share = 0.0 <= self.decay_fraction <= 1.0
        require(is_share, f"--decay-fraction {self.decay_fraction}: give a number from 0 to 1")

    def decay_steps(self, steps: int) -> int:
        """Steps at the end of `steps` over which the rate falls."""
        if self.schedule == "linear":
            return steps - self.warmup_steps
        return round(self.decay_fraction * steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the ranks of torchrun share the work; one process needs none of it."""

    dp_replicate: int = 1
    """Replicas of the model, which average their gradients (HSDP)."""
    dp_shard: int | None = None
    """Ranks over which FSDP2 shards each replica; by default all remaining ranks."""
    tp: int = 1
    """Ranks that split matrices by tensor parallelism."""

    def __post_init__(self) -> None:
        _require_at_least(self, dp_replicate=1, tp=1)
        if self.dp_shard is not None:
            _require_at_least(self, dp_shard=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Validation during the run."""

    eval_every: int = 50
    """Steps between evaluations; the last step is evaluated too. 0: never."""
    eval_tokens: int = 16_384
    """Held-out tokens that each evaluation reads, the same at every one."""

    def __post_init__(self) -> None:
        _require_at_least(self, eval_every=0, eval_tokens=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What is kept of the run."""

    save_every: int = 100
    """Steps between checkpoints; the last step is saved too. 0: only the last."""
    keep_last: int = 3
    """How many of the newest checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Also keep the checkpoints of every so many steps; 0: none."""
    async_checkpoint: bool = False
    """Write while training continues; needs memory for one copy of what is saved."""

    def __post_init__(self) -> None:
        _require_at_least(self, save_every=0, keep_last=0, keep_every=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """What is measured and where it goes; OUT/metrics.jsonl always."""

    log_every: int = 1
    """Steps between rows of metrics, each of which waits for the device once."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Other destinations of metrics: tensorboard, wandb, trackio."""
    diagnose: str = "off"
    """every=N: measure the update of each hidden matrix at every N-th step; off."""
    device_tflops: float | None = None
    """Peak of one device in bfloat16 TFLOP/s, for MFU; by default the GPU's where that is known,
    and in a dry run an H100's."""

    def __post_init__(self) -> None:
        _require_at_least(self, log_every=1)
        _require_positive(self, "device_tflops")
        for name in self.trackers:
            require(
                name in TRACKERS, f"unknown tracker {name!r}: choose from {', '.join(TRACKERS)}"
            )
            require(self.trackers.count(name) == 1, f"--trackers names {name} twice")
        is_known = self.diagnose == "off" or self.diagnose_every > 0
        require(is_known, f"--diagnose {self.diagnose}: give every=N, such as every=100, or off")

    @property
    def diagnose_every(self) -> int:
        """Steps between measurements of the updates; 0 for none."""
        _, _, number = self.diagnose.partition("every=")
        return int(number) if number.isascii() and number.isdigit() else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The hardware that --dry-run assumes, besides --device-tflops."""

    num_ranks: int = 8
    """--dry-run: number of devices, unless --dp-shard gives it."""
    bandwidth: float = 50.0
    """--dry-run: GB/s that one device sends."""
    mfu: float = 0.4
    """--dry-run: share of the peak that forward and backward reach."""

    def __post_init__(self) -> None:
        _require_at_least(self, num_ranks=1)
        _require_positive(self, "bandwidth", "mfu")
        require(self.mfu <= 1, f"--mfu {self.mfu}: give a share of the peak, at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """The resolved configuration of one training run."""

    preset: str = "llama-tiny"
    """Source of all values that neither a flag nor --config gives."""
    seed: int = 0
    """Sets initial weights, data order and dropout."""
    model: Annotated[ModelConfig, tyro.conf.OmitArgPrefixes] = ModelConfig()
    batch: Annotated[BatchConfig, tyro.conf.OmitArgPrefixes] = BatchConfig()
    optimizer: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = OptimizerConfig()
    schedule: Annotated[ScheduleConfig, tyro.conf.OmitArgPrefixes] = ScheduleConfig()
    data: DataConfig = field(default_factory=DataConfig)
    parallel: Annotated[ParallelConfig, tyro.conf.OmitArgPrefixes] = ParallelConfig()
    evaluation: Annotated[EvaluationConfig, tyro.conf.OmitArgPrefixes] = EvaluationConfig()
    checkpoint: Annotated[CheckpointConfig, tyro.conf.OmitArgPrefixes] = CheckpointConfig()
    metrics: Annotated[MetricsConfig, tyro.conf.OmitArgPrefixes] = MetricsConfig()

    def __post_init__(self) -> None:
        _require_at_least(self, seed=0)
        require(
            self.schedule.warmup_steps < self.batch.steps,
            f"--warmup-steps {self.schedule.warmup_steps}: give fewer than the "
            f"{self.batch.steps} steps of the run",
        )
        # Micro batches of an evaluation hold whole sequences.
        require(
            self.evaluation.eval_every == 0
            or self.evaluation.eval_tokens >= self.batch.sequence_length,
            f"--eval-tokens {self.evaluation.eval_tokens}: give at least one sequence of "
            f"{self.batch.sequence_length} tokens",
        )

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.batch.steps * self.batch.tokens_per_step

    def to_values(self) -> dict[str, Any]:
        """Nested plain values, as in JSON and TOML; fields that are None are left out."""
        return _plain(dataclasses.asdict(self))


# What may change when a run goes on: how it is computed and watched, but not what it computes.
# Training data is known by its content (`TrainBatches.load_state_dict`), wherever it lies now.
_FREE_SECTIONS = ("preset", "parallel", "evaluation", "checkpoint", "metrics")
_FREE_FIELDS = {
    "model": ("activation_checkpointing", "compile"),
    "batch": ("micro_batch_size",),
    "data": ("source", "validation", "cache", "processes", "workers", "prefetch"),
}


def trajectory(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration that affect the numbers, which must match on resuming.

    Example:
        >>> trajectory({"seed": 1, "metrics": {"log_every": 1}, "batch": {"steps": 9}})
        {'seed': 1, 'batch': {'steps': 9}}
    """
    kept = {name: value for name, value in values.items() if name not in _FREE_SECTIONS}
    for section, free in _FREE_FIELDS.items():
        if section in kept:
            kept[section] = {k: value for k, value in kept[section].items() if k not in free}
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value


Config = TypeVar("Config")


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
