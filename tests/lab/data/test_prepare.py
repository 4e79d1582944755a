"""Preparing: the same bytes however it is done, whole shards only, and a manifest that is true."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer

from normuon_lab.data import encoding, shards
from normuon_lab.data import prepare as prepare_module
from normuon_lab.data.config import DataConfig
from normuon_lab.data.documents import is_held_out
from normuon_lab.data.loading import open_data
from normuon_lab.data.prepare import PrepareRequest, prepare
from normuon_lab.data.shards import TokenShards
from normuon_lab.errors import InputError
from tests.lab.conftest import run_command

SEPARATOR = "<|endoftext|>"


@pytest.fixture
def jsonl(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "documents.jsonl"
    datasets.Dataset.from_dict({"text": documents}).to_json(path, force_ascii=False)
    return path


@pytest.fixture
def request_of(jsonl: Path, tokenizer_file: Path, tmp_path: Path) -> PrepareRequest:
    config = DataConfig(
        source=(str(jsonl),), tokenizer=str(tokenizer_file), validation_fraction=0.1, processes=1
    )
    return PrepareRequest(config=config, out=tmp_path / "out", shard_tokens=1000)


def tokens_of(out: Path, part: str) -> list[int]:
    manifest = json.loads((out / "manifest.json").read_text())
    shards = TokenShards([out / shard["file"] for shard in manifest["parts"][part]["shards"]])
    return shards[0 : len(shards)].tolist()


def content_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def test_shards_hold_the_documents(
    request_of: PrepareRequest, documents: list[str], tokenizer_file: Path
) -> None:
    manifest = prepare(request_of)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    separator = tokenizer.token_to_id(SEPARATOR)
    for part, held_out in [("train", False), ("validation", True)]:
        kept = [t for t in documents if is_held_out(t, fraction=0.1, seed=0) == held_out]
        assert 15 < len(kept) < 285
        expected = [[separator, *tokenizer.encode(text).ids] for text in kept]
        assert tokens_of(request_of.out, part) == list(chain.from_iterable(expected))
    assert manifest["documents"] == 300
    assert [shard["tokens"] for shard in manifest["parts"]["train"]["shards"]][:-1] == [1000] * (
        len(manifest["parts"]["train"]["shards"]) - 1
    )


def test_the_manifest_is_true(request_of: PrepareRequest) -> None:
    manifest = prepare(request_of)
    assert manifest == json.loads((request_of.out / "manifest.json").read_text())
    listed = {"manifest.json", "tokenizer.json"}
    for part in manifest["parts"].values():
        assert part["tokens"] == sum(shard["tokens"] for shard in part["shards"])
        for shard in part["shards"]:
            content = (request_of.out / shard["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
            assert len(content) == 1024 + 2 * shard["tokens"]
            listed.add(shard["file"])
    assert set(content_of(request_of.out)) == listed
    assert manifest["tokenizer"]["vocab_size"] == 300


def test_processes_change_nothing(
    request_of: PrepareRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches small enough that both processes get many.
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 2000)
    prepare(request_of)
    config = replace(request_of.config, processes=2)
    prepare(replace(request_of, config=config, out=tmp_path / "two"))
    assert content_of(tmp_path / "two") == content_of(request_of.out)


class StoppedError(Exception):
    """Stands for the end of the process."""


@contextmanager
def stopping_after(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends the preparation at the given write, wherever that falls."""
    calls = iter(range(10**6))
    append = shards.ShardWriter.append

    def stop_or_append(writer: Any, tokens: Any) -> None:
        if next(calls) == call:
            # Half of it reaches the disk, as when the machine goes down.
            append(writer, tokens[: len(tokens) // 2])
            raise StoppedError
        append(writer, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "append", stop_or_append)
        with pytest.raises(StoppedError):
            yield


@pytest.mark.parametrize("save_every", [1, 700, 10**9])
def test_what_was_stopped_goes_on_to_the_same_bytes(
    request_of: PrepareRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_every: int,
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 1500)
    monkeypatch.setattr(prepare_module, "_TOKENS_BETWEEN_SAVES", save_every)
    prepare(request_of)
    stopped = replace(request_of, out=tmp_path / "stopped")
    for call in (1, 10, 11, 25, 5):
        with stopping_after(call, monkeypatch):
            prepare(stopped)
        assert not (stopped.out / "manifest.json").exists()
        with pytest.raises(InputError, match="is incomplete"):
            open_data(DataConfig(source=(str(stopped.out),)), sequence_length=8, seed=0)
    prepare(stopped)
    assert content_of(stopped.out) == content_of(request_of.out)


def test_long_documents_are_cut_into_pieces_at_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "MAX_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 150)
    lines = [f"line {i} " + "x" * (i % 40) for i in range(100)]
    (tmp_path / "long.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in ["\n".join(lines), "y" * 350, "short"])
    )
    config = DataConfig(source=(str(tmp_path / "long.jsonl"),), validation_fraction=1e-9)
    prepare(PrepareRequest(config=config, out=tmp_path / "out"))
    expected = "\0" + "\n".join(lines) + "\0" + "y" * 350 + "\0short"
    assert bytes(tokens_of(tmp_path / "out", "train")).decode() == expected
    document = encoding.Document("\n".join(lines), "train")
    pieces = list(encoding.pieces_of(document))
    assert len(pieces) > 10
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])
    assert [piece.is_start for piece in pieces] == [True] + [False] * (len(pieces) - 1)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "json"])
