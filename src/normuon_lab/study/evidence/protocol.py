"""The protocol: what is tuned, run and claimed, fixed before the runs that count.

Change nothing here without saying so in docs/lab/protocol.md, which explains it: its tables are
tested against this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from normuon_lab.errors import require
from normuon_lab.train.arms.registry import MAIN_ARMS
from normuon_lab.train.runs.config import Experiment, ModelConfig, ModularAddition, TrainConfig

FINAL_LOSS = "final loss"

TUNING_SEEDS = (1000, 1001)
CLAIM_SEEDS = (0, 1, 2, 3, 4, 5)

FULL_TUNING_TRIALS = 16
"""Trials per arm where learning rate, weight decay and AdamW's learning rate are tuned."""

LARGE_TUNING_TRIALS = 10
"""As many at the larger size, whose searches begin at the smaller one's best settings: seven prove
such a setting interior, and a run takes seven times as long."""

RATE_TUNING_TRIALS = 8
"""Trials per arm where the learning rate alone is tuned."""

LARGE_RATE_TUNING_TRIALS = 5
"""As many at the larger size: a start, its neighbours, and the half steps to both sides. In the
smaller cells both arms that run there had their best rate at the start."""

MAX_TUNING_TRIALS = 32
"""Where to stop looking for an interior best setting."""

LENGTH_RATIO = 10 ** (1 / 10)
"""Neighbouring lengths of complete schedules differ by this factor: 0.50, 0.63, 0.79, 1, 1.26."""

ARMS_WITH_BOTH_OPTIONS = ("normuon-heads-equilibrated", "muon-heads-equilibrated")
"""Arms that take the library's two options which the paper does not have."""

VARIANTS = (
    *("normuon-original", "normuon-short", "normuon-heads", "normuon-equilibrated"),
    *ARMS_WITH_BOTH_OPTIONS,
)
"""Arms that are options of the library."""

ABLATIONS = ("muon-adam", "normuon-front", "normuon-tall", "muon-frobenius")
"""The paper's, in its Fig. 3 and 7."""

RIVALS = ("dion", "adam-mini", "rmnp")

RECENT_RIVALS = ("muon-eq", "hyperball", "muown", "ema-nesterov")
"""Optimizers of 2026, which came after the protocol: in a table of their own, on a smaller budget.

Their learning rate is tuned; all else is as tuned for `RECENT_PARENT`.
"""

RECENT_PARENT = "muon"
RECENT_TUNING_SEEDS = (1000,)
RECENT_TRIALS = 3
RECENT_SEEDS = (0, 1, 2, 3)
RECENT_STARTS = {"muon-eq": 3.0, "hyperball": 5.0, "muown": 3.0, "ema-nesterov": 3.0}
"""Where each search of a learning rate begins: at Muon's best in the first cell, and for Hyperball,
whose rate is relative to the weights, near what that rate is beside Muon's weights."""

RECENT_CELLS = {"bytes-small": RECENT_RIVALS, "bpe-small": ("muon-eq",)}
"""The rivals of each cell: a rival goes on to the next one only if it ended below Muon."""

OTHER_ARMS = (*VARIANTS, *ABLATIONS, *RIVALS)

DRAWN_ARMS = (*MAIN_ARMS, *ARMS_WITH_BOTH_OPTIONS)
"""Arms whose losses and schedules are drawn together."""

INHERITED_FROM = {
    **dict.fromkeys(("normuon-original", "normuon-short", "normuon-front"), "normuon"),
    **dict.fromkeys(("normuon-heads", "normuon-equilibrated", "normuon-tall"), "normuon"),
    **dict.fromkeys(("normuon-heads-equilibrated", "muon-adam"), "normuon"),
    **dict.fromkeys(("muon-heads-equilibrated", "muon-frobenius", "dion", "rmnp"), "muon"),
    "adam-mini": "adamw",
}
"""Whose weight decay and AdamW learning rate an arm takes over, its learning rate alone tuned."""

_ADAMW_START = {"learning_rate": 1.0, "adam_lr": 3.0, "weight_decay": 0.0}
_MUON_START = {"learning_rate": 3.0, "adam_lr": 3.0, "weight_decay": 0.0}
Starts = Mapping[str, Mapping[str, float]]
"""By arm and axis, the place on `searching.AXES` where a search begins."""

STARTS: Starts = {
    **dict.fromkeys(("adamw", "adam-mini"), _ADAMW_START),
    **dict.fromkeys((*MAIN_ARMS[1:], *OTHER_ARMS[:-2], "rmnp"), _MUON_START),
}
"""Where the searches on text begin: near the rates of the quick comparison."""

ARITHMETIC_STARTS: Starts = {
    "adamw": {"learning_rate": 0.0, "adam_lr": 0.0, "weight_decay": 2.0},
    "muon": {"learning_rate": 2.0, "adam_lr": 0.0, "weight_decay": 1.0},
    "normuon": {"learning_rate": 2.0, "adam_lr": 0.0, "weight_decay": 1.0},
}
"""Where the searches on modular addition begin: near a pilot's, as few settings ever learn it."""

LARGE_STARTS: Starts = {
    "adamw": {"learning_rate": 1.0, "adam_lr": 4.0, "weight_decay": -1.0},
    "muon": {"learning_rate": 3.0, "adam_lr": 5.0, "weight_decay": 0.0},
    "normuon": {"learning_rate": 3.0, "adam_lr": 6.0, "weight_decay": 0.0},
    **dict.fromkeys(ARMS_WITH_BOTH_OPTIONS, _MUON_START),
}
"""Where the searches at the larger size begin: at the smaller one's best settings."""

