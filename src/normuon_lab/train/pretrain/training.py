"""One run from its configuration to its last checkpoint: builds, restores, trains, cleans up."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from normuon_lab.data.batches import PretrainData
from normuon_lab.data.loading import open_data
from normuon_lab.errors import counted, require
from normuon_lab.machine import denormals_flushed
from normuon_lab.train.arms.options import ArmOptions
from normuon_lab.train.arms.registry import PRETRAINING_ARMS
from normuon_lab.train.display import RunDisplay
from normuon_lab.train.model import (
    build_named_model,
    config_of,
    config_values,
    flops_per_token,
    num_parameters,
)
from normuon_lab.train.pretrain.checkpoint import (
    CONFIG_FILE,
    ResumePoint,
    begin,
    find_resume_point,
    newest_complete,
)
from normuon_lab.train.pretrain.checkpoint_tensors import restore_
from normuon_lab.train.pretrain.checkpoint_writer import CheckpointWriter
from normuon_lab.train.pretrain.config import BatchConfig, OptimizerConfig, PretrainConfig
from normuon_lab.train.pretrain.metrics import MetricsLog, check_trackers, peak_flops
from normuon_lab.train.pretrain.parallel import compute_dtype, joined, spread
from normuon_lab.train.pretrain.trainer import INTERRUPT, StopRequest, Trainer, Training
from normuon_lab.train.ranks import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What `normuon train` is asked for.

    Attributes:
        config: resolved.
        out: the run's folder.
        resume: see `find_resume_point`.
    """

    config: PretrainConfig
    out: Path
    resume: str


def train(request: TrainRequest, console: Console) -> None:
    """Train, alone or as one of torchrun's ranks.

    SIGTERM and Ctrl-C end it after the current step, with a checkpoint.

    Raises:
        InputError: something given cannot be used; nothing was overwritten.
        RunsFailedError: training failed; the checkpoints before are untouched.
        KeyboardInterrupt: Ctrl-C ended it.
    """
    config = request.config
    check_trackers(config.metrics.trackers)
    with StopRequest() as stop, denormals_flushed(), joined(config.parallel) as ranks:
        # A process alone saves and loads alone; torch would say so each time.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        model = build_named_model(
            config.model.model, seed=config.seed, pretrained=config.model.pretrained
        )
        torch.manual_seed(config.seed + ranks.data_rank)  # For dropout.
        model_config = config_values(model)
        point = ranks.on_main(
            lambda: find_resume_point(request.out, request.resume, config, model_config)
        )
        data = open_data(
            config.data, sequence_length=config.batch.sequence_length, seed=config.seed
        )
        _check_fit(config, data, model)
        training = assemble(request, ranks, model, data)
        if point is not None:
            _go_on_from_(point, training)
        ranks.on_main(lambda: begin(request.out, config))
        try:
            is_interrupted = _run(training, request, stop, console)
        finally:
            training.writer.close()
            training.batches.close()
    if is_interrupted:
        raise KeyboardInterrupt


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, *, forward_dtype: torch.dtype = torch.bfloat16
) -> list[Optimizer]:
    """The optimizers of an arm, at their peak learning rates.

    Args:
        model: as it will be trained, spread over its ranks.
        config: of the optimizer.
        forward_dtype: what the model computes in.
    """
    normuon: list[tuple[str, Any]] = [("equilibrate", True)] if config.equilibrate else []
    if config.momentum_dtype != "auto":
        normuon.append(("momentum_dtype", config.momentum_dtype))
    options = ArmOptions(
        adam_lr=config.adam_lr,
        embedding_lr=config.embedding_lr,
        head_lr=config.head_lr,
        weight_decay=config.weight_decay,
        betas=config.betas,
        momentum=config.momentum,
        beta2=config.beta2,
        ns_dtype=forward_dtype if config.ns_dtype == "auto" else getattr(torch, config.ns_dtype),
        split_heads=config.split_heads,
        normuon=tuple(normuon),
    )
    return PRETRAINING_ARMS[config.arm].build(model, config.lr, options)


def micro_batch_size(batch: BatchConfig, *, data_ranks: int) -> int:
    """Sequences that a rank takes at once: those asked for, or all of its share if that is less.

    Raises:
        InputError: the batch does not divide.

    Example:
        >>> micro_batch_size(BatchConfig(batch_size=16, micro_batch_size=16), data_ranks=4)
        4
    """
    require(
        batch.batch_size % data_ranks == 0,
        f"--batch-size {batch.batch_size} does not split over "
        f"{counted(data_ranks, 'data-parallel rank')}",
    )
    share = batch.batch_size // data_ranks
    size = min(batch.micro_batch_size, share)
    require(
        share % size == 0,
        f"a rank's {counted(share, 'sequence')} of a step do not split into micro batches of "
        f"{size}: give another --micro-batch-size",
    )
    return size


