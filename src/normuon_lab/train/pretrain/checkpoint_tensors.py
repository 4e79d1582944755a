"""A checkpoint's weights, optimizer state and random states, read without running code.

torch's own reader unpickles anything in `.metadata`. Here only the classes that describe tensors
are allowed, other entries are refused, and data is read from the folder's own files; torch reads
the tensors with `weights_only=True`.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from normuon_lab.errors import InputError, first_line, require
from normuon_lab.train.model import build_model
from normuon_lab.train.pretrain.checkpoint import CheckpointDescription
from normuon_lab.train.ranks import Ranks

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
        if module == "pathlib._local":  # What Python 3.13, and no other, calls it.
            module = "pathlib"
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class TensorReader(dcp.FileSystemReader):
    """A storage reader for `torch.distributed.checkpoint.load` that does not trust its files."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The folder's `.metadata`.

        Raises:
            InputError: it has more than the description of tensors.
        """
        folder = Path(self.path)
        try:
            with (folder / ".metadata").open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except OSError as error:
            raise InputError(f"{folder}: cannot read its .metadata: {error.strerror}") from None
        except Exception as error:  # A damaged pickle raises almost anything.
            raise InputError(
                f"{folder}: its .metadata does not describe tensors: {first_line(error)}"
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
        require(name in found, f"{path} belongs to another model or optimizer: it has no {name}")
        require(
            found[name] == tuple(tensor.shape),
            f"{path} belongs to another model: {name} is {list(found[name])} there and "
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
            assert isinstance(value, Tensor), f"{prefix}{key} is not a tensor"
            found[f"{prefix}{key}"] = value
    return found


def tensors_to_save(
    model: nn.Module, optimizers: Sequence[Optimizer], ranks: Ranks
) -> dict[str, Any]:
    """Nested tensors under `model`, `optimizer` and `trainer`: the live ones, not copies."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, list(optimizers))["state"],
        "trainer": {"rng": {str(ranks.rank): _random_state(ranks.device)}},
    }


def restore_(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    ranks: Ranks,
    *,
    world_size_then: int,
) -> None:
    """Load weights, optimizer state and RNG from a checkpoint, written by any number of ranks.

    Random states belong to ranks: with another number of ranks they are not restored.

    Raises:
        InputError: the checkpoint is of another model or optimizer; nothing is changed then.
    """
    # Zero where no step has made it.
    optimizer_state = dict(get_optimizer_state_dict(model, list(optimizers)))
    random_state = _random_state(ranks.device)
    tensors: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": optimizer_state["state"],
    }
    if world_size_then == ranks.world_size:
        tensors["trainer"] = {"rng": {str(ranks.rank): random_state}}
    load_tensors_(tensors, path)
    # The tensors are in place already; optimizers may keep what they derive from them.
    set_optimizer_state_dict(model, optimizers, optimizer_state)
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state:
        torch.cuda.set_rng_state(random_state["cuda"], ranks.device)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def model_of(description: CheckpointDescription, *, device: str = "cpu") -> nn.Module:
    """A float32 model of the checkpoint's shapes, with arbitrary weights.

    Raises:
        InputError: this version of transformers cannot build it.
    """
    from transformers import AutoConfig

    values = dict(description.model_config)
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        return build_model(config, device=device)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"this version of transformers cannot build the checkpoint's model: {first_line(error)}"
        ) from error


def load_model_only(path: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model, whole or sharded, in place.

    Raises:
        InputError: the weights are of another model; nothing is changed then.
    """
    load_tensors_({"model": get_model_state_dict(model)}, path)