SENSITIVITY: dict[str, tuple[Any, ...]] = {
    "beta2": (0.0, 0.5, 0.8, 0.9, 0.99),
    "ns_steps": (1, 2, 3, 4, 6, 8),
    "nesterov": (False,),
    "ns_coefficients": ("polar_express", "you"),
    "eps": (1e-12, 1e-4, 1e-2),
    "neuron_axis": ("short",),
    "cautious_weight_decay": (True,),
    "momentum_dtype": ("int8",),
}
"""Keyword arguments of NorMuon that are varied one at a time, besides their defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One task at one size.

    Attributes:
        name: of its folder and its studies.
        other_arms: arms whose learning rate alone is tuned, besides the main ones.
        varied: NorMuon's other hyperparameters that are varied in it, of `SENSITIVITY`.
        full_trials: trials of a main arm; `rate_trials` are those of another one.
    """

    name: str
    task: str
    size: str
    experiment: Experiment
    other_arms: tuple[str, ...] = ()
    varied: tuple[str, ...] = ()
    starts: Starts = field(default_factory=lambda: STARTS)
    full_trials: int = FULL_TUNING_TRIALS
    rate_trials: int = RATE_TUNING_TRIALS

    @property
    def title(self) -> str:
        """The task and the size, for tables."""
        return f"{self.task}, {self.size}"

    @property
    def full_steps(self) -> int:
        """The full length N of the cell's schedules."""
        return self.experiment.training.steps

    @property
    def target_accuracy(self) -> float | None:
        """The held-out accuracy to which steps are counted; None where claims rest on the final
        losses of complete schedules of several lengths."""
        return self.experiment.training.stop_at_accuracy

    @property
    def measure(self) -> str:
        """What the cell's steps are counted to, in words."""
        accuracy = self.target_accuracy
        return FINAL_LOSS if accuracy is None else f"{100 * accuracy:g}% held-out accuracy"

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms of the cell, the main ones first."""
        return (*MAIN_ARMS, *self.other_arms)

    def tuning_trials(self, arm: str) -> int:
        """How many trials the arm's tuning has at least."""
        return self.full_trials if arm in MAIN_ARMS else self.rate_trials


_SMALL = ModelConfig(num_layers=4, width=96, num_heads=3, mlp_width=256)
_LARGE = ModelConfig(num_layers=5, width=256, num_heads=8, mlp_width=688)
_TRAINING = TrainConfig(steps=500, batch_size=8)

CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell(
            name="bytes-small",
            task="Python source, bytes",
            size="0.5M",
            experiment=Experiment(model=_SMALL, training=_TRAINING, data=("stdlib",)),
            other_arms=OTHER_ARMS,
            varied=tuple(SENSITIVITY),
        ),
        Cell(
            name="bpe-small",
            task="Shakespeare, BPE 1,024",
            size="0.6M",
            experiment=Experiment(
                model=replace(_SMALL, vocab_size=1024),
                training=_TRAINING,
                data=("shakespeare",),
                tokenizer="bpe",
            ),
            other_arms=(*ARMS_WITH_BOTH_OPTIONS, "normuon-front"),
            varied=("momentum_dtype",),
        ),
        Cell(
            name="bytes-large",
            task="Python source, bytes",
            size="4.1M",
            experiment=Experiment(model=_LARGE, training=_TRAINING, data=("stdlib",)),
            other_arms=ARMS_WITH_BOTH_OPTIONS,
            starts=LARGE_STARTS,
            full_trials=LARGE_TUNING_TRIALS,
            rate_trials=LARGE_RATE_TUNING_TRIALS,
        ),
        Cell(
            name="modular-addition",
            starts=ARITHMETIC_STARTS,
            task="a + b mod 97",
            size="0.5M",
            # What counts is when it is learned, so that no end of a schedule may come into it.
            experiment=Experiment(
                model=ModelConfig(
                    num_layers=2,
                    width=128,
                    num_heads=4,
                    mlp_width=512,
                    sequence_length=3,
                    vocab_size=98,
                ),
                training=TrainConfig(
                    steps=1000,
                    batch_size=256,
                    warmup_fraction=0.01,
                    num_evals=50,
                    eval_tokens=6000,
                    schedule="constant",
                    stop_at_accuracy=0.99,
                ),
                data=ModularAddition(modulus=97, train_share=0.5),
            ),
        ),
    )
}


def cell_of(name: str) -> Cell:
    """The cell of that name."""
    require(name in CELLS, f"unknown cell {name!r}: choose from {', '.join(CELLS)}")
    return CELLS[name]


def baselines_of(arm: str) -> tuple[str, ...]:
    """The arms whose steps an arm saves or does not.

    Muon with the library's options stands beside NorMuon with them, since they help it too.

    Example:
        >>> baselines_of("muon"), baselines_of("normuon-short")
        (('adamw',), ('adamw', 'muon'))
        >>> baselines_of("normuon-heads-equilibrated")
        ('adamw', 'muon', 'muon-heads-equilibrated')
    """
    if arm == "adamw":
        return ()
    if arm == "normuon-heads-equilibrated":
        return ("adamw", "muon", "muon-heads-equilibrated")
    is_against_muon = arm.startswith("normuon") or arm == "muon-heads-equilibrated"
    return ("adamw", "muon") if is_against_muon else ("adamw",)


def schedule_steps(full_steps: int, rung: int) -> int:
    """Steps of the complete schedule `rung` rungs above the full one, or below it.

    Example:
        >>> [schedule_steps(500, rung) for rung in (-3, -2, -1, 0, 1)]
        [251, 315, 397, 500, 629]
    """
    return round(full_steps * LENGTH_RATIO**rung)
