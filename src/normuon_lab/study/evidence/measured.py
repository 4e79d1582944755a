"""What figures and verdicts both read of a cell's runs: paired differences of loss, and updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.train.runs.records import RunRecord

UPDATES_OF = ("adamw", "adam-mini", "muon", "normuon")
"""The arms of the paper's Fig. 1."""

MOMENTUM_OF = "muon"
"""Whose momentum stands for the raw one."""

Updates = Mapping[tuple[str, int], Mapping[str, Any]]
"""By matrix and step."""


def loss_differences(
    found: CellEvidence, arm: str, reference: str
) -> npt.NDArray[np.float64] | None:
    """An arm's validation losses minus another's, `[seeds, evaluations]`, full length, paired.

    None where no seed has finished both, or where one diverged.
    """
    ours, theirs = _by_seed(found.full_runs(arm)), _by_seed(found.full_runs(reference))
    seeds = sorted(set(ours) & set(theirs))
    if not seeds or any(ours[seed].diverged or theirs[seed].diverged for seed in seeds):
        return None
    return np.array(
        [np.subtract(ours[seed].eval_losses, theirs[seed].eval_losses) for seed in seeds]
    )


def _by_seed(runs: list[RunRecord]) -> dict[int, RunRecord]:
    return {run.seed: run for run in runs}


def measured_updates(found: CellEvidence) -> dict[str, Updates]:
    """By arm, what was measured of one seed's full-length run; `momentum` is among them."""
    updates: dict[str, Updates] = {}
    for arm in UPDATES_OF:
        for run in found.full_runs(arm):
            if run.updates:
                updates[arm] = {(u["matrix"], u["step"]): u for u in run.updates}
                break
    with_momentum = {
        key: update["momentum"]
        for key, update in updates.get(MOMENTUM_OF, {}).items()
        if "momentum" in update
    }
    return {"momentum": with_momentum, **updates} if with_momentum else updates
