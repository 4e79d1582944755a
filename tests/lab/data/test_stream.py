"""Streams: the loading code of the Hub, on local files that `datasets` wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from normuon_lab.data.batches import PretrainData
from normuon_lab.data.config import DataConfig
from normuon_lab.data.documents import is_held_out
from normuon_lab.data.loading import open_data
from normuon_lab.errors import InputError
from tests.distributed.ranks import Ranks
from tests.lab.data.conftest import signal_from_elsewhere

LENGTH = 16
BATCH = 8
FILES = 8


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def files(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[str],
) -> str:
    folder = tmp_path_factory.mktemp("stream")
    rows = datasets.Dataset.from_dict({"text": documents, "id": list(range(len(documents)))})
    for number in range(FILES):
        shard = rows.shard(num_shards=FILES, index=number)
        path = folder / f"part-{number}.{request.param}"
        if request.param == "parquet":
            shard.to_parquet(path)
        else:
            shard.to_json(path)
    return f"stream:{folder}/*.{request.param}"


@pytest.fixture
def config(files: str, tmp_path: Path) -> DataConfig:
    return DataConfig(
        source=(files,),
        validation_fraction=0.1,
        workers=0,
        cache=str(tmp_path / "cache"),
        stream_shuffle=7,
    )


def opened(config: DataConfig, *, seed: int = 0) -> PretrainData:
    return open_data(config, sequence_length=LENGTH, seed=seed)


def steps(data: PretrainData, *, world_size: int = 1, micro: int = 1) -> Iterator[Tensor]:
    ranks = [
        data.train_batches(
            global_batch_size=BATCH, micro_batch_size=micro, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    while True:
        yield torch.cat([b for r in ranks for b in islice(r, r.share.micro_batches_per_step)])


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (2, 2), (4, 1), (8, 1)])
def test_a_step_is_the_same_on_any_number_of_ranks(
    config: DataConfig, world_size: int, micro: int
) -> None:
    data = opened(config)
    found = list(islice(steps(data, world_size=world_size, micro=micro), 12))
    assert same(found, list(islice(steps(data), 12)))


def test_every_training_document_comes_once_an_epoch(
    config: DataConfig, documents: list[str]
) -> None:
    """One lane, read for an epoch and a little more, split at the separators."""
    config = replace(config, stream_lanes=1)
    batches = opened(config).train_batches(
        global_batch_size=1, micro_batch_size=1, rank=0, world_size=1
    )
    kept = [text for text in documents if not is_held_out(text, fraction=0.1, seed=0)]
    assert 250 < len(kept) < 290
    epoch_tokens = sum(len(text.encode()) + 1 for text in kept)
    tokens = torch.cat([row[:, :-1] for row in islice(batches, 2 * epoch_tokens // LENGTH)])
    texts = bytes(tokens.flatten().tolist()).decode(errors="ignore").split("\0")[1:]
    assert Counter(texts[: len(kept)]) == Counter(kept)
    second = texts[len(kept) : 2 * len(kept) - 1]
    assert len(set(second)) == len(second)
    assert second != texts[: len(second)]


def test_lanes_share_no_document(config: DataConfig) -> None:
    data = opened(config)
    texts_of_lane: list[set[str]] = [set() for _ in range(BATCH)]
    for step in islice(steps(data), 150):
        for lane, row in enumerate(step):
            # Numbers begin the documents and are theirs alone.
            for piece in bytes(row.tolist()).decode(errors="ignore").split("\0")[1:]:
                if " " in piece:
                    texts_of_lane[lane].add(piece.split(" ")[0])
    assert all(len(one) > 5 for one in texts_of_lane)
    assert sum(map(len, texts_of_lane)) == len(set.union(*texts_of_lane))


@pytest.mark.parametrize(("workers", "taken"), [(0, 0), (0, 1), (0, 9), (0, 450), (1, 9)])
def test_a_saved_position_is_resumed_exactly(config: DataConfig, workers: int, taken: int) -> None:
    """Within blocks, over their borders, and, after 450 steps, in the second epoch."""
    data = opened(config)
    expected = list(islice(steps(data), taken + 15))
    batches = opened(replace(config, workers=workers)).train_batches(
        global_batch_size=BATCH, micro_batch_size=2, rank=0, world_size=1
    )
    list(islice(batches, 4 * taken))
    state = json.loads(json.dumps(batches.state_dict()))
    batches.close()
    resumed = [
        opened(config).train_batches(
            global_batch_size=BATCH, micro_batch_size=2, rank=rank, world_size=2
        )
        for rank in range(2)
    ]
    for one in resumed:
        one.load_state_dict(state)
    for step in expected[taken:]:
        assert torch.equal(torch.cat([b for r in resumed for b in islice(r, 2)]), step)


def position_on_ranks(
    rank: int, world_size: int, *, config: DataConfig, taken: int
) -> dict[str, Any]:
    batches = opened(config).train_batches(
        global_batch_size=BATCH, micro_batch_size=1, rank=rank, world_size=world_size
    )
    list(islice(batches, taken * batches.share.micro_batches_per_step))
    return batches.state_dict()


def test_ranks_gather_a_position_that_one_process_resumes(config: DataConfig, ranks: Ranks) -> None:
    states = ranks.run(position_on_ranks, 2, config=config, taken=5)
    assert states[0] == states[1]
    batches = opened(config).train_batches(
        global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1
    )
    batches.load_state_dict(states[0])
    expected = list(islice(steps(opened(config)), 10))[5:]
    assert same(list(islice(batches, 5)), expected)


def test_loading_processes_outlive_the_signals_of_a_scheduler(config: DataConfig) -> None:
    """Threads of pyarrow are there before the process can say what it ignores."""
    batches = opened(replace(config, workers=1, prefetch=1)).train_batches(
        global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1
    )
    expected = list(islice(steps(opened(config)), 30))
    assert same(list(islice(batches, 2)), expected[:2])
    (process,) = batches._loaded._workers  # type: ignore[union-attr]
    signal_from_elsewhere(process.pid)
    assert same(list(islice(batches, 28)), expected[2:])
    assert process.is_alive()
    batches.close()
    process.join(20)
    assert not process.is_alive()


def test_held_out_documents_are_validated_on_and_cached(
    config: DataConfig, documents: list[str]
) -> None:
    data = opened(config)
    held_out = [text for text in documents if is_held_out(text, fraction=0.1, seed=0)]
    shares = [
        torch.cat(list(data.validation_batches(tokens=320, batch_size=3, rank=r, world_size=2)))
        for r in range(2)
    ]
    tokens = torch.cat(shares)[:, :-1].flatten()
    assert tokens.numel() == 320
    expected = b"".join(b"\0" + text.encode() for text in held_out)
    assert bytes(tokens.tolist()) == expected[:320]
    assert len(list(Path(str(config.cache)).glob("validation-*.npy"))) == 1


def test_a_stream_may_be_validated_on_another_source(
    config: DataConfig, tmp_path: Path, documents: list[str]
) -> None:
    path = tmp_path / "validation.txt"
    path.write_text("words of its own " * 50)
    data = opened(replace(config, validation=(str(path),)))
    (rows,) = data.validation_batches(tokens=32, batch_size=2, rank=0, world_size=1)
    assert bytes(rows[0].tolist()) == b"\0words of its own"


def test_a_tokenizer_of_tokenizers(
    config: DataConfig, tokenizer_file: Path, documents: list[str]
) -> None:
    from tokenizers import Tokenizer

    data = opened(replace(config, tokenizer=str(tokenizer_file), stream_lanes=1, stream_shuffle=0))
    assert data.vocab_size == 300
    batches = data.train_batches(global_batch_size=4, micro_batch_size=4, rank=0, world_size=1)
    tokens = next(batches)[:, :-1].flatten().tolist()
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    kept = [text for text in documents if not is_held_out(text, fraction=0.1, seed=0)]
    decoded = tokenizer.decode(tokens, skip_special_tokens=False)
    assert "<|endoftext|>".join(["", *kept]).startswith(decoded.rstrip("\ufffd"))


def test_what_a_stream_cannot_do_is_told(config: DataConfig) -> None:
    with pytest.raises(InputError, match="stream-lanes 3 does not divide the 8 sequences"):
        position_on_ranks(0, 1, config=replace(config, stream_lanes=3), taken=0)
    with pytest.raises(InputError, match="the data has 8 files; each lane needs one"):
        opened(replace(config, stream_lanes=16)).train_batches(
            global_batch_size=16, micro_batch_size=1, rank=0, world_size=1
        )
    with pytest.raises(InputError, match="has 1 lane, which 2 data-parallel ranks cannot"):
        position_on_ranks(0, 2, config=replace(config, stream_lanes=1), taken=0)
    with pytest.raises(InputError, match="have no text in the field 'body': they have text, id"):
        position_on_ranks(0, 1, config=replace(config, text_field="body"), taken=1)
    with pytest.raises(InputError, match=r"validation data has \d+ sequences, but an evaluation"):
        opened(config).validation_batches(tokens=10**6, batch_size=1, rank=0, world_size=1)


def test_a_damaged_file_of_a_stream_is_one_line(files: str, tmp_path: Path) -> None:
    path = Path(files.removeprefix("stream:")).parent
    source = sorted(path.iterdir())[0]
    damaged = tmp_path / source.name
    damaged.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    config = DataConfig(
        source=(f"stream:{damaged}",), workers=0, cache=str(tmp_path), stream_shuffle=1000
    )
    with pytest.raises(InputError, match=f"cannot read {damaged}") as caught:
        next(steps(opened(config)))
    assert "\n" not in str(caught.value)


def test_a_hub_name_that_cannot_be_reached_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = DataConfig(source=("hub:nobody/nothing:part",), cache=str(tmp_path))
    with pytest.raises(InputError, match="cannot read hub:nobody/nothing:part: ") as caught:
        opened(config)
    assert "\n" not in str(caught.value)
