"""The configuration of a run, as frozen and validated values, and its flags.

Nothing here imports torch: the command line reads and checks a configuration before anything slow
starts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from normuon_lab.errors import counted, flag, require
from normuon_lab.machine import has_cpp_compiler
from normuon_lab.train.arms.options import DEFAULT_OPTIONS, ArmOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_FAMILIES = ("llama", "gpt2")
SCHEDULES = ("linear", "constant")
TOKENIZERS = ("bytes", "bpe")
WEIGHT_DTYPES = ("float32", "bfloat16")
NUM_BYTES = 256
FIRST_TUNING_SEED = 1000
"""Tuning counts its seeds from here, and a claim from 0, so that they stay apart."""
# Token arrays are uint16.
MAX_BPE_TOKENS = 2**16

# Fields whose flags are not their names.
_FLAGS = {
    "family": "--model",
    "num_layers": "--layers",
    "num_heads": "--heads",
    "num_evals": "--evals",
}

# Fields of an experiment that came later: files leave them out at these values, so that those from
# before still equal new ones.
_LATER_FIELDS = {
    "tokenizer": "bytes",
    "schedule": "linear",
    "stop_at_accuracy": None,
    "weights": "float32",
}


def flag_of(field: str) -> str:
    """The flag of a field of a stored configuration, from the last part of a dotted name.

    >>> flag_of("model.num_layers"), flag_of("training.batch_size")
    ('--layers', '--batch-size')
    """
    name = field.rpartition(".")[2]
    return _FLAGS.get(name, flag(name))


def _require_known(option: str, value: str, known: Sequence[str]) -> None:
    require(value in known, f"{option} {value}: choose one of {', '.join(known)}")


def _require_counts(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{flag_of(name)} must be at least 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of the language model; random initialisation, untied embeddings."""

    family: Annotated[str, tyro.conf.arg(name="model")] = "llama"
    """Architecture: llama or gpt2."""
    num_layers: Annotated[int, tyro.conf.arg(name="layers")] = 4
    """Transformer layers."""
    width: int = 96
    """Width of the residual stream."""
    num_heads: Annotated[int, tyro.conf.arg(name="heads")] = 3
    """Attention heads."""
    mlp_width: int = 256
    """Width of the MLP."""
    sequence_length: int = 128
    """Tokens per sequence."""
    vocab_size: Annotated[int, tyro.conf.Suppress] = 256

    def __post_init__(self) -> None:
        _require_known("--model", self.family, MODEL_FAMILIES)
        _require_counts(self, "num_layers", "width", "num_heads", "mlp_width", "sequence_length")
        require(
            self.width % self.num_heads == 0 and (self.width // self.num_heads) % 2 == 0,
            f"--width {self.width} must be an even multiple of --heads {self.num_heads}",
        )

    def to_transformers(self) -> PretrainedConfig:
        """The configuration of transformers that says the same; without dropout."""
        from transformers import AutoConfig

        shape = (
            {
                "hidden_size": self.width,
                "intermediate_size": self.mlp_width,
                "num_hidden_layers": self.num_layers,
                "num_attention_heads": self.num_heads,
                "num_key_value_heads": self.num_heads,
                "max_position_embeddings": self.sequence_length,
            }
            if self.family == "llama"
            else {
                "n_embd": self.width,
                "n_inner": self.mlp_width,
                "n_layer": self.num_layers,
                "n_head": self.num_heads,
                "n_positions": self.sequence_length,
                # Dropout would draw random numbers between the arms' shared data order.
                **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            }
        )
        return AutoConfig.for_model(
            self.family,
            vocab_size=self.vocab_size,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            **shape,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The budget of one run: the same for every arm."""

    steps: int = 500
    """Optimizer steps of each run."""
    batch_size: int = 8
    """Sequences per step."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises; it falls linearly to 0 after."""
    num_evals: Annotated[int, tyro.conf.arg(name="evals")] = 20
    """Evaluations per run, evenly spread, besides the one before the first step."""
    eval_tokens: int = 16384
    """Held-out tokens that each evaluation reads, the same in every run."""
    schedule: Annotated[str, tyro.conf.Suppress] = "linear"
    """What follows the warmup: linear falls to zero, constant stays."""
    stop_at_accuracy: Annotated[float | None, tyro.conf.Suppress] = None
    """Held-out accuracy at which a run ends, before its steps are done."""

    def __post_init__(self) -> None:
        _require_counts(self, "steps", "batch_size", "num_evals", "eval_tokens")
        require(
            0.0 <= self.warmup_fraction < 1.0,
            f"--warmup-fraction must be in [0, 1), got {self.warmup_fraction}",
        )
        require(
            self.schedule in SCHEDULES,
            f"unknown schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}",
        )
        require(
            self.stop_at_accuracy is None or 0.0 < self.stop_at_accuracy <= 1.0,
            f"stop_at_accuracy must be in (0, 1], got {self.stop_at_accuracy}",
        )

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises linearly to its peak."""
        return min(self.steps - 1, math.ceil(self.warmup_fraction * self.steps))

    @property
    def decay_steps(self) -> int:
        """Steps at the end over which the learning rate falls."""
        return 0 if self.schedule == "constant" else self.steps - self.warmup_steps

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """Numbers of finished steps after which the validation loss is taken; 0 and the end too."""
        marks = {round(i * self.steps / self.num_evals) for i in range(self.num_evals + 1)}
        return tuple(sorted(marks))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModularAddition:
    """The task (a + b) mod p, learned from a share of all p^2 pairs.

    Attributes:
        modulus: p.
        train_share: share of the pairs that a run trains on; it is tested on the others.
    """

    modulus: int = 97
    train_share: float = 0.4

    def __post_init__(self) -> None:
        require(self.modulus >= 2, f"modulus must be at least 2, got {self.modulus}")
        require(
            0 < self.num_train_pairs < self.modulus**2,
            f"train_share {self.train_share} leaves no pair on one side",
        )

    @property
    def num_train_pairs(self) -> int:
        """Pairs that a run trains on."""
        return round(self.train_share * self.modulus**2)

    @property
    def vocab_size(self) -> int:
        """The numbers below p, and the equals sign."""
        return self.modulus + 1

    @property
    def sequence_length(self) -> int:
        """Tokens of ``a b =``."""
        return 3

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored where the words of `--data` stand for a text."""
        return {"task": "modular-addition", **dataclasses.asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What all runs of a comparison or of a tuning share.

    Attributes:
        data: a text, as `--data` names it, or arithmetic.
        tokenizer: of a text: bytes, or bpe: one of `model.vocab_size` tokens, made from the
            training part.
        weights: dtype in which the model is stored and computed; the loss is float32.
    """

    model: ModelConfig = ModelConfig()
    training: TrainConfig = TrainConfig()
    data: tuple[str, ...] | ModularAddition = ("stdlib",)
    tokenizer: str = "bytes"
    weights: str = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        _require_known("--weights", self.weights, WEIGHT_DTYPES)
        require(
            self.training.eval_tokens >= self.model.sequence_length,
            f"--eval-tokens {self.training.eval_tokens} is shorter than one sequence of "
            f"{self.model.sequence_length} tokens",
        )
        if isinstance(self.data, ModularAddition):
            wanted = (self.data.vocab_size, self.data.sequence_length)
            found = (self.model.vocab_size, self.model.sequence_length)
            require(
                found == wanted,
                f"addition mod {self.data.modulus} needs a model of vocab_size {wanted[0]} and "
                f"sequence_length {wanted[1]}, not of {found[0]} and {found[1]}",
            )
        else:
            check_tokenizer(self.tokenizer, vocab_size=self.model.vocab_size)

    def to_json(self) -> dict[str, Any]:
        """Nested plain values, as they are stored in results and compared on `--resume`."""
        data = self.data.to_json() if isinstance(self.data, ModularAddition) else list(self.data)
        return _without_later_defaults(
            {
                **dataclasses.asdict(self),
                "training": _without_later_defaults(dataclasses.asdict(self.training)),
                "data": data,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One run of an experiment: which arm, which seed, which hyperparameters.

    Attributes:
        learning_rate: the peak, of hidden matrices and of all that `options` does not set.
        options: the arm's other hyperparameters.
        steps: length of its schedule; None: the experiment's.
    """

    arm: str
    seed: int
    learning_rate: float
    options: ArmOptions = DEFAULT_OPTIONS
    steps: int | None = None

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"a seed must be at least 0, got {self.seed}")
        require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0.0,
            f"the learning rate of {self.arm} must be a positive number, got {self.learning_rate}",
        )
        require(
            self.steps is None or self.steps >= 1,
            f"the steps of {self.arm} must be at least 1, got {self.steps}",
        )

    @property
    def name(self) -> str:
        """How messages call this run."""
        length = "" if self.steps is None else f" over {counted(self.steps, 'step')}"
        return f"{self.arm} seed {self.seed}{length}"

    def training(self, experiment: Experiment) -> TrainConfig:
        """The budget of this run: the experiment's, at this run's length."""
        if self.steps is None:
            return experiment.training
        return dataclasses.replace(experiment.training, steps=self.steps)


def _without_later_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in values.items()
        if name not in _LATER_FIELDS or value != _LATER_FIELDS[name]
    }


