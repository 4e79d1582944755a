"""Shards: modded-nanogpt's format to the byte, and one clear line for each way to be broken."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from normuon_lab.data.shards import HEADER_BYTES, TokenShards, header, read_num_tokens
from normuon_lab.errors import InputError
from tests.lab.data.conftest import write_shard

MakeShards = Callable[[int, int], list[Path]]


def read_as_modded_nanogpt(path: Path) -> np.ndarray:
    """Its `_load_data_shard`, with numpy for torch."""
    values = np.fromfile(path, dtype=np.int32, count=256)
    assert values[0] == 20240520, "magic number mismatch in the data .bin file"
    assert values[1] == 1, "unsupported version"
    num_tokens = int(values[2])
    with path.open("rb") as file:
        file.seek(256 * 4)
        tokens = np.frombuffer(file.read(), dtype=np.uint16)
    assert tokens.size == num_tokens
    return tokens


def test_modded_nanogpt_reads_our_shards(tmp_path: Path) -> None:
    tokens = [0, 1, 50256, 65535, 7]
    path = write_shard(tmp_path / "a.bin", tokens)
    assert read_as_modded_nanogpt(path).tolist() == tokens
    assert len(header(5)) == HEADER_BYTES == 1024
    assert path.read_bytes()[1024:] == b"\x00\x00\x01\x00\x50\xc4\xff\xff\x07\x00"


def test_shards_are_one_array(counted_shards: MakeShards) -> None:
    shards = TokenShards(counted_shards(100, 7))
    assert len(shards) == 100
    for start, length in [(0, 100), (0, 7), (5, 4), (6, 1), (7, 7), (13, 30), (99, 1), (50, 0)]:
        assert shards[start : start + length].tolist() == list(range(start, start + length))


def test_a_narrowed_array_counts_from_its_own_start(counted_shards: MakeShards) -> None:
    part = TokenShards(counted_shards(100, 7)).narrow(10, 60).narrow(5, 40)
    assert len(part) == 35
    assert part[0:35].tolist() == list(range(15, 50))


def test_an_array_travels_to_another_process_without_its_maps(counted_shards: MakeShards) -> None:
    shards = TokenShards(counted_shards(20, 7))
    shards[0:20]
    sent = pickle.dumps(shards)
    assert len(sent) < 2000
    assert pickle.loads(sent)[3:12].tolist() == list(range(3, 12))


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "vanished":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-10])
    elif kind == "odd":
        path.write_bytes(content[:-1])
    elif kind == "longer":
        path.write_bytes(content + b"\0\0")
    elif kind == "magic":
        path.write_bytes(b"\1\0\0\0" + content[4:])
    elif kind == "version":
        path.write_bytes(content[:4] + b"\2\0\0\0" + content[8:])
    elif kind == "no header":
        path.write_bytes(content[:100])
    elif kind == "negative":
        path.write_bytes(content[:8] + b"\xff\xff\xff\xff" + content[12:])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("vanished", "cannot read the shard .*No such file"),
        ("truncated", "part-001.bin is truncated: it has 1028 bytes.*take 1038; prepare it again"),
        ("odd", "part-001.bin is truncated: it has 1037 bytes"),
        ("longer", "part-001.bin is damaged: it has 1040 bytes"),
        ("magic", "part-001.bin is not a shard of tokens"),
        ("version", "part-001.bin has version 2"),
        ("no header", "part-001.bin is truncated: 100 bytes do not hold its header"),
        ("negative", "part-001.bin is damaged"),
    ],
)
def test_a_broken_shard_is_one_line_that_names_it(
    counted_shards: MakeShards, kind: str, message: str
) -> None:
    paths = counted_shards(21, 7)
    damage(paths[1], kind)
    with pytest.raises(InputError, match=message) as caught:
        TokenShards(paths)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        read_num_tokens(paths[1])


@pytest.mark.parametrize("kind", ["vanished", "truncated", "longer"])
def test_a_shard_that_breaks_before_it_is_first_read(counted_shards: MakeShards, kind: str) -> None:
    paths = counted_shards(21, 7)
    shards = TokenShards(paths)
    damage(paths[1], kind)
    assert shards[0:7].tolist() == list(range(7))
    with pytest.raises(InputError, match=r"part-001\.bin"):
        shards[0:21]


def test_a_shard_that_is_cut_while_it_is_mapped(counted_shards: MakeShards) -> None:
    """Reading a map beyond the end of its file ends the process with SIGBUS, without a message."""
    path = counted_shards(100_000 // 2, 100_000)[0]
    shards = TokenShards([path])
    shards[0:10]
    os.truncate(path, HEADER_BYTES + 8)
    with pytest.raises(InputError, match=r"part-000\.bin was truncated while it was in use"):
        shards[40_000:40010]


def test_the_fingerprint_is_of_the_content(counted_shards: MakeShards, tmp_path: Path) -> None:
    paths = counted_shards(50_000, 20_000)
    first = TokenShards(paths).fingerprint()
    moved = [path.rename(tmp_path / f"moved-{i}.bin") for i, path in enumerate(paths)]
    assert TokenShards(moved).fingerprint() == first
    assert TokenShards(moved).narrow(0, 10_000).fingerprint() != first
    assert TokenShards(moved[::-1]).fingerprint() != first
    content = bytearray(moved[1].read_bytes())
    content[-1] ^= 1
    moved[1].write_bytes(content)
    assert TokenShards(moved).fingerprint() != first