def test_every_kind_of_file_gives_the_same_tokens(
    kind: str, documents: list[str], tmp_path: Path
) -> None:
    if kind == "txt":
        for number, text in enumerate(documents[:20]):
            (tmp_path / f"{number:03d}.txt").write_text(text, encoding="utf-8")
        source = str(tmp_path / "*.txt")
    else:
        rows = datasets.Dataset.from_dict({"text": documents[:20]})
        path = tmp_path / f"rows.{kind}"
        if kind == "parquet":
            rows.to_parquet(path)
        elif kind in ("jsonl.gz", "jsonl.zst"):
            compress = gzip.compress if kind == "jsonl.gz" else zstandard.compress
            rows.to_json(tmp_path / "rows.jsonl")
            path.write_bytes(compress((tmp_path / "rows.jsonl").read_bytes()))
        else:
            rows.to_json(path)
        source = str(path)
    other = tmp_path / "validation.md"
    other.write_text("validation")
    config = DataConfig(source=(source,), validation=(str(other),))
    prepare(PrepareRequest(config=config, out=tmp_path / "out"))
    expected = b"".join(b"\0" + text.encode() for text in documents[:20])
    assert bytes(tokens_of(tmp_path / "out", "train")) == expected
    assert bytes(tokens_of(tmp_path / "out", "validation")) == b"\0validation"


