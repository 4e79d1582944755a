"""Reads tensors from a torch.distributed.checkpoint folder without running what a file says.

torch's own reader unpickles `.metadata` freely. Here only the classes that describe tensors are
admitted, entries that are not tensors are refused, and data is read from the folder's own files;
the tensors themselves are read by torch with `weights_only=True`.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from normuon_lab.errors import InputError, require

_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes that describe tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class TensorReader(dcp.FileSystemReader):
    """A storage reader for `torch.distributed.checkpoint.load` that trusts nothing it reads.

    Args:
        path: the folder.

    Raises:
        InputError: `read_metadata` found something else than the description of tensors.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The folder's `.metadata`."""
        folder = Path(self.path)
        try:
            with (folder / ".metadata").open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except OSError as error:
            raise InputError(f"{folder}: cannot read its .metadata: {error.strerror}") from None
        except Exception as error:  # A damaged pickle raises almost anything.
            raise InputError(
                f"{folder}: its .metadata does not describe tensors: {_one_line(error)}"
            ) from None
        require(isinstance(metadata, Metadata), f"{folder}: its .metadata is of another kind")
        for name, entry in metadata.state_dict_metadata.items():
            is_tensor = isinstance(entry, TensorStorageMetadata)
            require(is_tensor, f"{folder}: {name} is not a tensor; such entries are not loaded")
        for place in metadata.storage_data.values():
            inside = place.relative_path == Path(place.relative_path).name
            require(inside, f"{folder}: its .metadata points outside of it")
        return metadata


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in a folder.

    Raises:
        InputError: as `TensorReader`.
    """
    entries = TensorReader(path).read_metadata().state_dict_metadata
    return {
        name: tuple(entry.size)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load_tensors_(values: Mapping[str, Any], path: Path) -> None:
    """Fill the tensors of a nested dictionary from a folder, in place, shards from any layout.

    Args:
        values: nested dictionaries of tensors or DTensors; names are their keys joined by dots.
        path: the folder. It may hold more.

    Raises:
        InputError: a tensor is missing or has another shape; nothing is changed then.
    """
    wanted = flattened(values)
    found = read_shapes(path)
    for name, tensor in wanted.items():
        require(name in found, f"{path} is of another model or optimizer: it has no {name}")
        require(
            found[name] == tuple(tensor.shape),
            f"{path} is of another model: {name} is {list(found[name])} there and "
            f"{list(tensor.shape)} here",
        )
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(dict(wanted), storage_reader=TensorReader(path), no_dist=alone)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """A nested dictionary as one level, keys joined by dots.

    Example:
        >>> flattened({"model": {"weight": torch.zeros(1)}})
        {'model.weight': tensor([0.])}
    """
    found: dict[str, Tensor] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.update(flattened(value, f"{prefix}{key}."))
        else:
            assert isinstance(value, Tensor), f"{prefix}{key} is no tensor"
            found[f"{prefix}{key}"] = value
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
