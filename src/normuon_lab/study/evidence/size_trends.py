"""How savings change with the size of the model, where a task was run at more than one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.protocol import baselines_of
from normuon_lab.study.statistics import Estimate, StepsSaved, t_interval

SavedByPair = Mapping[tuple[str, str, str], StepsSaved]
"""What is saved, by the name of the cell, the arm and the baseline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtSize:
    """What an arm saves at one size.

    Attributes:
        size: as the cell calls it.
        num_parameters: of the model, embeddings and head too.
        saved: with its percentage.
    """

    size: str
    num_parameters: int
    saved: StepsSaved

    @property
    def percent(self) -> float:
        """Of the baseline's steps."""
        assert self.saved.percent is not None
        return self.saved.percent


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeTrend:
    """What an arm saves of a baseline's steps on one task, the smallest model first."""

    task: str
    arm: str
    baseline: str
    points: tuple[AtSize, ...]

    @property
    def change(self) -> float:
        """Percentage points from the smallest model to the largest."""
        return self.points[-1].percent - self.points[0].percent

    @property
    def change_by_seed(self) -> Estimate:
        """The same for each seed, which decides the order of the data at either size.

        Without a mean where some seed has no saving of its own at one of the two.
        """
        first, last = (_by_seed(point.saved) for point in (self.points[0], self.points[-1]))
        if first is None or last is None:
            return Estimate(values=(), mean=None, low=None, high=None)
        return t_interval([last[seed] - first[seed] for seed in sorted(first.keys() & last.keys())])


def size_trends(evidence: Sequence[CellEvidence], saved: SavedByPair) -> list[SizeTrend]:
    """A trend per task, arm and baseline that have a percentage at two sizes or more."""
    points: dict[tuple[str, str, str], list[AtSize]] = {}
    for found in evidence:
        if found.target_accuracy is not None:
            continue
        for arm in found.cell.arms:
            for baseline in baselines_of(arm):
                here = saved[found.cell.name, arm, baseline]
                if here.percent is not None:
                    points.setdefault((found.cell.task, arm, baseline), []).append(
                        AtSize(
                            size=found.cell.size,
                            num_parameters=found.full_runs(arm)[0].num_parameters,
                            saved=here,
                        )
                    )
    return [
        SizeTrend(
            task=task,
            arm=arm,
            baseline=baseline,
            points=tuple(sorted(at_sizes, key=lambda point: point.num_parameters)),
        )
        for (task, arm, baseline), at_sizes in points.items()
        if len(at_sizes) > 1
    ]


def _by_seed(saved: StepsSaved) -> dict[int, float] | None:
    """Each seed's own saving; None where one has none."""
    if saved.by_seed.mean is None:
        return None
    return dict(zip(saved.seeds, saved.by_seed.values, strict=True))
