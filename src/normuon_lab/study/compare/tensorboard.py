"""A finished run as TensorBoard scalars, one folder per run."""

from __future__ import annotations

import shutil
from pathlib import Path

from normuon_lab.train.runs.records import RunRecord


def write_scalars(folder: Path, record: RunRecord) -> None:
    """Write the run's losses below `folder`, in place of what an earlier attempt left there."""
    from torch.utils.tensorboard import SummaryWriter

    run_folder = folder / f"{record.arm}-seed{record.seed}"
    shutil.rmtree(run_folder, ignore_errors=True)
    with SummaryWriter(log_dir=str(run_folder)) as writer:
        for step, loss in enumerate(record.train_losses, start=1):
            writer.add_scalar("loss/train", loss, step)
        for step, loss, seconds in zip(
            record.eval_steps, record.eval_losses, record.eval_seconds, strict=True
        ):
            writer.add_scalar("loss/validation", loss, step)
            writer.add_scalar("seconds/training", seconds, step)
