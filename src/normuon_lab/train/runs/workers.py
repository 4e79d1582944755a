"""Does training runs in worker processes, one thread each, with progress on the terminal.

One thread per worker, whatever the number of workers: results must not depend on how many cores
there are, and two one-thread workers do more than one worker with two threads.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from rich.console import Console

from normuon_lab.errors import InputError, RunsFailedError, counted
from normuon_lab.machine import default_num_workers
from normuon_lab.train.display import RunsDisplay
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import Task
from normuon_lab.train.runs.train import train_run

# Pipes would otherwise carry a message per step of a tiny model.
_SECONDS_BETWEEN_PROGRESS = 0.2


@dataclass(frozen=True, slots=True)
class Job:
    """A run to do, and whether to measure its update matrices on the way."""

    spec: RunSpec
    probe_updates: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """A worker has taken the job."""

    job: Job
    worker_pid: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The job has done `step` steps; `loss` is the last training loss."""

    job: Job
    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The job is done."""

    job: Job
    record: RunRecord


@dataclass(frozen=True, slots=True)
class Failed:
    """The job ended without a record."""

    job: Job
    reason: str


Event = Started | Progress | Finished | Failed


def execute(
    jobs: Sequence[Job],
    experiment: Experiment,
    task: Task,
    *,
    console: Console,
    on_finished: Callable[[RunSpec, RunRecord], object],
    num_done: int = 0,
) -> None:
    """Do all jobs and pass on each record as it comes.

    Raises:
        RunsFailedError: after all other jobs are done, if any failed.
    """
    failures: list[Failed] = []
    lengths = {job.spec: job.spec.training(experiment).steps for job in jobs}
    display = RunsDisplay(
        console,
        num_runs=num_done + len(jobs),
        num_done=num_done,
        steps=num_done * experiment.training.steps + sum(lengths.values()),
        steps_done=num_done * experiment.training.steps,
    )
    events = run_jobs(jobs, experiment, task, num_workers=default_num_workers(len(jobs)))
    with display:
        try:
            for event in events:
                spec = event.job.spec
                if isinstance(event, Started):
                    title = f"{spec.arm} seed {spec.seed} (lr {spec.learning_rate:g})"
                    display.start(spec, title, steps=lengths[spec])
                elif isinstance(event, Progress):
                    display.advance(spec, event.step, event.loss)
                elif isinstance(event, Finished):
                    on_finished(spec, event.record)
                    display.end(spec, _outcome(event.record))
                else:
                    failures.append(event)
                    display.end(spec, f"failed: {event.reason}")
        finally:
            events.close()
    if failures:
        raise RunsFailedError(
            "; ".join(f"{event.job.spec.name} failed: {event.reason}" for event in failures)
        )


def execute_specs(
    specs: Sequence[RunSpec], experiment: Experiment, task: Task, *, console: Console
) -> dict[RunSpec, RunRecord]:
    """Do all runs and return their records; see `execute`."""
    records: dict[RunSpec, RunRecord] = {}
    execute(
        [Job(spec) for spec in specs],
        experiment,
        task,
        console=console,
        on_finished=records.__setitem__,
    )
    return records


def _outcome(record: RunRecord) -> str:
    outcome = (
        f"diverged after {counted(len(record.train_losses), 'step')}"
        if record.final_loss is None
        else f"validation loss {record.final_loss:.4f}"
    )
    return f"{outcome} in {record.total_seconds:.1f} s"


def run_jobs(
    jobs: Sequence[Job], experiment: Experiment, task: Task, *, num_workers: int
) -> Generator[Event, None, None]:
    """Do all jobs, in order of start, and yield what happens.

    A job that raises, or whose process dies, yields `Failed`; the others continue. Closing the
    iterator, or an exception in the caller's loop, ends the workers.
    """
    waiting = deque(jobs)
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.job is not None for worker in workers):
            while waiting and len(workers) < num_workers:
                workers.append(_Worker(experiment, task))
            for worker in workers:
                if worker.job is None and waiting:
                    yield worker.take(waiting.popleft())
            ready = wait([worker.connection for worker in workers])
            for worker in [worker for worker in workers if worker.connection in ready]:
                event = worker.receive()
                if worker.connection.closed:
                    workers.remove(worker)
                if event is not None:
                    yield event
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, experiment: Experiment, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child_end = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_work, args=(child_end, experiment, task), daemon=True
        )
        # The terminal sends Ctrl-C to the whole group. The parent alone answers it; a worker, which
        # inherits what is ignored here, must not print a traceback while it is still importing.
        with _interrupts_ignored():
            self._process.start()
        child_end.close()
        self.job: Job | None = None

    def take(self, job: Job) -> Started:
        self.job = job
        # A process that died on the way is noticed by `receive`, which finds the pipe closed.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(job)
        assert self._process.pid is not None
        return Started(job, self._process.pid)

    def receive(self) -> Event | None:
        """The next event; None when a worker without a job has died."""
        job = self.job
        try:
            event: Event = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.stop()
            if job is None:
                return None
            return Failed(job, f"its process ended with exit code {self._process.exitcode}")
        if isinstance(event, Finished | Failed):
            self.job = None
        return event

    def stop(self) -> None:
        self.connection.close()
        self._process.join(timeout=0.2)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(connection: Connection, experiment: Experiment, task: Task) -> None:
    """A worker's loop: take a job and report on it, until the parent closes the pipe."""
    import torch

    torch.set_num_threads(1)
    # The rates of a grid go past the best on purpose; the library's warning is for the others.
    warnings.filterwarnings("ignore", message=r"lr=.* looks like a learning rate that was tuned")
    try:
        while True:
            _do(connection.recv(), connection, experiment, task)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The parent is gone or has closed its end: nobody is left to report to.
        return


def _do(job: Job, connection: Connection, experiment: Experiment, task: Task) -> None:
    last_sent = 0.0

    def send_progress(step: int, loss: float) -> None:
        nonlocal last_sent
        now = time.monotonic()
        if now - last_sent >= _SECONDS_BETWEEN_PROGRESS:
            last_sent = now
            connection.send(Progress(job, step, loss))

    try:
        record = train_run(
            job.spec,
            experiment,
            task,
            probe_updates=job.probe_updates,
            on_step=send_progress,
        )
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        reason = text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
        connection.send(Failed(job, reason))
    else:
        connection.send(Finished(job, record))


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:
        # Not in the main thread: there Ctrl-C arrives elsewhere anyway.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
