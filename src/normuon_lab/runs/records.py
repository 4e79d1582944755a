"""What a finished run leaves behind: `train.py` fills it, `compare/results.py` keeps it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """What a finished run leaves behind.

    Attributes:
        options: hyperparameters besides the peak learning rate that are not the arm's defaults.
        steps: length of the schedule.
        eval_steps: numbers of finished steps at which the validation loss was taken.
        eval_losses: those losses, nats per token.
        eval_seconds: seconds of training, evaluations left out, up to each of them.
        train_losses: the loss of every step's batch, before the step.
        final_loss: the last validation loss; None when the run diverged.
        updates: measurements of update matrices, if they were asked for.
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

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being a number."""
        return self.final_loss is None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored in results."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunRecord:
        """The inverse of `to_json`."""
        return cls(**values)
