"""Runs that are really trained, but in the test's own process; workers have tests of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from rich.console import Console

from normuon_lab.train.runs import workers
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import load_task
from normuon_lab.train.runs.train import train_run
from normuon_lab.train.runs.workers import Job


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """What has been trained, in order."""
    seen: list[RunSpec] = []

    def execute(
        jobs: Sequence[Job],
        experiment: Experiment,
        corpus: object,
        *,
        console: Console,
        on_finished: Callable[[RunSpec, RunRecord], object],
    ) -> None:
        for job in jobs:
            seen.append(job.spec)
            data = load_task(experiment)
            record = train_run(job.spec, experiment, data, probe_updates=job.probe_updates)
            on_finished(job.spec, record)

    monkeypatch.setattr(workers, "execute", execute)
    return seen
