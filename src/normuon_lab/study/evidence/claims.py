"""Which complete schedules a claim still needs: pure logic over the final losses there are.

Every arm runs the full length on every claim seed. Then lengths are added, one rung of the ladder
`protocol.schedule_steps` at a time, until the crossing of each target lies between two neighbouring
lengths: downwards while an arm is at or below the target, upwards while it is above. Targets are
the final losses of an arm's baselines at the full length, and, between Muon and NorMuon, the
other's; of the means over seeds, and of every seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from normuon_lab.study.evidence.protocol import baselines_of

LOWEST_RUNG = -8
HIGHEST_RUNG = 3

RungLosses = Mapping[str, Mapping[int, float]]
"""By arm and rung, the final loss of one seed or the mean of all; infinite where a run diverged."""


def missing_rungs(losses: RungLosses, arms: Sequence[str]) -> list[tuple[str, int]]:
    """Arm and rung of the complete schedules to run next; empty when all targets are bracketed.

    Args:
        losses: what was run, all claim seeds of a rung or none.
        arms: the arms of the cell.

    Example:
        >>> missing_rungs({}, ["adamw", "normuon"])
        [('adamw', 0), ('normuon', 0)]
        >>> missing_rungs({"adamw": {0: 2.0}, "normuon": {0: 1.8}}, ["adamw", "normuon"])
        [('normuon', -1)]
        >>> missing_rungs({"adamw": {0: 2.0}, "normuon": {0: 1.8, -1: 2.1}}, ["adamw", "normuon"])
        []
    """
    full = missing_full(losses, arms)
    if full:
        return full
    wanted = []
    for arm in arms:
        for target in _targets(losses, arm):
            rung = _next_rung(losses[arm], target)
            if rung is not None and (arm, rung) not in wanted:
                wanted.append((arm, rung))
    return wanted


def missing_full(losses: RungLosses, arms: Sequence[str]) -> list[tuple[str, int]]:
    """The arms without the full length, each with its rung, 0."""
    return [(arm, 0) for arm in arms if 0 not in losses.get(arm, {})]


def _targets(losses: RungLosses, arm: str) -> list[float]:
    """The losses whose crossing an arm's schedules must bracket."""
    # Muon's own way to NorMuon's loss is Muon-rescale.
    baselines = (*baselines_of(arm), *(("normuon",) if arm == "muon" else ()))
    return [losses[name][0] for name in baselines if 0 in losses.get(name, {})]


def _next_rung(by_rung: Mapping[int, float], target: float) -> int | None:
    """The neighbour to run next; None when the crossing is bracketed, or too far away to look."""
    if not math.isfinite(target):
        return None
    reached = [rung for rung, loss in by_rung.items() if loss <= target]
    if not reached:
        rung = max(by_rung) + 1
        return rung if rung <= HIGHEST_RUNG else None
    # Contiguous from the full length: the nearest rung below the lowest that reached the target.
    rung = min(reached) - 1
    return rung if rung not in by_rung and rung >= LOWEST_RUNG else None
