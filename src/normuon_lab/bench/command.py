"""`normuon bench`: its options and checks, and where its results go."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from normuon_lab.command_line import recorded_command
from normuon_lab.errors import InputError, flag, require

if TYPE_CHECKING:
    from normuon_lab.bench.matrices import MatrixClass

MAX_ROUNDS = 1000
MAX_THREADS = 1024


_SUITE_ONLY = ("seconds", "parts", "models", "tests", "tokens_per_step", "lr")


def _typed(name: str) -> str:
    """How an option that differs from its default was typed."""
    return flag(f"no_{name}" if name in ("peers", "polar", "tests") else name)


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """Time one optimizer step of NorMuon and of installed peers on this machine.

    Writes bench.json, bench.png and bench.svg. Steps are interleaved in one process; every figure
    is defined in docs/lab/bench.md. With --suite gpu, everything about one GPU in ten minutes.
    """

    model: str | None = None
    """A preset (gpt2-124m, llama3-8b, ...), a transformers config.json, or the folder of one."""
    shapes: str | None = None
    """In place of a model: matrices as [COUNTx]ROWSxCOLS, such as 4x768x768,3072x768."""
    layers: int | None = None
    """Use only this many of the model's first layers."""
    dtype: tuple[Literal["auto", "float32", "bfloat16"], ...] = ("auto",)
    """Dtypes of our Newton-Schulz; peers that take a dtype get the first."""
    coefficients: tuple[Literal["jordan", "polar_express", "you", "cans"], ...] = ("jordan",)
    """Tables of our Newton-Schulz's polynomial."""
    only: tuple[str, ...] = ()
    """Keep contenders whose names match one of these patterns, such as 'NorMuon auto*'."""
    repeats: int = 7
    """Timed steps of each contender."""
    threads: int | None = None
    """CPU threads; by default torch's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the steps; auto is CUDA if there is a device."""
    peers: bool = True
    """With --no-peers, only NorMuon takes part."""
    peer_seconds: float = 60.0
    """A peer that would take longer, without compiling, is left out with a note."""
    polar: bool = True
    """With --no-polar, nothing is compared with the polar factor, which takes long on large
    matrices."""
    dion: Path | None = None
    """A checkout of github.com/microsoft/dion."""
    authors: Path | None = None
    """The paper's authors' normuon.py, of github.com/zichongli5/NorMuon."""
    seed: int = 0
    """Seed of weights and gradients."""
    out: Path | None = None
    """Folder for the results; by default runs/bench, or runs/gpu with --suite."""
    suite: Literal["gpu"] | None = None
    """In place of a model: tests, step table, accuracy, training step and loss on one GPU, written
    as gpu.json and gpu.html; a dry run on a CPU."""
    seconds: float = 540.0
    """With --suite: seconds for the whole run."""
    parts: tuple[str, ...] = ()
    """With --suite: only these of machine, tests, step, accuracy, training and comparison."""
    models: tuple[str, ...] = ()
    """With --suite: of the step table, in place of its own: names as for --model."""
    tests: bool = True
    """With --suite: --no-tests leaves tests/gpu out."""
    tokens_per_step: int = 65_536
    """With --suite: tokens of the training step."""
    lr: float = 1e-3
    """With --suite: learning rate of the comparison of losses."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        if self.suite is not None:
            return self._run_suite()
        self._check()
        # Read when torch is loaded: its profiler otherwise comments on each use on stderr.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        import torch
        from rich.console import Console

        from normuon_lab.atomic_files import prove_folder, write_json
        from normuon_lab.bench.figure import bench_figure
        from normuon_lab.bench.peers import PeerPaths
        from normuon_lab.bench.race import BenchRequest, run_bench
        from normuon_lab.bench.text import print_bench
        from normuon_lab.plot_style import save_figure

        has_cuda = torch.cuda.is_available()
        require(has_cuda or self.device != "cuda", "--device cuda: torch finds no CUDA device")
        request = BenchRequest(
            matrices=self._matrices(),
            title=self._title(),
            dtypes=self.dtype,
            coefficients=self.coefficients,
            rounds=self.repeats,
            threads=self.threads,
            device=torch.device("cuda" if has_cuda and self.device != "cpu" else "cpu"),
            with_peers=self.peers,
            peer_seconds=self.peer_seconds,
            paths=PeerPaths(dion=self.dion, authors=self.authors),
            only=self.only,
            with_polar=self.polar,
            seed=self.seed,
            command=recorded_command(),
        )
        out = self.out or Path("runs/bench")
        prove_folder(out, f"--out {out}")
        console = Console()
        with Console(stderr=True).status("starting") as status, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Packages warn about how they call torch.
            contents = run_bench(request, say=status.update)
        write_json(out / "bench.json", contents)
        for suffix in ("png", "svg"):
            save_figure(bench_figure(contents), out / f"bench.{suffix}")
        print_bench(contents, console)
        console.print(f"Written: {out / 'bench.json'}", highlight=False, soft_wrap=True)
        return 0

    def _run_suite(self) -> int:
        from normuon_lab.bench.suite.options import SuiteOptions
        from normuon_lab.bench.suite.run import exit_code, run_suite

        shared = {one.name for one in fields(SuiteOptions)} & {one.name for one in fields(self)}
        for name in self._given() - shared - {"suite"}:
            raise InputError(f"{_typed(name)} is not for --suite {self.suite}")
        given = {name: getattr(self, name) for name in shared & self._given()}
        return exit_code(run_suite(SuiteOptions(**given, command=recorded_command())))

    def _given(self) -> set[str]:
        """Names of the options that differ from their defaults."""
        return {one.name for one in fields(self) if getattr(self, one.name) != one.default}

    def _check(self) -> None:
        """Checks that do not depend on the machine."""
        for name in _SUITE_ONLY:
            require(name not in self._given(), f"{_typed(name)} goes with --suite gpu")
        require(
            (self.model is None) != (self.shapes is None),
            "give either --model or --shapes, such as --model gpt2-124m --layers 2",
        )
        require(
            self.layers is None or self.model is not None,
            "--layers is for --model; in --shapes, write the counts",
        )
        for name, least in (("layers", 1), ("threads", 1), ("seed", 0)):
            value = getattr(self, name)
            require(value is None or value >= least, f"--{name} {value}: give at least {least}")
        is_few = self.threads is None or self.threads <= MAX_THREADS
        require(is_few, f"--threads {self.threads}: give at most {MAX_THREADS:,}")
        require(
            1 <= self.repeats <= MAX_ROUNDS, f"--repeats {self.repeats}: give 1 to {MAX_ROUNDS}"
        )
        require(self.peer_seconds > 0, f"--peer-seconds {self.peer_seconds:g}: give more than 0")
        for name in ("dtype", "coefficients"):
            require(bool(getattr(self, name)), f"--{name}: give at least one")

    def _matrices(self) -> tuple[MatrixClass, ...]:
        from normuon_lab.bench.matrices import model_matrices, parse_shapes

        if self.shapes is not None:
            return parse_shapes(self.shapes)
        assert self.model is not None
        return model_matrices(self.model, num_layers=self.layers)

    def _title(self) -> str:
        if self.model is None:
            return "given matrices"
        return self.model if self.layers is None else f"{self.model}, {self.layers} layers"
