"""The folder of a run and its checkpoints: layout, search, checks and resuming.

    RUN/checkpoints/step-00000120/     complete: a folder gets this name only when all is written
        checkpoint.json                step, configuration, data position, size and SHA-256 of files
        .metadata  __0_0.distcp ...    torch.distributed.checkpoint's: model, optimizer, trainer
    RUN/checkpoints/.step-00000240.partial/    being written, or torn: never taken for a checkpoint

Only tensors are in torch's files, all else is plain JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from normuon_lab.atomic_files import prove_folder, read_json, write_text
from normuon_lab.config_difference import first_difference
from normuon_lab.data.shards import sha256_of
from normuon_lab.errors import InputError, require
from normuon_lab.train.pretrain.config import PretrainConfig, trajectory

KIND = "normuon train"
SCHEMA_VERSION = 1
DESCRIPTION_FILE = "checkpoint.json"
CONFIG_FILE = "config.toml"
_NAME = re.compile(r"step-(\d{8,})")
_HASHING_THREADS = 8
_GO_ON = "give --resume auto to continue it, or another --out"
# What transformers adds to a configuration and does not change the model.
_NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path", "architectures", "dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDescription:
    """What `checkpoint.json` says.

    Attributes:
        step: optimizer steps that were finished.
        tokens: training tokens that were read.
        world_size: ranks that wrote it.
        config: the resolved configuration of the run, nested plain values.
        model_config: the transformers configuration of the model.
        data_state: position in the data, the same for any number of ranks.
        files: by file name, its size as `bytes` and its `sha256`.
    """

    step: int
    tokens: int
    world_size: int
    config: dict[str, Any]
    model_config: dict[str, Any]
    data_state: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What is written; the last field guards all others."""
        values = {"kind": KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}
        return {**values, "digest": _digest_of(values)}


def checkpoints_folder(run_dir: Path) -> Path:
    """Where a run's checkpoints are."""
    return run_dir / "checkpoints"


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps.

    Example:
        >>> checkpoint_name(120)
        'step-00000120'
    """
    return f"step-{step:08d}"


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = checkpoints_folder(run_dir)
    entries = list(folder.iterdir()) if folder.is_dir() else []
    found = [
        (int(match[1]), path)
        for path in entries
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def newest_complete(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; incomplete ones are ignored."""
    found = find_checkpoints(run_dir)
    return found[-1] if found else None


def resolve(path: Path) -> Path:
    """The checkpoint of a path: a checkpoint's folder, or the newest one of a run's folder.

    Raises:
        InputError: there is none.
    """
    require(path.exists(), f"{path}: no such folder")
    if (path / DESCRIPTION_FILE).is_file():
        return path
    newest = newest_complete(path)
    require(newest is not None, f"{path} is not a checkpoint and contains no complete one")
    assert newest is not None
    return newest


def read_description(path: Path) -> CheckpointDescription:
    """Read a checkpoint's `checkpoint.json`.

    Raises:
        InputError: it is absent, damaged, of another kind, or of another version.
    """
    file = path / DESCRIPTION_FILE
    require(path.is_dir(), f"{path}: no such checkpoint")
    require(file.is_file(), f"{path} is not a checkpoint of normuon train: no {DESCRIPTION_FILE}")
    values = read_json(file, kind=KIND, schema_version=SCHEMA_VERSION)
    digest = values.pop("digest", None)
    require(digest == _digest_of(values), f"{file} is damaged: its digest does not match")
    try:
        names = [field.name for field in fields(CheckpointDescription)]
        return CheckpointDescription(**{name: values[name] for name in names})
    except KeyError:
        raise InputError(f"{file} lacks required entries of a checkpoint") from None


def verify(path: Path) -> CheckpointDescription:
    """Check every byte of a checkpoint against its description.

    Raises:
        InputError: a file is missing, has another size or other bytes; names the file.
    """
    description = read_description(path)
    for name, entry in description.files.items():
        file, size = path / name, entry["bytes"]
        require(file.is_file(), f"{path} is damaged: {name} is missing")
        length = file.stat().st_size
        require(length == size, f"{path} is damaged: {name} has {length} bytes instead of {size}")
    found = describe_files([path / name for name in description.files])
    for name, entry in description.files.items():
        is_whole = found[name] == entry
        require(is_whole, f"{path} is damaged: the bytes of {name} have changed")
    return description


def describe_files(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 by file name; in parallel, since hashing leaves the interpreter free.

    Raises:
        InputError: a file cannot be read.
    """

    def described(path: Path) -> dict[str, Any]:
        try:
            return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return dict(zip((path.name for path in paths), pool.map(described, paths), strict=True))


def _digest_of(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def find_resume_point(
    run_dir: Path, resume: str, config: PretrainConfig, model_config: Mapping[str, Any]
) -> tuple[Path, CheckpointDescription] | None:
    """Where a run begins: from a checkpoint, checked to the byte, or None for the start.

    Changes nothing. `resume` is "never", "auto" for the newest complete checkpoint of `run_dir`, or
    a checkpoint.

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
    return path, description


def begin(run_dir: Path, config: PretrainConfig) -> None:
    """Make the folder and save the configuration in it, so that `--config` alone repeats the run.

    Raises:
        InputError: the folder cannot be written.
    """
    import tomli_w

    prove_folder(run_dir, f"--out {run_dir}")
    write_text(run_dir / CONFIG_FILE, tomli_w.dumps(config.to_values()))


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
        raise InputError("{} was made with {} = {}, not {}".format(path, *found))
    old, new = (
        {key: value for key, value in values.items() if key not in _NOT_OF_THE_MODEL}
        for values in (description.model_config, model_config)
    )
    found = first_difference(old, new)
    if found is not None:
        raise InputError("{} belongs to another model: its {} is {}, not {}".format(path, *found))
