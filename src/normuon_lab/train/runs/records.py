"""The record of a finished run, and the one number by which runs are tuned and compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from normuon_lab.train.runs.config import TrainConfig


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """The record of a finished run. Attributes:
    options: hyperparameters besides the peak learning rate that are not the arm's defaults.
    steps: length of the schedule; a run may have stopped before.
    eval_steps: numbers of finished steps at which the validation loss was taken.
    eval_losses: those losses, nats per target.
    eval_seconds: seconds of training, evaluations left out, up to each of them.
    train_losses: the loss of every step's batch, before the step.
    final_loss: the last validation loss; None when the run diverged.
    updates: measurements of update matrices, if they were asked for.
    eval_accuracies: shares of held-out targets that were predicted, beside `eval_losses`; empty
        in files from before they were taken.
    """

    arm: str
    seed: int
    learning_rate: float
    num_parameters: int
    options: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    eval_steps: list[int] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    eval_seconds: list[float] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    final_loss: float | None = None
    train_seconds: float = 0.0
    total_seconds: float = 0.0
    updates: list[dict[str, Any]] = field(default_factory=list)
    eval_accuracies: list[float] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether the loss became not finite."""
        return self.final_loss is None

    def steps_to_accuracy(self, accuracy: float) -> float | None:
        """The step at which the held-out accuracy first reaches a value, linear between
        evaluations.

        Example:
            >>> record = RunRecord(arm="muon", seed=0, learning_rate=1.0, num_parameters=1)
            >>> record.eval_steps, record.eval_accuracies = [0, 10, 20], [0.0, 0.5, 1.0]
            >>> record.steps_to_accuracy(0.75)
            15.0
        """
        before_step, before = 0, 0.0
        for step, reached in zip(self.eval_steps, self.eval_accuracies, strict=True):
            if reached >= accuracy:
                share = (accuracy - before) / (reached - before) if reached > before else 0.0
                return before_step + share * (step - before_step)
            before_step, before = step, reached
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored in results."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunRecord:
        """The inverse of `to_json`."""
        return cls(**values)


MISSED_FACTOR = 1.5
"""A run that never reaches the accuracy counts as this many times its steps."""


def objective_name(training: TrainConfig) -> str:
    """What the number is, with its unit.

    Example:
        >>> objective_name(TrainConfig())
        'final validation loss, nats per token'
    """
    if training.stop_at_accuracy is None:
        return "final validation loss, nats per token"
    return f"steps to {training.stop_at_accuracy:.0%} held-out accuracy"


def objective(record: RunRecord, training: TrainConfig) -> float | None:
    """The final validation loss, or where runs stop at an accuracy, the steps to it.

    Returns:
        The number; None for a run that diverged, where the loss counts.
    """
    if training.stop_at_accuracy is None:
        return record.final_loss
    reached = record.steps_to_accuracy(training.stop_at_accuracy)
    if reached is not None:
        return reached
    return MISSED_FACTOR * (training.steps if record.steps is None else record.steps)
