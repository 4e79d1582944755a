"""Steps saved by complete schedules: how much shorter an arm's schedule may be.

The target is the baseline's mean final loss at the full length N. Each arm is trained with complete
schedules of several lengths, so that its learning rate has decayed wherever its loss is read; n* is
the length at which its mean final loss meets the target, and it saves 100 (1 - n*/N) percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from normuon_lab.study.statistics.estimates import (
    NO_ESTIMATE,
    Array,
    Estimate,
    Interval,
    PairedTest,
    bootstrap_interval,
    paired_test,
    t_interval,
)

LossesByLength = Mapping[int, Mapping[int, float | None]]
"""Final losses by schedule length and seed; None where the run diverged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsSaved:
    """By how many percent fewer steps an arm reaches the target.

    Attributes:
        seeds: those that both arms have.
        percent: from means over seeds; None for the `reason` given. Negative: more steps.
        interval: bootstrap over seeds, paired; None with fewer than two seeds or no percentage.
        by_seed: each seed against its own target, with Student's t. No mean where a seed's own
            curve does not meet its own target within the lengths run.
        test: on what the target is made of (final losses at the full length).
        reason: why there is no percentage.
        at_least: if the shortest schedule is better than needed, the saving is more than this.
        at_most: if the longest schedule is not enough, the saving is less than this.
        notes: what a reader should know about the figure.
    """

    seeds: tuple[int, ...]
    percent: float | None = None
    interval: Interval | None = None
    by_seed: Estimate = NO_ESTIMATE
    test: PairedTest | None = None
    reason: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    notes: tuple[str, ...] = ()


def steps_to_reach(lengths: Sequence[int], losses: Array, target: Array | float) -> Array:
    """Length of schedule at which a final loss meets a target.

    Linear interpolation in log(steps) between neighbouring lengths. A final loss should fall with
    the length; where noise says otherwise, the closest falling sequence in least squares is taken
    first (isotonic regression), so that there is one crossing.

    Args:
        lengths: steps of the schedules, ascending, K of them.
        losses: final losses, `[..., K]`.
        target: `[...]`.

    Returns:
        Steps, `[...]`; -inf where the shortest schedule ends below the target already, inf where
        the longest ends above it. Nothing is extrapolated.

    Example:
        >>> print(f"{steps_to_reach([100, 400], np.array([3.0, 2.0]), 2.5):.6g}")
        200
    """
    falling = falling_fit(np.asarray(losses, dtype=np.float64))
    target = np.broadcast_to(np.asarray(target, dtype=np.float64), falling.shape[:-1])
    log_steps = np.log(np.asarray(lengths, dtype=np.float64))
    is_met = falling <= target[..., None]
    after = np.argmax(is_met, axis=-1)
    before = np.maximum(after - 1, 0)
    high, low = (np.take_along_axis(falling, i[..., None], -1)[..., 0] for i in (before, after))
    drop = np.where(high > low, high - low, 1.0)
    share = np.where(after > 0, (high - target) / drop, 0.0)
    steps = np.exp(log_steps[before] + share * (log_steps[after] - log_steps[before]))
    steps = np.where(is_met[..., 0] & (falling[..., 0] < target), -np.inf, steps)
    return np.where(is_met.any(axis=-1), steps, np.inf)


def falling_fit(losses: Array) -> Array:
    """The non-increasing sequence closest to `losses`, `[..., K]`, in least squares.

    Example:
        >>> falling_fit(np.array([4.0, 2.0, 3.0, 1.0])).tolist()
        [4.0, 2.5, 2.5, 1.0]
    """
    count = losses.shape[-1]
    sums = np.concatenate([np.zeros((*losses.shape[:-1], 1)), np.cumsum(losses, axis=-1)], axis=-1)
    first, last = np.ogrid[:count, :count]
    with np.errstate(divide="ignore", invalid="ignore"):
        means = (sums[..., None, 1:] - sums[..., :-1, None]) / (last + 1 - first)
    # A single value as it is: a difference of sums would round it.
    means = np.where(first == last, losses[..., None], means)
    # The minimax form of isotonic regression, over the means from `first` to `last`.
    means = np.where(first <= last, means, -np.inf)
    greatest = np.maximum.accumulate(means[..., ::-1], axis=-1)[..., ::-1]
    least = np.minimum.accumulate(greatest, axis=-2)
    return np.diagonal(least, axis1=-2, axis2=-1)


