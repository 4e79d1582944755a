"""What runs say in numbers: means over seeds, steps saved, intervals and paired tests."""

from __future__ import annotations

from normuon_lab.study.statistics.curves import (
    METHOD,
    Comparison,
    Curve,
    PointsBetween,
    compare_arms,
    points_between,
    steps_to_target,
)
from normuon_lab.study.statistics.estimates import (
    CONFIDENCE,
    Estimate,
    Interval,
    PairedTest,
    bootstrap_interval,
    paired_test,
    t_interval,
)
from normuon_lab.study.statistics.schedules import (
    StepsSaved,
    steps_saved_by_schedules,
    steps_saved_to_threshold,
    steps_to_reach,
)

__all__ = [
    "CONFIDENCE",
    "METHOD",
    "Comparison",
    "Curve",
    "Estimate",
    "Interval",
    "PairedTest",
    "PointsBetween",
    "StepsSaved",
    "bootstrap_interval",
    "compare_arms",
    "paired_test",
    "points_between",
    "steps_saved_by_schedules",
    "steps_saved_to_threshold",
    "steps_to_reach",
    "steps_to_target",
    "t_interval",
]
