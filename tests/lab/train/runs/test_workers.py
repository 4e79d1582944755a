"""Worker processes: one that dies takes only its own run with it."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch

from normuon import NorMuon
from normuon.learning_rate import MUON_SIZED_LR
from normuon_lab.train.arms.options import ArmOptions
from normuon_lab.train.runs.config import Experiment, RunSpec, TrainConfig
from normuon_lab.train.runs.corpus import Corpus
from normuon_lab.train.runs.workers import Event, Failed, Finished, Job, Started, run_jobs


@pytest.mark.timeout(120)
def test_a_dead_or_failing_worker_is_named_and_the_other_runs_go_on(
    corpus: Corpus, experiment: Experiment
) -> None:
    endless = TrainConfig(steps=10**6, batch_size=4, num_evals=1, eval_tokens=256)
    jobs = [
        Job(RunSpec(arm="adamw", seed=0, learning_rate=0.004)),
        Job(RunSpec(arm="no-such-arm", seed=1, learning_rate=0.004)),
        Job(RunSpec(arm="adamw", seed=2, learning_rate=0.004)),
    ]
    events: list[Event] = []
    pids: set[int] = set()
    # The first job would never end: its worker is killed while it starts.
    iterator = run_jobs(
        jobs, dataclasses.replace(experiment, training=endless), corpus, num_workers=1
    )
    for event in iterator:
        events.append(event)
        if isinstance(event, Started):
            pids.add(event.worker_pid)
            if event.job.spec.seed != 1:
                os.kill(event.worker_pid, signal.SIGKILL)
    failures = {event.job.spec.seed: event.reason for event in events if isinstance(event, Failed)}
    assert failures == {
        0: "its process ended with exit code -9",
        1: "KeyError: 'no-such-arm'",
        2: "its process ended with exit code -9",
    }
    assert not any(isinstance(event, Finished) for event in events)
    assert all(not _is_running(pid) for pid in pids)


@pytest.mark.timeout(120)
def test_rates_of_a_grid_are_tried_without_a_warning_and_a_bad_option_is_one_line(
    corpus: Corpus, experiment: Experiment, capfd: pytest.CaptureFixture[str]
) -> None:
    """NorMuon warns of a learning rate that is as large as Muon's; a grid means to try it."""
    with pytest.warns(UserWarning, match="looks like a learning rate that was tuned for Muon"):
        NorMuon([torch.nn.Parameter(torch.zeros(2, 2))], lr=2 * MUON_SIZED_LR)
    jobs = [
        Job(RunSpec(arm="normuon", seed=0, learning_rate=2 * MUON_SIZED_LR)),
        Job(
            RunSpec(
                arm="normuon",
                seed=1,
                learning_rate=0.004,
                options=ArmOptions(normuon=(("ns_stepz", 3),)),
            )
        ),
    ]
    events = list(run_jobs(jobs, experiment, corpus, num_workers=1))
    assert any(isinstance(event, Finished) for event in events)
    (reason,) = [event.reason for event in events if isinstance(event, Failed)]
    expected = "no arm takes ns_stepz as an option of normuon.NorMuon; did you mean ns_steps?"
    assert reason == expected
    assert capfd.readouterr().err == ""


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