def assemble(request: TrainRequest, ranks: Ranks, model: nn.Module, data: PretrainData) -> Training:
    """The run at its start.

    Args:
        request: what is asked for; nothing is written.
        ranks: who trains.
        model: whole, on the CPU; it is spread over the ranks.
        data: opened.

    Raises:
        InputError: model, data and ranks do not fit together.
    """
    config = request.config
    micro_size = micro_batch_size(config.batch, data_ranks=ranks.data_size)
    flops = flops_per_token(model, sequence_length=config.batch.sequence_length)
    peak = peak_flops(ranks.device, config.metrics.device_tflops)
    model_config, size = config_values(model), num_parameters(model)
    model = spread(model, config.model, ranks)
    forward_dtype = compute_dtype(config.model, ranks.device)
    optimizers = build_optimizers(model, config.optimizer, forward_dtype=forward_dtype)
    diagnostics = None
    if config.metrics.diagnose_every:
        from normuon_lab.train.pretrain.diagnostics import MatrixDiagnostics

        # The first optimizer is the one of the hidden matrices.
        every = config.metrics.diagnose_every
        diagnostics = MatrixDiagnostics(model, optimizers[0], every=every)
    return Training(
        config=config,
        ranks=ranks,
        model=model,
        title=_title(config, data, size),
        optimizers=optimizers,
        batches=data.train_batches(
            global_batch_size=config.batch.batch_size,
            micro_batch_size=micro_size,
            rank=ranks.data_rank,
            world_size=ranks.data_size,
        ),
        validation=_validation(config, data, ranks, micro_size),
        writer=CheckpointWriter(request.out, config.checkpoint, ranks),
        model_config=model_config,
        flops_per_token=flops.total,
        peak_flops=None if peak is None else peak * ranks.world_size,
        diagnostics=diagnostics,
        step=0,
    )


def _validation(
    config: PretrainConfig, data: PretrainData, ranks: Ranks, batch_size: int
) -> Iterable[Tensor]:
    if config.evaluation.eval_every == 0:
        return ()
    return data.validation_batches(
        tokens=config.evaluation.eval_tokens,
        batch_size=batch_size,
        rank=ranks.data_rank,
        world_size=ranks.data_size,
    )


def _title(config: PretrainConfig, data: PretrainData, size: int) -> str:
    """Which model, and how large, on which data, and how much, in a line."""
    described = data.describe()
    source = ", ".join(described["source"])
    amount = (
        counted(described["train_tokens"], "token")
        if "train_tokens" in described
        else f"streamed from {counted(described['files'], 'file')}"
    )
    return f"{config.model.model} ({counted(size, 'parameter')}) on {source} ({amount})"


def _go_on_from_(point: ResumePoint, training: Training) -> None:
    description = point.description
    training.batches.load_state_dict(description.data_state)
    restore_(
        point.path,
        training.model,
        training.optimizers,
        training.ranks,
        world_size_then=description.world_size,
    )
    training.step = description.step


def _run(training: Training, request: TrainRequest, stop: StopRequest, console: Console) -> bool:
    """Train, and say how it ended; whether Ctrl-C ended it."""
    ranks, config, first_step = training.ranks, training.config, training.step
    display = RunDisplay(console, step=first_step, steps=config.batch.steps, enabled=ranks.is_main)
    metrics = (
        MetricsLog(
            request.out,
            step=first_step,
            trackers=config.metrics.trackers,
            config=config.to_values(),
        )
        if ranks.is_main
        else None
    )
    with metrics or nullcontext(), display, stop.interrupts_noted(ranks):
        display.say(f"training {training.title}, into {request.out}")
        if first_step:
            display.say(f"continuing from step {first_step}")
        is_done = Trainer(training, metrics=metrics, display=display).run(stop)
    kept = newest_complete(request.out)
    if is_done:
        display.say(f"done: {kept}")
    elif kept is None:
        display.say(f"stopped by {stop.by} before the first step")
    else:
        display.say(
            f"stopped by {stop.by} after step {training.step}, which is saved; continue with:"
        )
        display.say(_resume_command(request.out))
    return not is_done and stop.by == INTERRUPT


def _resume_command(out: Path) -> str:
    """What goes on with a stopped run on as many ranks; on several nodes without the rendezvous."""
    # torchrun tells its processes.
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    program = ["normuon"]
    if world_size > 1:
        num_nodes = world_size // ranks_per_node
        nodes = ["--nnodes", str(num_nodes)] if num_nodes > 1 else []
        program = ["torchrun", *nodes, "--nproc-per-node", str(ranks_per_node), "-m", "normuon_lab"]
    options = ["--config", str(out / CONFIG_FILE), "--out", str(out), "--resume", "auto"]
    return shlex.join([*program, "train", *options])


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