def check_tokenizer(tokenizer: str, *, vocab_size: int) -> None:
    """Raise `InputError` unless a text can have these tokens, and as many."""
    _require_known("--tokenizer", tokenizer, TOKENIZERS)
    if tokenizer == "bytes":
        require(vocab_size == NUM_BYTES, f"--vocab-size {vocab_size}: bytes are {NUM_BYTES}")
    else:
        require(
            NUM_BYTES < vocab_size <= MAX_BPE_TOKENS,
            f"--vocab-size {vocab_size}: a BPE has the {NUM_BYTES} bytes and more, up to "
            f"{MAX_BPE_TOKENS} tokens",
        )


_BPE_VOCAB_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """What is trained, shared by subcommands."""

    data: tuple[str, ...] = ("stdlib",)
    """Text to train on: stdlib (the running Python's library), shakespeare, or text files."""
    tokenizer: str = "bytes"
    """Tokens: bytes, or bpe, made from the training part of the text."""
    vocab_size: int | None = None
    """Tokens of the BPE; 1024 unless given."""
    training: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = ModelConfig()
    weights: str = "float32"
    """Dtype in which the model is stored and computed: float32 or bfloat16."""
    compile: bool = False
    """Use torch.compile; needs a C++ compiler, and was no faster for the default model."""

    def experiment(self) -> Experiment:
        """The validated experiment."""
        require(
            not self.compile or has_cpp_compiler(),
            "--compile needs a C++ compiler, and none was found: install g++ or leave it out",
        )
        vocab_size = self.vocab_size
        if vocab_size is None:
            vocab_size = _BPE_VOCAB_SIZE if self.tokenizer == "bpe" else NUM_BYTES
        return Experiment(
            model=dataclasses.replace(self.model, vocab_size=vocab_size),
            training=self.training,
            data=self.data,
            tokenizer=self.tokenizer,
            weights=self.weights,
            compile=self.compile,
        )
