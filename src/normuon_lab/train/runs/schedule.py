"""The learning rate over a run: a linear warmup, then a linear decay to zero, as in the paper.

Or none: where runs are compared by when they get somewhere, an end must not matter.
"""

from __future__ import annotations


def learning_rate_factor(
    step: int, *, steps: int, warmup_steps: int, schedule: str = "linear"
) -> float:
    """The factor on the peak learning rate at `step`, counted from 0.

    Rises from 1/warmup_steps to 1 over the warmup. Then a linear one falls in equal parts towards
    zero, which it would reach at `steps`, one past the last step; a constant one stays.

    Example:
        >>> [learning_rate_factor(t, steps=6, warmup_steps=2) for t in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    return (steps - step) / (steps - warmup_steps)
