"""Writes checkpoints so that an incomplete one is never used, and keeps as many as asked.

All ranks write their tensors into a hidden folder; rank 0 adds the description, which names every
file with its digest, makes all of it durable, and renames the folder.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from normuon_lab.atomic_files import write_json
from normuon_lab.errors import InputError
from normuon_lab.train.pretrain.checkpoint import (
    DESCRIPTION_FILE,
    CheckpointDescription,
    checkpoint_name,
    checkpoints_folder,
    describe_files,
    find_checkpoints,
)
from normuon_lab.train.pretrain.config import CheckpointConfig
from normuon_lab.train.ranks import Ranks


class _Storage(dcp.FileSystemWriter):
    """torch's file writer: one file per rank, flushed to the disk, and `publish` at the end."""

    def __init__(self, path: Path, publish: Callable[[], None]) -> None:
        super().__init__(path, single_file_per_rank=True, sync_files=True)
        self._publish = publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Errors keep their cause when sent to other ranks."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # torch's serialiser reports the damage that the refusal did to its file.
            refusals = [cause for cause in _causes(error) if isinstance(cause, OSError)]
            raise (refusals[0] if refusals else error) from None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0 alone, when all ranks' tensors are on the disk."""
        super().finish(metadata, results)
        self._publish()


class CheckpointWriter:
    """The writer of one run's checkpoints; every rank makes one and calls it at the same steps."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, ranks: Ranks) -> None:
        self._folder = checkpoints_folder(run_dir)
        self._run_dir, self._config, self._ranks = run_dir, config, ranks
        self._pending: Future[Any] | None = None
        self._step = 0
        # Writing beside training must not mix its collectives with training's.
        has_own_group = config.async_checkpoint and ranks.mesh is not None
        self._group = dist.new_group(backend="gloo") if has_own_group else None

    def save(self, tensors: dict[str, Any], description: CheckpointDescription) -> None:
        """Write a checkpoint, or with `async_checkpoint` start writing it.

        Args:
            tensors: nested dictionaries of tensors; free to change when this returns.
            description: the rest; this method fills in its files.

        Raises:
            RunsFailedError: it, or the one before, could not be written; on all ranks. Earlier
                checkpoints are untouched.
        """
        self.wait()
        self._step = description.step
        self._together(self._make_room)
        storage = _Storage(self._partial, lambda: self._publish(description))
        alone = self._ranks.mesh is None
        if not self._config.async_checkpoint:
            self._together(lambda: dcp.save(tensors, storage_writer=storage, no_dist=alone))
            return
        pending: Any = dcp.async_save(
            tensors, storage_writer=storage, process_group=self._group, no_dist=alone
        )
        self._pending = pending

    def wait(self) -> None:
        """Wait until all writing is done.

        Raises:
            RunsFailedError: writing failed; on all ranks.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._together(pending.result)

    def close(self) -> None:
        """Wait for the writing and ignore its errors, for a run that has already failed."""
        if self._pending is not None:
            wait([self._pending])

    @property
    def _partial(self) -> Path:
        return self._folder / f".{checkpoint_name(self._step)}.partial"

    def _together(self, function: Callable[[], object]) -> None:
        """Call `function` on every rank; an error on one is raised, as one line, on all."""
        failure: Exception | None = None
        try:
            function()
        except (CheckpointException, InputError, OSError, RuntimeError) as error:
            failure = OSError(
                f"the checkpoint of step {self._step} cannot be written to {self._folder}: "
                f"{_reason(error)}; earlier checkpoints are intact"
            )
            if self._ranks.is_main:
                shutil.rmtree(self._partial, ignore_errors=True)
        self._ranks.raise_together(failure)

    def _make_room(self) -> None:
        if self._ranks.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".step-*"):
                shutil.rmtree(leftover)
            self._partial.mkdir()

    def _publish(self, description: CheckpointDescription) -> None:
        """Write the description, flush everything, rename the folder and forget old ones."""
        partial = self._partial
        files = describe_files(sorted(partial.iterdir()))
        description = dataclasses.replace(description, files=files)
        write_json(partial / DESCRIPTION_FILE, description.to_json())
        for path in (partial / DESCRIPTION_FILE, partial):
            _flush(path)
        partial.replace(self._folder / checkpoint_name(description.step))
        _flush(self._folder)
        for path in superseded(find_checkpoints(self._run_dir), self._config):
            # Renamed first: a folder that is half deleted must not look whole.
            leaving = path.with_name(f".{path.name}.deleting")
            path.replace(leaving)
            shutil.rmtree(leaving)


def superseded(checkpoints: list[Path], config: CheckpointConfig) -> list[Path]:
    """Which checkpoints, oldest first, are neither among the newest nor of a step to keep.

    Example:
        >>> paths = [Path(checkpoint_name(step)) for step in (10, 20, 30, 40)]
        >>> superseded(paths, CheckpointConfig(keep_last=1, keep_every=20))
        [PosixPath('step-00000010'), PosixPath('step-00000030')]
    """
    if config.keep_last == 0:
        return []

    def is_kept_for_good(path: Path) -> bool:
        step = int(path.name.removeprefix("step-"))
        return config.keep_every > 0 and step % config.keep_every == 0

    return [path for path in checkpoints[: -config.keep_last] if not is_kept_for_good(path)]


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The operating system's message for an OSError, else the first line of the error."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    words = " ".join(str(chain[-1]).split())
    return words[:200] or type(error).__name__


def _causes(error: BaseException) -> Iterable[BaseException]:
    """An error and its causes, on any rank."""
    waiting = [error]
    while waiting:
        current = waiting.pop(0)
        yield current
        if isinstance(current, CheckpointException):
            waiting += [failure for failure, _ in current.failures.values()]
        waiting += [cause for cause in (current.__cause__, current.__context__) if cause]
