"""What a checkpoint of `normuon train` looks like on disk, how it is found, checked and read.

    RUN/checkpoints/step-00000120/     complete: a folder gets this name only when all is written
        checkpoint.json                step, configuration, data position, size and SHA-256 of files
        .metadata  __0_0.distcp ...    torch.distributed.checkpoint's: model, optimizer, trainer
    RUN/checkpoints/.step-00000240.partial/    being written, or torn: never taken for a checkpoint

Only tensors are in torch's files, all else is plain JSON; `checkpoint_writer.py` writes both.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normuon_lab.atomic_files import read_json
from normuon_lab.errors import InputError, require

if TYPE_CHECKING:
    from torch import nn

KIND = "normuon train"
SCHEMA_VERSION = 1
DESCRIPTION_FILE = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")
_HASHING_THREADS = 8


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
        files: by file name, its size in bytes and its SHA-256.
    """

    step: int
    tokens: int
    world_size: int
    config: dict[str, Any]
    model_config: dict[str, Any]
    data_state: dict[str, Any]
    files: dict[str, tuple[int, str]]

    def to_json(self) -> dict[str, Any]:
        """What is written; the last field guards all others."""
        values: dict[str, Any] = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "step": self.step,
            "tokens": self.tokens,
            "world_size": self.world_size,
            "config": self.config,
            "model_config": self.model_config,
            "data_state": self.data_state,
            "files": {
                name: {"bytes": size, "sha256": digest}
                for name, (size, digest) in self.files.items()
            },
        }
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
    """The newest complete checkpoint of a run, or None; torn and half deleted ones are not seen."""
    found = find_checkpoints(run_dir)
    return found[-1] if found else None


def resolve(path: Path) -> Path:
    """The checkpoint that a user means: a checkpoint's folder, or the newest of a run's.

    Raises:
        InputError: there is none.
    """
    require(path.exists(), f"{path}: no such folder")
    if (path / DESCRIPTION_FILE).is_file():
        return path
    newest = newest_complete(path)
    require(newest is not None, f"{path} is not a checkpoint and holds no complete one")
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
        return CheckpointDescription(
            step=values["step"],
            tokens=values["tokens"],
            world_size=values["world_size"],
            config=values["config"],
            model_config=values["model_config"],
            data_state=values["data_state"],
            files={
                name: (entry["bytes"], entry["sha256"]) for name, entry in values["files"].items()
            },
        )
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{file} does not say what a checkpoint has to say") from None


def verify(path: Path) -> CheckpointDescription:
    """Check every byte of a checkpoint against its description.

    Raises:
        InputError: a file is missing, has another size or other bytes; names the file.
    """
    description = read_description(path)
    for name, (size, _) in description.files.items():
        file = path / name
        require(file.is_file(), f"{path} is damaged: {name} is missing")
        found = file.stat().st_size
        require(found == size, f"{path} is damaged: {name} has {found} bytes instead of {size}")
    digests = hash_files([path / name for name in description.files])
    for name, (_, digest) in description.files.items():
        require(digests[name] == digest, f"{path} is damaged: the bytes of {name} have changed")
    return description


def load_model_only(path: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model, whole or sharded, in place.

    Args:
        path: the checkpoint's folder; see `resolve` for a run's.
        model: of the same shapes.

    Raises:
        InputError: the weights are of another model; nothing is changed then.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    from normuon_lab.train.pretrain.tensor_reader import load_tensors_

    load_tensors_({"model": get_model_state_dict(model)}, path)


def hash_files(paths: list[Path]) -> dict[str, str]:
    """SHA-256 by file name; files in parallel, since hashing leaves the interpreter free.

    Raises:
        InputError: a file cannot be read.
    """
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return dict(zip((path.name for path in paths), pool.map(_sha256, paths), strict=True))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _digest_of(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
