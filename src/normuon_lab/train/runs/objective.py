"""The one number by which runs of an experiment are tuned and compared: less is better."""

from __future__ import annotations

from normuon_lab.train.runs.config import TrainConfig
from normuon_lab.train.runs.records import RunRecord

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

    Args:
        record: a run.
        training: its experiment's.

    Returns:
        The number; None for a run that diverged, where the loss counts.
    """
    if training.stop_at_accuracy is None:
        return record.final_loss
    reached = record.steps_to_accuracy(training.stop_at_accuracy)
    if reached is not None:
        return reached
    return MISSED_FACTOR * (training.steps if record.steps is None else record.steps)
