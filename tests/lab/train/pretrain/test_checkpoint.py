"""Checkpoints on disk: what is found, what is refused, and that nothing in them is believed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from normuon_lab.errors import InputError
from normuon_lab.train.model import build_named_model
from normuon_lab.train.pretrain.checkpoint import (
    find_checkpoints,
    newest_complete,
    read_description,
    resolve,
    verify,
)
from normuon_lab.train.pretrain.checkpoint_tensors import (
    TensorReader,
    load_model_only,
    load_tensors_,
    read_shapes,
)


@pytest.fixture
def checkpoint(llama_run: Path, tmp_path: Path) -> Path:
    """A checkpoint of two ranks, to be damaged."""
    newest = newest_complete(llama_run)
    assert newest is not None
    return Path(shutil.copytree(newest, tmp_path / newest.name))


def test_a_checkpoint_describes_itself(checkpoint: Path) -> None:
    description = verify(checkpoint)
    assert description.step == 4
    assert description.tokens == 4 * 4 * 32
    assert description.world_size == 2
    assert description.config["batch"]["steps"] == 4
    assert description.model_config["hidden_size"] == 64
    assert set(description.files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    shapes = read_shapes(checkpoint)
    assert shapes["model.model.layers.0.self_attn.q_proj.weight"] == (64, 64)
    name = "optimizer.model.layers.0.self_attn.q_proj.weight.second_momentum_buffer"
    assert torch.Size(shapes[name]).numel() == 64
    assert {"trainer.rng.0.cpu", "trainer.rng.1.cpu"} <= shapes.keys()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp", "checkpoint.json"])
def test_a_flipped_byte_anywhere_is_found(checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged|not valid JSON|schema version|not written by"):
        verify(checkpoint)


def test_missing_and_shortened_files_are_named(checkpoint: Path) -> None:
    file = checkpoint / "__1_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    message = f"is damaged: __1_0.distcp has {len(whole) - 1} bytes instead of {len(whole)}"
    with pytest.raises(InputError, match=message):
        verify(checkpoint)
    file.unlink()
    with pytest.raises(InputError, match=r"is damaged: __1_0.distcp is missing"):
        verify(checkpoint)


def test_other_folders_are_not_taken_for_checkpoints(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({"weight": torch.ones(3)}, checkpoint_id=foreign, no_dist=True)
    with pytest.raises(InputError, match=r"not a checkpoint of normuon train: no checkpoint.json"):
        verify(foreign)
    (foreign / "checkpoint.json").write_text('{"kind": "other"}')
    with pytest.raises(InputError, match="was not written by"):
        verify(foreign)
    with pytest.raises(InputError, match="no such checkpoint"):
        read_description(tmp_path / "nowhere")
    with pytest.raises(InputError, match="contains no complete one"):
        resolve(tmp_path)


def test_torn_and_leaving_checkpoints_are_not_seen(tmp_path: Path, checkpoint: Path) -> None:
    run = tmp_path / "run"
    folder = run / "checkpoints"
    for name in ("step-00000004", "step-00000020", ".step-00000030.partial"):
        shutil.copytree(checkpoint, folder / name)
    (folder / ".step-00000040.deleting").mkdir()
    (folder / "step-00000050").write_text("no folder")
    assert [path.name for path in find_checkpoints(run)] == ["step-00000004", "step-00000020"]
    assert resolve(run) == newest_complete(run) == folder / "step-00000020"
    assert find_checkpoints(tmp_path / "nowhere") == []


class _Malicious:
    """What a pickle may ask for: a call of anything."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (os.environ["NORMUON_TEST_FOLDER"],))


def test_code_in_metadata_is_not_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made-by-the-checkpoint"
    monkeypatch.setenv("NORMUON_TEST_FOLDER", str(made))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Malicious()))
    with pytest.raises(InputError, match=r"does not describe tensors: it asks for posix.mkdir"):
        read_shapes(checkpoint)
    assert not made.exists()
    # torch's own reader does what it is told: this is what is guarded against.
    with pytest.raises(AttributeError):
        dcp.FileSystemReader(checkpoint).read_metadata()
    assert made.exists()


def _rewrite_metadata(checkpoint: Path, change: object) -> None:
    metadata = TensorReader(checkpoint).read_metadata()
    change(metadata)  # type: ignore[operator]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_any_python_reads_the_checkpoint_of_any_other(checkpoint: Path, module: str) -> None:
    """The folder's path is in `.metadata`, of a class that Python 3.13 keeps in another module."""
    shapes, metadata = read_shapes(checkpoint), TensorReader(checkpoint).read_metadata()
    # Protocol 2 names classes in plain text.
    content = pickle.dumps(metadata, protocol=2).replace(b"cpathlib._local\n", b"cpathlib\n")
    assert content.count(b"cpathlib\n") == 1
    content = content.replace(b"cpathlib\n", f"c{module}\n".encode())
    (checkpoint / ".metadata").write_bytes(content)
    assert read_shapes(checkpoint) == shapes


def test_entries_that_would_be_unpickled_are_refused(checkpoint: Path) -> None:
    def add_bytes(metadata):
        metadata.state_dict_metadata["trainer.extra"] = BytesStorageMetadata()

    _rewrite_metadata(checkpoint, add_bytes)
    with pytest.raises(InputError, match=r"it asks for .*BytesStorageMetadata"):
        read_shapes(checkpoint)


def test_data_outside_of_the_folder_is_not_read(checkpoint: Path) -> None:
    def point_outside(metadata):
        index = next(iter(metadata.storage_data))
        assert isinstance(index, MetadataIndex)
        metadata.storage_data[index].relative_path = "../secret"

    _rewrite_metadata(checkpoint, point_outside)
    with pytest.raises(InputError, match="points outside of it"):
        read_shapes(checkpoint)


def test_weights_load_into_a_whole_model_and_into_no_other(checkpoint: Path) -> None:
    model = build_named_model("llama-tiny", seed=5)
    before = [parameter.clone() for parameter in model.parameters()]
    load_model_only(checkpoint, model)
    after = list(model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True) if a.ndim > 1)

    with pytest.raises(InputError, match=r"another model or optimizer: it has no model.weight"):
        load_tensors_({"model": {"weight": torch.zeros(2)}}, checkpoint)
    name = "model.norm.weight"
    with pytest.raises(InputError, match=r"norm.weight is \[64\] there and \[65\] here"):
        load_tensors_({"model": {name: torch.zeros(65)}}, checkpoint)


def test_the_digest_covers_the_description(checkpoint: Path) -> None:
    file = checkpoint / "checkpoint.json"
    values = json.loads(file.read_text())
    values["step"] = 5
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"checkpoint.json is damaged: its digest does not match"):
        read_description(checkpoint)