def steps_saved_by_schedules(
    arm: LossesByLength, baseline: Mapping[int, float | None], *, full_steps: int
) -> StepsSaved:
    """Steps that an arm saves against a baseline's mean final loss at the full length.

    `baseline` has its final losses at `full_steps`, by seed. The figure is over the seeds that the
    baseline and the arm's most complete length have; lengths that lack some of them are left out
    and named in the notes.
    """
    seeds, lengths, notes = _shared_runs(arm, baseline, full_steps=full_steps)
    if not seeds:
        return StepsSaved(seeds=(), reason="no seed was run with both")
    runs = {f"runs over {n} steps": arm[n] for n in lengths} | {"runs of the baseline": baseline}
    for what, losses in runs.items():
        if count := sum(losses[seed] is None for seed in seeds):
            reason = f"{count} of {len(seeds)} {what} diverged"
            return StepsSaved(seeds=seeds, reason=reason, notes=tuple(notes))
    losses_SK = np.array([[arm[n][seed] for n in lengths] for seed in seeds], dtype=np.float64)
    target_S = np.array([baseline[seed] for seed in seeds], dtype=np.float64)
    means_K = losses_SK.mean(axis=0)
    if (np.diff(means_K) > 0).any():
        notes.append(
            "the mean final loss does not fall with every longer schedule: isotonic regression "
            "was applied before interpolating"
        )
    test = None
    if full_steps in lengths:
        test = paired_test(list(losses_SK[:, lengths.index(full_steps)]), list(target_S))

    def saved(drawn: npt.NDArray[np.int64]) -> Array:
        steps = steps_to_reach(lengths, losses_SK[drawn].mean(axis=-2), target_S[drawn].mean(-1))
        return _percent(np.clip(steps, lengths[0], lengths[-1]), full_steps)

    steps = float(steps_to_reach(lengths, means_K, target_S.mean()))
    least, most = float(_percent(lengths[-1], full_steps)), float(_percent(lengths[0], full_steps))
    found = StepsSaved(seeds=seeds, test=test, notes=tuple(notes))
    if steps == -np.inf:
        reason = (
            f"the shortest schedule, {lengths[0]} steps, already ends below the target: "
            f"more than {most:.1f}% saved"
        )
        return replace(found, reason=reason, at_least=most)
    if steps == np.inf:
        reason = (
            f"the longest schedule, {lengths[-1]} steps, still ends above the target: "
            f"less than {least:.1f}% saved"
        )
        return replace(found, reason=reason, at_most=least)
    steps_S = steps_to_reach(lengths, losses_SK, target_S)
    is_met = np.isfinite(steps_S)
    by_seed = t_interval(_percent(steps_S[is_met], full_steps).tolist())
    if not is_met.all():
        by_seed = Estimate(values=by_seed.values)
        unmet = _listed({seed for seed, met in zip(seeds, is_met, strict=True) if not met})
        notes.append(f"no interval by Student's t: seeds {unmet} alone do not meet their target")
    return replace(
        found,
        percent=float(_percent(steps, full_steps)),
        interval=_within(bootstrap_interval(saved, len(seeds)), least, most),
        by_seed=by_seed,
        notes=tuple(notes),
    )


def steps_saved_to_threshold(arm: Mapping[int, float], baseline: Mapping[int, float]) -> StepsSaved:
    """Steps saved where a run ends by reaching a threshold, from both arms' steps to it, by seed.

    The saving is one minus the ratio of mean steps.
    """
    seeds = tuple(sorted(set(arm) & set(baseline)))
    if not seeds:
        return StepsSaved(seeds=(), reason="no seed was run with both")
    ours, theirs = (
        np.array([steps[seed] for seed in seeds], dtype=np.float64) for steps in (arm, baseline)
    )

    def saved(drawn: npt.NDArray[np.int64]) -> Array:
        return _percent(ours[drawn].mean(axis=-1), theirs[drawn].mean(axis=-1))

    return StepsSaved(
        seeds=seeds,
        percent=float(_percent(ours.mean(), theirs.mean())),
        interval=bootstrap_interval(saved, len(seeds)),
        by_seed=t_interval(_percent(ours, theirs).tolist()),
        test=paired_test(ours.tolist(), theirs.tolist()),
    )


def _percent(steps: Array | float, full_steps: Array | float) -> Array:
    return np.asarray(100.0 * (1.0 - np.asarray(steps) / full_steps))


def _shared_runs(
    arm: LossesByLength, baseline: Mapping[int, float | None], *, full_steps: int
) -> tuple[tuple[int, ...], list[int], list[str]]:
    """The seeds to pair, the lengths that have all of them, and notes on the others."""
    shared = {n: set(by_seed) & set(baseline) for n, by_seed in arm.items()}
    # The full length where several are equally complete.
    fullest = max(shared, key=lambda n: (len(shared[n]), n == full_steps), default=full_steps)
    seeds = shared.get(fullest, set())
    lengths = sorted(n for n in arm if shared[n] >= seeds)
    notes = [
        f"schedules of {n} steps left out: without seeds {_listed(seeds - shared[n])}"
        for n in sorted(set(arm) - set(lengths))
    ]
    return tuple(sorted(seeds)), lengths, notes


def _within(interval: Interval | None, least: float, most: float) -> Interval | None:
    """The interval without the ends at which resamples ran out of schedules."""
    if interval is None:
        return None
    low, high = (
        None if end is None or np.isclose(end, limit, rtol=0, atol=1e-9) else end
        for end, limit in ((interval.low, least), (interval.high, most))
    )
    return replace(interval, low=low, high=high)


def _listed(seeds: set[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))
