"""`normuon evidence`: does the protocol's runs, shows their results, and repeats a few."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from normuon_lab.atomic_files import prove_folder
from normuon_lab.errors import RunsFailedError, require

Stage = Literal["tune", "claim", "sensitivity"]


@dataclass(frozen=True, kw_only=True)
class RunEvidence:
    """Do the missing runs of the evidence: tuning, claim runs, sensitivity.

    Runs in the results' folder are not run again, so an interrupted command continues.
    The whole protocol takes many hours; docs/lab/protocol.md says which runs it has.
    """

    cells: tuple[str, ...] = ()
    """Cells of the protocol; all unless given."""
    arms: tuple[str, ...] = ()
    """Arms of the cells; all that a cell has unless given."""
    stages: tuple[Stage, ...] = ("tune", "claim", "sensitivity")
    """Which runs to do; only the first two cells have sensitivity runs."""
    results: Path = Path("results")
    """Folder of the published runs."""
    storage: Path = Path("runs/evidence.db")
    """SQLite database of the tuning's Optuna studies."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        from rich.console import Console

        from normuon_lab.study.evidence.protocol import CELLS, cell_of
        from normuon_lab.study.evidence.running import claim_cell, sensitivity_cell, tune_cell

        console = Console()
        cells = [cell_of(name) for name in self.cells or CELLS]
        for arm in self.arms:
            known = any(arm in cell.arms for cell in cells)
            require(known, f"no cell of {', '.join(cell.name for cell in cells)} has the arm {arm}")
        prove_folder(self.results, f"--results {self.results}")
        for cell in cells:
            arms = [arm for arm in cell.arms if not self.arms or arm in self.arms]
            if "tune" in self.stages:
                tune_cell(cell, arms, results=self.results, storage=self.storage, console=console)
            if "claim" in self.stages:
                claim_cell(cell, arms, results=self.results, console=console)
            if "sensitivity" in self.stages and cell.varied:
                sensitivity_cell(cell, results=self.results, console=console)
        return 0


@dataclass(frozen=True, kw_only=True)
class RunRivals:
    """Do the missing runs of the rivals of 2026: their tuning, then seeds paired with Muon's.

    Their budget is smaller than that of the protocol's arms: docs/lab/protocol.md says how small.
    """

    cells: tuple[str, ...] = ()
    """Cells of the protocol; all in which they are compared unless given."""
    arms: tuple[str, ...] = ()
    """Which rivals; all unless given."""
    stages: tuple[Literal["tune", "claim"], ...] = ("tune", "claim")
    """Which runs to do."""
    results: Path = Path("results")
    """Folder of the published runs."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        from rich.console import Console

        from normuon_lab.study.evidence.protocol import RECENT_CELLS, RECENT_RIVALS, cell_of
        from normuon_lab.study.evidence.recent_rivals import compare_rivals, tune_rivals

        console = Console()
        for arm in self.arms:
            require(arm in RECENT_RIVALS, f"{arm} is not one of {', '.join(RECENT_RIVALS)}")
        prove_folder(self.results, f"--results {self.results}")
        for cell in [cell_of(name) for name in self.cells or RECENT_CELLS]:
            arms = self.arms or RECENT_CELLS.get(cell.name, RECENT_RIVALS)
            if "tune" in self.stages:
                tune_rivals(cell, arms, results=self.results, console=console)
            if "claim" in self.stages:
                compare_rivals(cell, arms, results=self.results, console=console)
        return 0


@dataclass(frozen=True, kw_only=True)
class ReproduceEvidence:
    """Train a few published runs again and compare their losses with the published ones."""

    cell: str = "bytes-small"
    """Which cell."""
    seeds: tuple[int, ...] = (0, 1)
    """Which claim seeds."""
    results: Path = Path("results")
    """Folder of the published runs."""

    def run(self) -> int:
        """Run the command and return its exit code: 1 if a loss differs too much."""
        from rich.console import Console

        from normuon_lab.study.evidence.protocol import cell_of
        from normuon_lab.study.evidence.running import TOLERANCE, repeat_runs, table_of

        console = Console()
        repeats = repeat_runs(
            cell_of(self.cell), seeds=self.seeds, results=self.results, console=console
        )
        console.print(table_of(repeats))
        differ = [repeat for repeat in repeats if repeat.verdict == "differs"]
        if differ:
            names = ", ".join(f"{r.published.arm} seed {r.published.seed}" for r in differ)
            raise RunsFailedError(f"more than {TOLERANCE} nats from the published loss: {names}")
        return 0


@dataclass(frozen=True, kw_only=True)
class MeasureTable2:
    """Measure every arm's state, scratch and step time on the cells' models: a few minutes."""

    cells: tuple[str, ...] = ("bytes-small", "bytes-large")
    """Cells of the protocol whose models to take."""
    rounds: int = 30
    """Timed training steps of every arm."""
    results: Path = Path("results")
    """Folder of the published runs, where table2.json is written."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        require(self.rounds >= 1, f"--rounds must be at least 1, got {self.rounds}")
        from rich.console import Console

        from normuon_lab.study.evidence.protocol import cell_of
        from normuon_lab.study.evidence.table2 import write_table2

        write_table2(
            self.results,
            [cell_of(name) for name in self.cells],
            rounds=self.rounds,
            say=Console(stderr=True).print,
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class BuildEvidence:
    """Make table1.json, the figures and the results page from the published runs."""

    results: Path = Path("results")
    """Folder of the published runs, where table1.json is written."""
    docs: Path = Path("docs")
    """Folder of the documentation."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        from normuon_lab.study.evidence.build import build

        for path in build(self.results, self.docs):
            print(path)
        return 0


@dataclass(frozen=True, kw_only=True)
class EvidenceCommand:
    """Make, build and repeat the published evidence."""

    action: Annotated[
        Annotated[RunEvidence, tyro.conf.subcommand("run")]
        | Annotated[RunRivals, tyro.conf.subcommand("rivals")]
        | Annotated[MeasureTable2, tyro.conf.subcommand("table2")]
        | Annotated[BuildEvidence, tyro.conf.subcommand("build")]
        | Annotated[ReproduceEvidence, tyro.conf.subcommand("reproduce")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        """Run the command and return its exit code."""
        return self.action.run()