def test_a_single_text_file_is_split_at_a_line_near_its_end(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    config = DataConfig(source=(str(path),), validation_fraction=0.1)
    prepare(PrepareRequest(config=config, out=tmp_path / "out"))
    parts = [bytes(tokens_of(tmp_path / "out", part))[1:] for part in ("train", "validation")]
    assert b"".join(parts) == path.read_bytes()
    assert parts[0].endswith(b"\n")
    assert len(parts[1]) == pytest.approx(path.stat().st_size / 10, abs=10)


def test_a_prepared_folder_says_all_that_a_run_needs(
    request_of: PrepareRequest, tokenizer_file: Path
) -> None:
    manifest = prepare(request_of)
    config = DataConfig(source=(str(request_of.out),), workers=0)
    data = open_data(config, sequence_length=16, seed=0)
    described = data.describe()
    assert described["vocab_size"] == 300
    assert described["tokenizer"] == str(tokenizer_file)
    assert described["train_tokens"] == manifest["parts"]["train"]["tokens"]
    assert described["validation_tokens"] == manifest["parts"]["validation"]["tokens"]
    (rows,) = data.validation_batches(tokens=32, batch_size=2, rank=0, world_size=1)
    assert rows[0].tolist() == tokens_of(request_of.out, "validation")[:17]


def test_local_text_is_tokenised_once(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(source=(str(jsonl),), validation_fraction=0.1, cache=str(tmp_path / "c"))
    first = open_data(config, sequence_length=16, seed=0).describe()
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_pieces", None)
        assert open_data(config, sequence_length=16, seed=0).describe() == first
    # Another text under the same name is another entry.
    jsonl.write_text(json.dumps({"text": "something else " * 100}) + "\n")
    changed = open_data(config, sequence_length=16, seed=0).describe()
    assert changed["fingerprint"] != first["fingerprint"]
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_a_folder_of_something_else_is_left_alone(
    request_of: PrepareRequest, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files, such as notes\.txt; name another"):
        prepare(replace(request_of, out=mine))
    with pytest.raises(InputError, match=r"notes\.txt is a file; name a folder"):
        prepare(replace(request_of, out=mine / "notes.txt"))
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]

    prepare(request_of)
    before = content_of(request_of.out)
    assert prepare(request_of) == json.loads(before["manifest.json"])
    other = replace(request_of, config=replace(request_of.config, seed=1))
    with pytest.raises(InputError, match=r"was made with another value of seed \(0, now 1\)"):
        prepare(other)
    assert content_of(request_of.out) == before


def prepare_many_times(request: PrepareRequest, count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        manifests = list(pool.map(lambda _: prepare(request), range(count)))
    assert all(manifest == manifests[0] for manifest in manifests)


def test_several_processes_may_ask_for_the_same_folder(
    request_of: PrepareRequest, tmp_path: Path
) -> None:
    """Ranks that open their data at the same moment: one works, the others wait."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=prepare_many_times, args=(request_of, 3)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    prepare(replace(request_of, out=tmp_path / "alone"))
    assert content_of(request_of.out) == content_of(tmp_path / "alone")


def test_a_full_disk_keeps_what_was_done_and_says_how_to_go_on(
    request_of: PrepareRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit on a file's size stands for a full disk; both come as an OSError of a write."""
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 1500)
    monkeypatch.setattr(prepare_module, "_TOKENS_BETWEEN_SAVES", 500)
    large = replace(request_of, shard_tokens=3000)
    calls = iter(range(10**6))
    fsync = shards.os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == 6:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device; finished work is kept"):
            prepare(large)
    assert (large.out / "progress.json").exists()
    prepare(large)
    whole = replace(large, out=tmp_path / "whole")
    prepare(whole)
    assert content_of(large.out) == content_of(whole.out)


def test_a_shard_that_does_not_fit_the_manifest_is_one_line(request_of: PrepareRequest) -> None:
    prepare(request_of)
    config = DataConfig(source=(str(request_of.out),))
    shard = request_of.out / "train-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(InputError, match=r"train-00001\.bin is truncated.*prepare it again"):
        open_data(config, sequence_length=8, seed=0)
    shard.unlink()
    with pytest.raises(InputError, match=r"train-00001\.bin of .*manifest\.json is missing"):
        open_data(config, sequence_length=8, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "cannot read .*bad.jsonl: "),
        ("bad.parquet", b"PAR1 and no more", "cannot read .*bad.parquet: "),
        ("bad.txt", b"\xff\xfe\xfa", "bad.txt is not text in UTF-8"),
        ("rows.jsonl", b'{"body": "a"}\n', "have no text in the field 'text': they have body"),
        ("blank.jsonl", b'{"text": " "}\n', "no text was found in"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    config = DataConfig(source=(str(tmp_path / name),))
    with pytest.raises(InputError, match=message) as caught:
        prepare(PrepareRequest(config=config, out=tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_command_prepares_and_tells(jsonl: Path, tmp_path: Path) -> None:
    out = tmp_path / "prepared"
    done = run_command("data", "prepare", jsonl, "--out", out, "--validation-fraction", 0.1)
    assert done.code == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert f"train: {manifest['parts']['train']['tokens']:,} tokens in 1 shard\n" in done.stdout
    again = run_command(
        "data", "prepare", jsonl, "--out", out, "--validation-fraction", 0.1, "--json"
    )
    assert json.loads(again.stdout) == manifest
    assert run_command("data", "verify", out).code == 0
    shard = out / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    damaged = run_command("data", "verify", out)
    assert damaged.code == 2
    assert damaged.stderr.startswith(f"normuon: error: the shard {shard} is damaged")
    missing = run_command("data", "prepare", tmp_path / "nowhere.txt", "--out", tmp_path / "x")
    assert (missing.code, missing.stdout) == (2, "")
    assert missing.stderr.startswith("normuon: error: no such file of data: ")
    assert missing.stderr.count("\n") == 1


def test_bytes_are_tokens(tmp_path: Path) -> None:
    text = "naïve 日本\n"
    (tmp_path / "a.txt").write_text(text * 100)
    config = DataConfig(source=(str(tmp_path / "a.txt"),))
    prepare(PrepareRequest(config=config, out=tmp_path / "out"))
    tokens = np.array(tokens_of(tmp_path / "out", "train"))
    assert tokens.max() < 256
    saved = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert saved.encode(text).ids == list(text.encode())
    assert saved.decode(tokens[1 : 1 + len(text.encode())].tolist()) == text
