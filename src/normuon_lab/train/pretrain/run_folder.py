"""The folder of a run: what is there already, whether to go on with it, and from where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normuon_lab.config_difference import first_difference
from normuon_lab.errors import InputError, require
from normuon_lab.train.pretrain.checkpoint import (
    CheckpointDescription,
    newest_complete,
    read_description,
    verify,
)
from normuon_lab.train.pretrain.config import PretrainConfig, trajectory
from normuon_lab.train.pretrain.config_file import write_config

CONFIG_FILE = "config.toml"
_GO_ON = "give --resume auto to go on with it, or another --out"

# What transformers adds to a configuration and does not change the model.
_NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path", "architectures", "dtype")


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A checkpoint to go on from, every byte of it checked.

    Attributes:
        path: its folder.
        description: what it says of itself.
    """

    path: Path
    description: CheckpointDescription


def find_resume_point(
    run_dir: Path, resume: str, config: PretrainConfig, model_config: Mapping[str, Any]
) -> ResumePoint | None:
    """Where a run begins: from a checkpoint, or None for the start. Changes nothing.

    Args:
        run_dir: the run's folder.
        resume: "never", "auto" for the newest complete checkpoint of `run_dir`, or a checkpoint.
        config: of the run.
        model_config: transformers' configuration of the model.

    Raises:
        InputError: `run_dir` holds another run, or something else; the checkpoint is damaged or of
            another run.
    """
    _check_folder(run_dir, resume)
    newest = newest_complete(run_dir)
    path = newest if resume in ("auto", "never") else Path(resume)
    if path is None:
        return None
    description = read_description(path)
    _check_config(path, description, config, model_config)
    verify(path)
    if newest is not None and read_description(newest).step > description.step:
        raise InputError(
            f"{run_dir} holds {newest.name}, which is newer than {path}: give --resume auto, move "
            "the newer ones away, or give another --out"
        )
    return ResumePoint(path, description)


def begin(run_dir: Path, config: PretrainConfig) -> None:
    """Make the folder and save the resolved configuration in it.

    Raises:
        InputError: the disk does not let us.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(run_dir / CONFIG_FILE, config)
    except OSError as error:
        raise InputError(f"cannot write to --out {run_dir}: {error.strerror}") from None


def _check_folder(run_dir: Path, resume: str) -> None:
    require(not run_dir.exists() or run_dir.is_dir(), f"--out {run_dir} is a file; give a folder")
    entries = list(run_dir.iterdir()) if run_dir.is_dir() else []
    is_run = (run_dir / CONFIG_FILE).is_file()
    require(not entries or is_run, f"--out {run_dir} holds other files; give a new folder")
    require(not is_run or resume != "never", f"--out {run_dir} holds a run already: {_GO_ON}")
    if resume not in ("never", "auto"):
        require(Path(resume).is_dir(), f"--resume {resume}: give never, auto or a checkpoint")


def _check_config(
    path: Path,
    description: CheckpointDescription,
    config: PretrainConfig,
    model_config: Mapping[str, Any],
) -> None:
    found = first_difference(trajectory(description.config), trajectory(config.to_values()))
    if found is not None:
        name, before, now = found
        raise InputError(f"{path} was made with {name} = {before}, not {now}")
    found = first_difference(model_identity(description.model_config), model_identity(model_config))
    if found is not None:
        name, before, now = found
        raise InputError(f"{path} is of another model: its {name} is {before}, not {now}")


def model_identity(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a transformers configuration, what makes the model."""
    return {key: value for key, value in model_config.items() if key not in _NOT_OF_THE_MODEL}
