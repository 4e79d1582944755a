"""What a data source names, and one clear line for each way it can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from normuon_lab.data.config import DataConfig
from normuon_lab.data.loading import open_data
from normuon_lab.data.sources import (
    PreparedFolder,
    ShardFiles,
    Stream,
    TextFiles,
    resolve_source,
    resolve_validation,
)
from normuon_lab.errors import InputError
from tests.lab.data.conftest import write_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "c.jsonl", "d.parquet"):
        (tmp_path / name).write_text("{}")
    for name in ("shards/y.bin", "shards/x.bin", "prepared/manifest.json", "begun/progress.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "empty").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    return tmp_path


def test_kinds_of_sources(folder: Path) -> None:
    shards = (folder / "shards" / "x.bin", folder / "shards" / "y.bin")
    expected: dict[tuple[str, ...], Any] = {
        ("*.txt",): TextFiles((folder / "a.txt", folder / "b.txt")),
        ("b.txt", "a.txt"): TextFiles((folder / "b.txt", folder / "a.txt")),
        ("c.jsonl", "a.txt"): TextFiles((folder / "c.jsonl", folder / "a.txt")),
        ("shards/*.bin",): ShardFiles(shards),
        ("shards",): ShardFiles(shards),
        ("prepared",): PreparedFolder(folder / "prepared"),
    }
    for words, source in expected.items():
        assert resolve_source([str(folder / word) for word in words]) == source
    assert resolve_source(["hub:a/b"]) == Stream("a/b", None, ())
    assert resolve_source([f"stream:{folder}/*.jsonl"]) == Stream(
        "json", None, (folder / "c.jsonl",)
    )
    stdlib = resolve_source(["stdlib"])
    assert isinstance(stdlib, TextFiles)
    assert len(stdlib.paths) > 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.txt"], "no such file of data: .*nowhere.txt"),
        (["*.csv"], r"no such file of data: .*\*\.csv"),
        (["a.txt", "a.txt"], "names the same file twice"),
        (["a.txt", "shards/x.bin"], "mixes .bin shards with text; prepare the text too"),
        (["a.txt", "shards"], "is a folder among several sources"),
        (["/dev/zero"], "/dev/zero is a device or a pipe; give a file"),
        (["empty"], "holds neither a manifest.json nor .bin shards; name its files instead"),
        (["begun"], "is incomplete; run the same normuon data prepare again"),
        (["saved"], "was saved by datasets.save_to_disk; write it with to_parquet"),
    ],
)
def test_a_wrong_source_is_one_line(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve_source([str(folder / word) for word in words])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hub:a/b", "c.txt"], "a stream must be the only source"),
        (["hub:"], "write hub:NAME or hub:NAME:CONFIG"),
        (["stream:{folder}/*.txt"], "a stream reads jsonl or parquet files, all of one kind"),
        (["stream:{folder}/[cd].*"], "a stream reads jsonl or parquet files, all of one kind"),
    ],
)
def test_a_wrong_stream_is_one_line(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_source([word.format(folder=folder) for word in words])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ()}, "the data source is empty"),
        ({"validation_fraction": 0.0}, "validation-fraction 0.0: give a number between 0 and 1"),
        ({"validation_fraction": 1.5}, "validation-fraction 1.5"),
        ({"workers": -1}, "workers -1: give at least 0"),
        ({"prefetch": 0}, "prefetch 0: give at least 1"),
        ({"vocab_size": 0}, "vocab-size 0: give at least 1"),
        ({"stream_lanes": 0}, "stream-lanes 0: give at least 1"),
    ],
)
def test_a_wrong_configuration_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataConfig(**options)


def test_shards_from_elsewhere_need_a_vocabulary(tmp_path: Path, tokenizer_file: Path) -> None:
    path = write_shard(tmp_path / "a.bin", range(100))
    with pytest.raises(InputError, match=r"give vocab_size \(50257 for GPT-2's\)"):
        open_data(DataConfig(source=(str(path),)), sequence_length=8, seed=0)
    named = DataConfig(source=(str(path),), tokenizer=str(tokenizer_file))
    assert open_data(named, sequence_length=8, seed=0).vocab_size == 300


def test_text_and_shards_are_not_mixed_for_validation(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.bin", range(100))
    text = tmp_path / "a.txt"
    text.write_text("text " * 100)
    config = DataConfig(
        source=(str(shard),), validation=(str(text),), vocab_size=256, cache=str(tmp_path / "c")
    )
    with pytest.raises(InputError, match=r"training data is \.bin shards, but the validation data"):
        open_data(config, sequence_length=8, seed=0)
    config = DataConfig(source=(str(text),), validation=(str(shard),), cache=str(tmp_path / "c"))
    with pytest.raises(InputError, match=r"validation data is \.bin shards, but the training data"):
        open_data(config, sequence_length=8, seed=0)


@pytest.mark.parametrize(
    ("source", "validation", "shared"),
    [
        (["a.txt", "b.txt"], ["sub/../b.txt"], "b.txt"),
        (["shards/x.bin"], ["shards/x.bin"], "x.bin"),
        (["stream:a.jsonl"], ["a.jsonl"], "a.jsonl"),
        (["hub:someone/text:small"], ["hub:someone/text:small"], "hub:someone/text:small"),
    ],
)
def test_validation_data_is_no_training_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: list[str],
    validation: list[str],
    shared: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("sub", "shards"):
        (tmp_path / folder).mkdir()
    for name in ("a.txt", "b.txt", "c.txt", "a.jsonl", "shards/x.bin"):
        (tmp_path / name).write_text(name)
    with pytest.raises(InputError, match=f"{shared} is named as training data and as validation"):
        resolve_validation(validation, resolve_source(source))
    assert resolve_validation(["c.txt"], resolve_source(source)) == TextFiles((Path("c.txt"),))


def test_a_prepared_folder_holds_out_a_part_of_its_own(folder: Path) -> None:
    prepared = resolve_source([str(folder / "prepared")])
    assert resolve_validation([str(folder / "prepared")], prepared) == prepared
