"""The options of a run of the suite, and the sizes of its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from normuon_lab.bench.matrices import MatrixClass, parse_shapes
from normuon_lab.errors import require

Budget = tuple[float, float]
"""A part's share of the time, and the seconds without which it is not started; what a part leaves
over goes to those after it."""


class Part(NamedTuple):
    """The module whose `run` measures a part, and its budget on a GPU and in a dry run."""

    module: str
    budget: Budget
    dry_budget: Budget


PARTS = {
    # Of a dry run mostly the time that Python and torch take to start.
    "machine": Part("roofs", (0.02, 1.0), (0.06, 2.0)),
    "tests": Part("gpu_tests", (0.13, 10.0), (0.33, 8.0)),
    "step": Part("step_table", (0.44, 20.0), (0.24, 8.0)),
    "sharded": Part("sharded_step", (0.15, 15.0), (0.07, 6.0)),
    "accuracy": Part("directions", (0.06, 5.0), (0.09, 6.0)),
    "training": Part("overhead", (0.08, 15.0), (0.08, 6.0)),
    "comparison": Part("loss_race", (0.12, 20.0), (0.13, 6.0)),
}
"""In the order in which they run."""

# The states that a part can be in.
WAITING = "waiting"
RUNNING = "running"
DONE = "done"
FAILED = "failed"
CUT = "cut"
"""Status of a part that was ended because it took far longer than its time."""
NOT_RUN = "not run"

NO_TIME = "no time left"
"""Why a part, or a contender in one, was not started."""

MODEL_SHAPES = {
    "gpt2-124m": "12x2304x768,12x768x768,12x3072x768,12x768x3072",
    "llama-1.1b": "32x2048x2048,32x512x2048,32x8192x2048,16x2048x8192",
    "llama3-8b-layer": "2x4096x4096,2x1024x4096,2x14336x4096,1x4096x14336",
}
"""What `model_matrices` finds in the presets (one layer of llama3-8b), without transformers, which
takes longer to load than these take to step."""

TINY_DIVISOR, TINY_COUNT = 64, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteOptions:
    """What to measure: the flags of `normuon bench --suite gpu`, and the command that was typed.

    Models of the step table are names of `MODEL_SHAPES` or of presets. Without names in `only` and
    `parts` all of them run. A dry run takes its own number of tokens.

    Raises:
        InputError: a value that cannot be used.
    """

    out: Path = Path("runs/gpu")
    seconds: float = 540.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dion: Path | None = None
    only: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    models: tuple[str, ...] = tuple(MODEL_SHAPES)
    tests: bool = True
    tokens_per_step: int = 65_536
    lr: float = 1e-3
    seed: int = 0
    command: str = ""

    def __post_init__(self) -> None:
        # Command lines and JSON have lists and texts.
        for name in ("only", "parts", "models"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("out", "dion"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        for name in ("seconds", "lr"):
            value = getattr(self, name)
            is_good = 0 < value < math.inf
            require(is_good, f"--{name} {value}: give a finite number, more than 0")
        tokens = self.tokens_per_step
        require(tokens >= 1, f"--tokens-per-step {tokens}: give at least 1")
        require(self.seed >= 0, f"--seed {self.seed}: give at least 0")
        require(bool(self.models), "--models: give at least one")
        unknown = sorted(set(self.parts) - set(PARTS))
        require(not unknown, f"--parts {' '.join(unknown)}: known are {', '.join(PARTS)}")
        if self.dion is not None:
            from normuon_lab.bench.peers import PeerPaths

            PeerPaths(dion=self.dion)

    def left_out(self, part: str) -> str | None:
        """Why a part is not wanted, or None."""
        if self.parts and part not in self.parts:
            return "not asked for"
        if part == "tests" and not self.tests:
            return "left out by --no-tests"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSize:
    """A GPT-2-shaped decoder, whose MLP is four times as wide as the rest, and its batches."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    sequence_length: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large everything is.

    Attributes:
        overtime_seconds: beyond all time given, in which parts are still begun.
        copy_bytes: of the buffer that measures memory bandwidth.
        matmul_sides: of the square products that measure the device.
        rounds: timed steps of each contender, at least and at most.
        compile_seconds: reckoned for the first step of a contender that compiles.
        accuracy_shapes: of the matrices whose directions are compared.
        training: the model of the part "training".
        tokens_per_step: of it; None for what the options say.
        blocks: timed blocks of each optimizer, at least and at most.
        block_steps: steps in a block.
        comparison: the model of the part "comparison".
        text_bytes: of the text that it reads, at most.
        steps: of each optimizer in it, at least and at most.
        eval_batches: held-out micro-batches of one evaluation.
    """

    overtime_seconds: float
    copy_bytes: int
    matmul_sides: tuple[int, ...]
    rounds: tuple[int, int]
    compile_seconds: float
    accuracy_shapes: tuple[tuple[int, int], ...]
    training: DecoderSize
    tokens_per_step: int | None
    blocks: tuple[int, int]
    block_steps: int
    comparison: DecoderSize
    text_bytes: int
    steps: tuple[int, int]
    eval_batches: int


FULL = Sizes(
    overtime_seconds=0.0,
    copy_bytes=2**30,
    matmul_sides=(4096, 8192),
    rounds=(7, 21),
    compile_seconds=30.0,
    accuracy_shapes=((768, 3072), (2048, 2048)),
    training=DecoderSize(
        layers=12, width=768, heads=12, vocabulary=50_304, sequence_length=1024, micro_batch=8
    ),
    tokens_per_step=None,
    blocks=(5, 21),
    block_steps=2,
    comparison=DecoderSize(
        layers=12, width=768, heads=12, vocabulary=256, sequence_length=1024, micro_batch=8
    ),
    text_bytes=32_000_000,
    steps=(20, 3000),
    eval_batches=16,
)
"""On a GPU."""

_TINY_DECODER = DecoderSize(
    layers=2, width=32, heads=2, vocabulary=256, sequence_length=32, micro_batch=2
)
DRY = Sizes(
    overtime_seconds=30.0,
    copy_bytes=2**22,
    matmul_sides=(128, 256),
    rounds=(7, 7),
    compile_seconds=30.0,
    accuracy_shapes=((48, 96), (64, 64)),
    training=_TINY_DECODER,
    tokens_per_step=128,
    blocks=(3, 3),
    block_steps=2,
    comparison=_TINY_DECODER,
    text_bytes=200_000,
    steps=(4, 20),
    eval_batches=2,
)
"""On a CPU: every part runs, and no number means anything."""


def matrices_of(model: str, *, tiny: bool) -> tuple[MatrixClass, ...]:
    """The matrices of a name of `MODEL_SHAPES`, or of what `model_matrices` takes.

    Tiny ones, of a dry run, have sides divided by 64, and there are two of a shape at most.

    Example:
        >>> [str(one) for one in matrices_of("gpt2-124m", tiny=True)]
        ['2x36x12', '2x12x12', '2x48x12', '2x12x48']
    """
    if model in MODEL_SHAPES:
        classes = parse_shapes(MODEL_SHAPES[model])
    else:
        from normuon_lab.bench.matrices import model_matrices

        classes = model_matrices(model)
    if not tiny:
        return classes
    return tuple(
        MatrixClass(
            max(1, one.rows // TINY_DIVISOR),
            max(1, one.cols // TINY_DIVISOR),
            min(one.count, TINY_COUNT),
        )
        for one in classes
    )
