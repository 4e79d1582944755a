"""Trains a few of the published runs again and compares their losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from normuon_lab.errors import require
from normuon_lab.study.evidence.protocol import Cell
from normuon_lab.study.evidence.runs import read_runs
from normuon_lab.train.arms.options import ArmOptions
from normuon_lab.train.arms.registry import MAIN_ARMS
from normuon_lab.train.runs.config import RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import load_task

TOLERANCE = 0.02
"""Nats per token. Runs repeat bit by bit on one machine; another's kernels round differently, and
training spreads that: seeds of one arm differ by about 0.02."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """A published run and its repetition."""

    published: RunRecord
    repeated: RunRecord

    @property
    def difference(self) -> float:
        """Repeated minus published final loss; infinite where only one of them diverged."""
        if self.published.diverged and self.repeated.diverged:
            return 0.0
        if self.published.final_loss is None or self.repeated.final_loss is None:
            return math.inf
        return self.repeated.final_loss - self.published.final_loss

    @property
    def verdict(self) -> str:
        """``"equal"``, ``"within tolerance"`` or ``"differs"``."""
        if self.difference == 0.0:
            return "equal"
        return "within tolerance" if abs(self.difference) <= TOLERANCE else "differs"


def repeat_runs(
    cell: Cell, *, seeds: Sequence[int], results: Path, console: Console
) -> list[Repeat]:
    """Repeat the main arms' full-length runs of a cell on some of the claim seeds.

    Raises:
        InputError: nothing is published for that, or it was made from another text.
    """
    published = {
        RunSpec(
            arm=run.record.arm,
            seed=run.record.seed,
            learning_rate=run.record.learning_rate,
            options=ArmOptions.from_json(run.record.options),
            steps=run.record.steps,
        ): run
        for run in read_runs(results, cell.name)
        if run.record.arm in MAIN_ARMS
        and run.record.seed in seeds
        and run.record.steps == cell.full_steps
    }
    require(bool(published), f"{results} holds no full-length runs of {cell.name} on those seeds")
    corpus = load_task(cell.experiment)
    for run in published.values():
        require(
            run.corpus_digest == corpus.digest,
            f"{run.path} was made from another text (SHA-256 {run.corpus_digest[:12]}..., not "
            f"{corpus.digest[:12]}...): the standard library of another Python, say",
        )
    from normuon_lab.train.runs.execution import execute_specs

    repeated = execute_specs(list(published), cell.experiment, corpus, console=console)
    return [Repeat(run.record, repeated[spec]) for spec, run in published.items()]


def table_of(repeats: Sequence[Repeat]) -> Table:
    """Published and repeated losses side by side."""
    table = Table(title="Final validation loss, nats per token")
    for title in ("run", "published", "repeated", "difference", ""):
        table.add_column(title, justify="left" if title in ("run", "") else "right")
    for repeat in repeats:
        record = repeat.published
        table.add_row(
            f"{record.arm} seed {record.seed}",
            *(_loss(run.final_loss) for run in (record, repeat.repeated)),
            f"{repeat.difference:+.2e}",
            repeat.verdict,
        )
    return table


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.6f}"
