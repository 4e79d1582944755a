"""A mean over seeds with Student's t interval.

With two to five seeds it is wide, and honest: a bootstrap over so few values can only return
combinations of them and covers less than it says (`schedules.py` has both). With one seed there is
no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over seeds and its confidence interval.

    `low` and `high` are None with fewer than two values, `mean` too where there is none.
    """

    values: tuple[float, ...]
    mean: float | None
    low: float | None
    high: float | None
    confidence: float = CONFIDENCE

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored in results."""
        return {**asdict(self), "values": list(self.values)}


def t_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Estimate:
    """Mean of `values` and Student's t interval: mean ± t(n - 1) s / sqrt(n).

    Example:
        >>> estimate = t_interval([1.0, 2.0, 3.0])
        >>> print(f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]")
        2.000 [-0.484, 4.484]
    """
    n = len(values)
    if n == 0:
        return Estimate(values=(), mean=None, low=None, high=None, confidence=confidence)
    mean = math.fsum(values) / n
    low = high = None
    if n >= 2:
        from scipy import stats

        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
        margin = float(stats.t.ppf(0.5 + confidence / 2, df=n - 1)) * deviation / math.sqrt(n)
        low, high = mean - margin, mean + margin
    return Estimate(values=tuple(values), mean=mean, low=low, high=high, confidence=confidence)
