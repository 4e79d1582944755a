"""The learning rate over a run: warmup, then linear decay, with a stable part between or without.

A schedule is a function of the step alone, so there is nothing of it to save.
"""

from __future__ import annotations

from normuon_lab.train.pretrain.config import ScheduleConfig
from normuon_lab.train.runs.schedule import learning_rate_factor


def scheduled_factor(step: int, *, steps: int, schedule: ScheduleConfig) -> float:
    """The factor on the peak learning rate at `step`, counted from 0.

    Both kinds reach 0 one past the last step.

    Example:
        >>> wsd = ScheduleConfig(schedule="wsd", warmup_steps=2, decay_fraction=0.4)
        >>> [scheduled_factor(t, steps=10, schedule=wsd) for t in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = schedule.warmup_steps
    if schedule.schedule == "linear":
        return learning_rate_factor(step, steps=steps, warmup_steps=warmup)
    rise = (step + 1) / warmup if step < warmup else 1.0
    decay_steps = round(schedule.decay_fraction * steps)
    fall = (steps - step) / decay_steps if step > steps - decay_steps else 1.0
    return min(rise, fall)
