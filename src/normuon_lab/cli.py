"""The `normuon` command: subcommands, and errors of input as one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from normuon_lab.bench.command import BenchCommand
from normuon_lab.data.command import DataCommand
from normuon_lab.doctor import DoctorCommand
from normuon_lab.errors import InputError, InterruptedRunsError, RunsFailedError, require
from normuon_lab.plan.command import PlanCommand
from normuon_lab.pretrain.command import Train, default_command
from normuon_lab.pretrain.export import ExportCommand
from normuon_lab.pretrain.inspect import InspectCommand
from normuon_lab.runs.config import Experiment, ModelConfig, TrainConfig

EXIT_RUNS_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_DEFAULT_ARMS = ("adamw", "muon", "normuon")
_MODEL = ModelConfig()
_TRAINING = TrainConfig()
_BPE_VOCAB_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """What is trained, shared by subcommands."""

    data: tuple[str, ...] = ("stdlib",)
    """Text to train on: stdlib (the running Python's library), shakespeare, or text files."""
    tokenizer: str = "bytes"
    """Tokens: bytes, or bpe, made from the training part of the text."""
    vocab_size: int | None = None
    """Tokens of the BPE; 1024 unless given."""
    steps: int = _TRAINING.steps
    """Optimizer steps of each run."""
    batch_size: int = _TRAINING.batch_size
    """Sequences per step."""
    warmup_fraction: float = _TRAINING.warmup_fraction
    """Share of the steps over which the learning rate rises; it falls linearly to 0 after."""
    evals: int = _TRAINING.num_evals
    """Evaluations per run, evenly spread, besides the one before the first step."""
    eval_tokens: int = _TRAINING.eval_tokens
    """Held-out tokens that each evaluation reads, the same in every run."""
    model: str = _MODEL.family
    """Architecture: llama or gpt2."""
    layers: int = _MODEL.num_layers
    """Transformer layers."""
    width: int = _MODEL.width
    """Width of the residual stream."""
    heads: int = _MODEL.num_heads
    """Attention heads."""
    mlp_width: int = _MODEL.mlp_width
    """Width of the MLP."""
    sequence_length: int = _MODEL.sequence_length
    """Tokens per sequence."""
    compile: bool = False
    """Use torch.compile; needs a C++ compiler, and was no faster for the default model."""

    def experiment(self) -> Experiment:
        """The validated experiment."""
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        require(
            not self.compile or any(shutil.which(compiler) for compiler in compilers),
            "--compile needs a C++ compiler, and none was found: install g++ or leave it out",
        )
        return Experiment(
            model=ModelConfig(
                family=self.model,
                num_layers=self.layers,
                width=self.width,
                num_heads=self.heads,
                mlp_width=self.mlp_width,
                sequence_length=self.sequence_length,
                vocab_size=self._vocab_size(),
            ),
            training=TrainConfig(
                steps=self.steps,
                batch_size=self.batch_size,
                warmup_fraction=self.warmup_fraction,
                num_evals=self.evals,
                eval_tokens=self.eval_tokens,
            ),
            data=self.data,
            tokenizer=self.tokenizer,
            compile=self.compile,
        )

    def _vocab_size(self) -> int:
        if self.vocab_size is not None:
            return self.vocab_size
        return _BPE_VOCAB_SIZE if self.tokenizer == "bpe" else _MODEL.vocab_size


@dataclass(frozen=True, kw_only=True)
class Compare(ExperimentOptions):
    """Train one small model per arm and seed; say how many fewer steps each arm needs."""

    arms: tuple[str, ...] = _DEFAULT_ARMS
    """Optimizers to compare."""
    seeds: int = 4
    """Seeds per arm, counted from 0: each sets the initial weights and the order of the data."""
    lr: tuple[str, ...] = ()
    """Peak learning rates that replace tuned ones, as ARM=VALUE."""
    tuned: str | None = None
    """A file written by `normuon tune`, in place of the rates shipped with the package."""
    out: Path = Path("runs/compare")
    """Folder for results.json, report.html and TensorBoard's files."""
    resume: bool = False
    """Go on with the runs that OUT is missing."""

    def run(self) -> int:
        """Do it and return the exit code."""
        experiment = self.experiment()
        rates = parse_rates(self.lr)
        from rich.console import Console

        from normuon_lab.compare.comparison import ComparisonRequest, run_comparison
        from normuon_lab.compare.summary import print_summary

        console = Console()
        request = ComparisonRequest(
            experiment=experiment,
            arms=self.arms,
            num_seeds=self.seeds,
            given_rates=rates,
            tuned_path=self.tuned,
            out=self.out,
            resume=self.resume,
        )
        results = run_comparison(request, console)
        print_summary(results, console)
        console.print(f"Report: {self.out / 'report.html'}", highlight=False, soft_wrap=True)
        return 0


@dataclass(frozen=True, kw_only=True)
class Tune(ExperimentOptions):
    """Find each arm's learning rate, on seeds that no comparison uses."""

    arms: tuple[str, ...] = _DEFAULT_ARMS
    """Optimizers to tune; every one gets the same number of trials."""
    lrs: tuple[float, ...] = (0.002, 0.004, 0.008, 0.016, 0.032)
    """The first grid of peak learning rates; it grows where the best is at an end."""
    seeds: int = 2
    """Tuning seeds, counted from 1000."""
    rounds: int = 2
    """Rounds after the grid, each with one more rate per arm: beyond an end, or refining."""
    max_rounds: int = 6
    """Rounds after which to stop looking for a best rate that is not at an end."""
    out: Path = Path("runs/tuned.json")
    """File for the result; rewritten after every round."""

    def run(self) -> int:
        """Do it and return the exit code."""
        experiment = self.experiment()
        from rich.console import Console

        from normuon_lab.tune.tuning import TuneRequest, run_tuning

        request = TuneRequest(
            experiment=experiment,
            arms=self.arms,
            rates=self.lrs,
            num_seeds=self.seeds,
            min_rounds=self.rounds,
            max_rounds=self.max_rounds,
            out=self.out,
        )
        contents = run_tuning(request, Console(), command=_command_line())
        at_an_end = [arm for arm, found in contents["arms"].items() if not found["is_interior"]]
        if at_an_end:
            raise RunsFailedError(
                f"the best learning rate of {', '.join(at_an_end)} is still at an end of what was "
                "tried: give more --max-rounds or another --lrs"
            )
        return 0


AnyCommand = (
    Compare
    | Tune
    | PlanCommand
    | BenchCommand
    | Train
    | DataCommand
    | ExportCommand
    | InspectCommand
    | DoctorCommand
)
Command = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[BenchCommand, tyro.conf.subcommand("bench")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[DataCommand, tyro.conf.subcommand("data")]
    | Annotated[ExportCommand, tyro.conf.subcommand("export")]
    | Annotated[InspectCommand, tyro.conf.subcommand("inspect")]
    | Annotated[DoctorCommand, tyro.conf.subcommand("doctor")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Errors of input are one line on stderr and exit code 2; failed runs 1; Ctrl-C 130.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return parse(words).run()
    except InputError as error:
        return _fail(f"error: {error}", EXIT_BAD_INPUT)
    except RunsFailedError as error:
        return _fail(f"error: {error}", EXIT_RUNS_FAILED)
    except InterruptedRunsError as error:
        again = shlex.join(["normuon", *(word for word in words if word != "--resume"), "--resume"])
        hint = f"; go on with: {again}" if error.can_resume else ""
        return _fail(f"{error}{hint}", EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def parse_rates(pairs: Sequence[str]) -> dict[str, float]:
    """`--lr`'s pairs as a dictionary.

    >>> parse_rates(["adamw=0.002"])
    {'adamw': 0.002}
    """
    rates: dict[str, float] = {}
    for pair in pairs:
        arm, separator, text = pair.partition("=")
        try:
            value = float(text)
        except ValueError:
            separator = ""
            value = 0.0
        require(separator == "=", f"--lr {pair}: write ARM=VALUE, such as normuon=0.004")
        require(arm not in rates, f"--lr names {arm} twice")
        rates[arm] = value
    return rates


def parse(words: list[str]) -> AnyCommand:
    """The command that the words ask for.

    Raises:
        InputError: they are not understood; tyro's boxes become one line.
    """
    shown = io.StringIO()
    # The defaults of these flags are those of --preset and --config, which are read first.
    defaults = {"default": default_command(words[1:])} if words[:1] == ["train"] else {}
    try:
        with contextlib.redirect_stderr(shown):
            command: AnyCommand = tyro.cli(
                Command,
                prog="normuon",
                description="Train language models with NorMuon, and compare it with others.",
                args=words,
                config=(tyro.conf.FlagCreatePairsOff,),
                **defaults,
            )
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
        raise InputError(f"{_first_message(shown.getvalue())} (see normuon --help)") from None
    return command


def _first_message(box: str) -> str:
    """The message inside one of tyro's boxes: what stands above its first rule, on one line."""
    inside = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    message = itertools.takewhile(lambda line: not line.startswith("──"), inside)
    text = " ".join(" ".join(message).split())
    # What a group of options says of itself needs no name of the group, least of all tyro's.
    text = re.sub(r"^Error parsing __tyro-dummy-inner__\S*: ", "", text)
    return text or "the command line is not understood"


def _fail(text: str, code: int) -> int:
    print(f"normuon: {text}", file=sys.stderr)
    return code


def _command_line() -> str:
    return shlex.join(["normuon", *sys.argv[1:]])
