"""One run from its configuration to its last checkpoint: builds, restores, trains, cleans up."""

from __future__ import annotations

import os
import shlex
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import nn

from normuon_lab.command_line import program
from normuon_lab.data.batches import PretrainData
from normuon_lab.data.loading import open_data
from normuon_lab.errors import counted, require
from normuon_lab.machine import denormals_flushed
from normuon_lab.train.display import RunDisplay
from normuon_lab.train.model import build_named_model, config_of, config_values, num_parameters
from normuon_lab.train.pretrain.checkpoint import (
    CONFIG_FILE,
    begin,
    find_resume_point,
    newest_complete,
)
from normuon_lab.train.pretrain.config import PretrainConfig
from normuon_lab.train.pretrain.metrics import MetricsLog, check_trackers
from normuon_lab.train.pretrain.parallel import joined
from normuon_lab.train.pretrain.trainer import Trainer
from normuon_lab.train.ranks import Ranks


def train(config: PretrainConfig, out: Path, *, resume: str, console: Console) -> None:
    """Train, alone or as one of torchrun's ranks.

    SIGTERM and Ctrl-C end it after the current step, with a checkpoint.

    Raises:
        InputError: something given cannot be used; nothing was overwritten.
        RunsFailedError: training failed; the checkpoints before are untouched.
        KeyboardInterrupt: Ctrl-C ended it.
    """
    check_trackers(config.metrics.trackers)
    stop = StopRequest()
    with stop.noted(signal.SIGTERM), denormals_flushed(), joined(config.parallel) as ranks:
        stop.speaks = ranks.is_main
        # A process alone saves and loads alone; torch would say so each time.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        model = build_named_model(
            config.model.model, seed=config.seed, pretrained=config.model.pretrained
        )
        torch.manual_seed(config.seed + ranks.data_rank)  # For dropout.
        model_config = config_values(model)
        point = ranks.on_main(lambda: find_resume_point(out, resume, config, model_config))
        data = open_data(
            config.data, sequence_length=config.batch.sequence_length, seed=config.seed
        )
        _check_fit(config, data, model)
        title = _title(config, data, model)
        first_step = 0 if point is None else point[1].step
        display = RunDisplay(
            console, step=first_step, steps=config.batch.steps, enabled=ranks.is_main
        )
        trainer = Trainer(config, out, ranks, model, data, display, point)
        ranks.on_main(lambda: begin(out, config))
        try:
            if ranks.is_main:
                trainer.metrics = MetricsLog(out, config, step=first_step)
            with trainer.metrics or nullcontext(), display, stop.noted(signal.SIGINT):
                display.say(f"training {title}, into {out}")
                if first_step:
                    display.say(f"continuing from step {first_step}")
                is_done = trainer.run(lambda: stop.agreed(ranks))
            _say_how_it_ended(
                display, out, stopped_by="" if is_done else stop.by, step=trainer.step
            )
        finally:
            trainer.writer.close()
            trainer.batches.close()
    if not is_done and stop.by == INTERRUPT:
        raise KeyboardInterrupt


def _say_how_it_ended(display: RunDisplay, out: Path, stopped_by: str, *, step: int) -> None:
    kept = newest_complete(out)
    if not stopped_by:
        display.say(f"done: {kept}")
    elif kept is None:
        display.say(f"stopped by {stopped_by} before the first step")
    else:
        display.say(f"stopped by {stopped_by} after step {step}, which is saved; continue with:")
        display.say(_resume_command(out))


INTERRUPT = "Ctrl-C"


class StopRequest:
    """A request to stop after the current step, which all ranks then do together.

    Signals are noted within `noted`: SIGTERM, which schedulers send before they end a job, all the
    time, and Ctrl-C from the first step on, so that before it ends the process at once. A signal
    only sets a flag: the current step or checkpoint is finished first.

    Attributes:
        by: the source of the request, for messages.
        speaks: whether Ctrl-C is answered with a line.
    """

    def __init__(self) -> None:
        self.by = ""
        self.speaks = False

    @contextmanager
    def noted(self, number: signal.Signals) -> Iterator[None]:
        """Note a signal; a second Ctrl-C ends the process at once."""
        before = signal.signal(number, self._note)
        try:
            yield
        finally:
            signal.signal(number, before)

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop; all ranks call this together."""
        if not ranks.any(bool(self.by)):
            return False
        self.by = INTERRUPT if ranks.any(self.by == INTERRUPT) else "SIGTERM"
        return True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.by = "SIGTERM" if number == signal.SIGTERM else INTERRUPT
        if number == signal.SIGTERM:
            return
        # By the system, since Python would wait for the end of a long operation.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.speaks:
            # Unbuffered: the signal may have come while a line was being printed.
            text = "\nstopping after this step, with a checkpoint; Ctrl-C again ends at once\n"
            with suppress(OSError):
                os.write(2, text.encode())


def _resume_command(out: Path) -> str:
    """The command that continues a stopped run on as many ranks; on several nodes without the
    rendezvous."""
    # torchrun tells its processes.
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    command = program()
    if world_size > 1:
        num_nodes = world_size // ranks_per_node
        nodes = ["--nnodes", str(num_nodes)] if num_nodes > 1 else []
        words = ["torchrun", *nodes, "--nproc-per-node", str(ranks_per_node), "-m", "normuon_lab"]
        command = shlex.join(words)
    options = ["--config", str(out / CONFIG_FILE), "--out", str(out), "--resume", "auto"]
    return f"{command} {shlex.join(['train', *options])}"


def _check_fit(config: PretrainConfig, data: PretrainData, model: nn.Module) -> None:
    """Raise `InputError` unless the model can take the data's tokens and sequences."""
    longest = getattr(config_of(model), "max_position_embeddings", None)
    length = config.batch.sequence_length
    require(
        longest is None or length <= longest,
        f"--sequence-length {length}: the model has {counted(longest or 0, 'position')}",
    )
    known: Any = model
    size = known.get_input_embeddings().num_embeddings
    require(
        data.vocab_size <= size,
        f"the data has a vocabulary of {data.vocab_size}, more than the model's {size}: give "
        "another tokenizer or model",
    )


def _title(config: PretrainConfig, data: PretrainData, model: nn.Module) -> str:
    """One line: the model and its size, the data and its size."""
    described, size = data.describe(), counted(num_parameters(model), "parameter")
    amount = (
        counted(described["train_tokens"], "token")
        if "train_tokens" in described
        else f"streamed from {counted(described['files'], 'file')}"
    )
    return f"{config.model.model} ({size}) on {', '.join(described['source'])} ({amount})"
