"""Decides by a rule whether a claim of the paper holds here.

In one cell a claim is *shown* when two things agree: the interval lies wholly on the claimed side
of zero, and the paired t test on the same seeds gives p < 0.05 (the bootstrap alone is too narrow
over six seeds). Then it is reproduced where the estimate is at least the paper's, and weaker where
it is less. Over cells the worst and the best decide, see `overall`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from normuon_lab.study.statistics.estimates import paired_test, t_interval

ALPHA = 0.05


class Verdict(Enum):
    """The verdict on a claim."""

    REPRODUCED = "reproduced"
    WEAKER = "weaker"
    NOT_REPRODUCED = "not reproduced"
    NOT_TESTABLE = "not testable here"
    NOT_RUN = "not run yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One cell's result for a claim; positive is the claimed side.

    Attributes:
        estimate: None where there is none.
        low: lower end of its interval; None: open, or no interval.
        high: upper end; None: open, or no interval.
        p_value: of a paired test of no difference; None without one.
        was_run: whether all runs are there. An incomplete cell has no verdict yet, because it would
            change with every seed.
    """

    estimate: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    was_run: bool = True

    @classmethod
    def over_seeds(cls, differences: Sequence[float], *, was_run: bool = True) -> Finding:
        """The mean of paired differences, with Student's t."""
        estimate = t_interval(differences)
        test = paired_test(differences, [0.0] * len(differences))
        return cls(
            estimate=estimate.mean,
            low=estimate.low,
            high=estimate.high,
            p_value=None if test is None else test.p_value,
            was_run=was_run,
        )

    @property
    def is_shown(self) -> bool:
        """Whether the interval lies on the claimed side, and the test agrees."""
        is_positive = self.low is not None and self.low > 0.0
        return is_positive and self.p_value is not None and self.p_value < ALPHA

    def opposite(self) -> Finding:
        """The same measurement, for the claim that it goes the other way.

        Example:
            >>> found = Finding(estimate=-2.6, low=-3.0, high=-2.3, p_value=0.001)
            >>> verdict_in_cell(found.opposite(), paper_value=0.0).value
            'reproduced'
        """
        estimate, low, high = (
            None if value is None else -value for value in (self.estimate, self.high, self.low)
        )
        return replace(self, estimate=estimate, low=low, high=high)


def verdict_in_cell(finding: Finding, *, paper_value: float = 0.0) -> Verdict:
    """The rule in one cell; the paper's estimate is 0 where only the sign is claimed.

    Example:
        >>> found = Finding(estimate=12.0, low=9.0, high=15.0, p_value=0.001)
        >>> [verdict_in_cell(found, paper_value=value).value for value in (10.0, 20.0)]
        ['reproduced', 'weaker']
    """
    if not finding.was_run:
        return Verdict.NOT_RUN
    if finding.estimate is None or not finding.is_shown:
        return Verdict.NOT_REPRODUCED
    return Verdict.REPRODUCED if finding.estimate >= paper_value else Verdict.WEAKER


def verdict_by_count(count: int, total: int) -> Verdict:
    """The rule where there is no interval: `count` of `total` measurements on the claimed side.

    Example:
        >>> [verdict_by_count(count, 24).value for count in (24, 20, 12)]
        ['reproduced', 'weaker', 'not reproduced']
    """
    if total == 0:
        return Verdict.NOT_RUN
    if count == total:
        return Verdict.REPRODUCED
    return Verdict.WEAKER if 2 * count > total else Verdict.NOT_REPRODUCED


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict over the cells that were run.

    Reproduced where every cell reproduces; not reproduced where no cell shows the claim; weaker in
    between.

    Example:
        >>> overall([Verdict.REPRODUCED, Verdict.NOT_REPRODUCED, Verdict.NOT_RUN]).value
        'weaker'
    """
    found = {verdict for verdict in verdicts if verdict is not Verdict.NOT_RUN}
    if not found:
        return Verdict.NOT_RUN
    return found.pop() if len(found) == 1 else Verdict.WEAKER
