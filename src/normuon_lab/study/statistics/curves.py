"""Statistics of a comparison's curves: steps to a target loss, and paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normuon_lab.study.statistics.estimates import NO_ESTIMATE, Estimate, t_interval
from normuon_lab.train.runs.records import RunRecord

METHOD = (
    "Training efficiency: the share of steps, in percent, by which an arm reaches the baseline's "
    "final validation loss before the baseline's last step. It is read off the arm's own curve, by "
    "linear interpolation between evaluations, at the first crossing. The learning rate has not "
    "decayed there yet, so a run scheduled to end there would do better: the figure is "
    "conservative. Intervals: Student's t over seeds on paired values (same seed, initial weights "
    "and batches)."
)


def steps_to_target(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Where a curve first falls to `target`, by linear interpolation; None where it never does.

    Example:
        >>> steps_to_target([0, 10, 20], [5.0, 3.0, 2.0], 2.5)
        15.0
    """
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return float(steps[0])
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One arm against a baseline, over the seeds both have finished.

    Attributes:
        loss_difference: the arm's final validation loss minus the baseline's; negative is better.
        fewer_steps_percent: the training efficiency, over the seeds that reached the target.
        seeds_not_reached: seeds whose curve never fell to the baseline's final loss. If there are
            any, the efficiency has no mean, which would leave out the worst seeds.
    """

    arm: str
    baseline: str
    seeds: tuple[int, ...]
    loss_difference: Estimate
    fewer_steps_percent: Estimate
    seeds_not_reached: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PointsBetween:
    """By how many percentage points an arm's training efficiency exceeds another's.

    Both are compared with the same reference, as in the paper's Table 1, and paired by seed.
    """

    arm: str
    baseline: str
    reference: str
    points: Estimate


def points_between(ours: Comparison, theirs: Comparison) -> PointsBetween:
    """Subtract two efficiencies against one reference, over the seeds where both exist."""
    assert ours.baseline == theirs.baseline
    points = NO_ESTIMATE
    if not (ours.seeds_not_reached or theirs.seeds_not_reached):
        mine, other = (
            dict(zip(comparison.seeds, comparison.fewer_steps_percent.values, strict=True))
            for comparison in (ours, theirs)
        )
        points = t_interval([mine[seed] - other[seed] for seed in sorted(mine.keys() & other)])
    return PointsBetween(arm=ours.arm, baseline=theirs.arm, reference=ours.baseline, points=points)


def compare_arms(arm: str, baseline: str, runs: Iterable[RunRecord]) -> Comparison:
    """Compare two arms over the seeds that both finished; runs that diverged are left out."""
    finished = {(run.arm, run.seed): run for run in runs if not run.diverged}
    ours, theirs = (
        {seed: run for (name, seed), run in finished.items() if name == wanted}
        for wanted in (arm, baseline)
    )
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    differences = [ours[seed].eval_losses[-1] - theirs[seed].eval_losses[-1] for seed in seeds]
    savings: list[float] = []
    not_reached: list[int] = []
    for seed in seeds:
        target = theirs[seed].eval_losses[-1]
        needed = steps_to_target(ours[seed].eval_steps, ours[seed].eval_losses, target)
        if needed is None:
            not_reached.append(seed)
        else:
            savings.append(100.0 * (1.0 - needed / theirs[seed].eval_steps[-1]))
    saved = t_interval(savings)
    if not_reached:
        saved = Estimate(values=tuple(savings))
    return Comparison(
        arm=arm,
        baseline=baseline,
        seeds=seeds,
        loss_difference=t_interval(differences),
        fewer_steps_percent=saved,
        seeds_not_reached=tuple(not_reached),
    )
