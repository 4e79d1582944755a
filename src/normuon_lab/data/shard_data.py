"""Data in shards of tokens: opened, and read in a shuffled order of all their sequences.

Text is tokenised into shards first, in a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from normuon_lab.data.batches import (
    BatchShare,
    LoadedBatch,
    PretrainData,
    TrainBatches,
    make_loader,
)
from normuon_lab.data.config import DataConfig
from normuon_lab.data.documents import PARTS
from normuon_lab.data.prepare import PrepareRequest, describe_job, prepare, read_manifest
from normuon_lab.data.sequences import EpochOrder, SequenceReader, ValidationBatches
from normuon_lab.data.shards import TokenShards
from normuon_lab.data.sources import PreparedFolder, ShardFiles, TextFiles, resolve_source
from normuon_lab.data.tokenizer import BYTES, load_tokenizer
from normuon_lab.errors import InputError, counted, require
from normuon_lab.machine import default_num_workers


@dataclass(frozen=True, slots=True)
class OpenedShards:
    """Tokens of both parts, and what they are numbers of."""

    train: TokenShards
    validation: TokenShards
    vocab_size: int
    tokenizer: str | None


def prepare_in_cache(config: DataConfig, source: TextFiles) -> Path:
    """Tokenise text into the cache, unless it is there, and return its folder."""
    processes = config.processes or default_num_workers(64)
    root = cache_folder(config)
    request = PrepareRequest(config=config, out=root, processes=processes)
    tokenizer = load_tokenizer(config.tokenizer, separator=config.separator)
    job = describe_job(request, source, tokenizer)
    paths = [str(path.resolve()) for path in source.paths]
    key = hashlib.sha256(json.dumps([paths, job]).encode()).hexdigest()[:32]
    prepare(replace(request, out=root / key))
    return root / key


def cache_folder(config: DataConfig) -> Path:
    """Where tokenised text is kept."""
    if config.cache:
        return Path(config.cache)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "normuon" / "data"


def open_shards(config: DataConfig, source: PreparedFolder | ShardFiles) -> OpenedShards:
    """Both parts of shards, the held-out part from `config.validation` where it names one.

    Raises:
        InputError: they are missing or damaged, or nothing says how large their vocabulary is.
    """
    if isinstance(source, PreparedFolder):
        opened = open_folder(source.folder)
    else:
        whole = TokenShards(source.paths)
        cut = len(whole) - int(config.validation_fraction * len(whole))
        opened = OpenedShards(
            whole.narrow(0, cut), whole.narrow(cut, len(whole)), *_vocabulary(config, source)
        )
    if not config.validation:
        return opened
    validation = resolve_source(config.validation)
    require(
        isinstance(validation, (PreparedFolder, ShardFiles)),
        "the training data is .bin shards, but the validation data is text: prepare both",
    )
    assert isinstance(validation, (PreparedFolder, ShardFiles))
    train = opened.train if isinstance(source, PreparedFolder) else TokenShards(source.paths)
    return replace(opened, train=train, validation=open_validation_shards(validation))


def open_folder(folder: Path) -> OpenedShards:
    """Both parts of a folder that `normuon data prepare` wrote."""
    manifest = read_manifest(folder)
    train, validation = (
        TokenShards([folder / shard["file"] for shard in manifest["parts"][part]["shards"]])
        for part in PARTS
    )
    tokenizer = manifest["tokenizer"]
    return OpenedShards(train, validation, int(tokenizer["vocab_size"]), tokenizer["name"])


def open_validation_shards(source: PreparedFolder | ShardFiles) -> TokenShards:
    """All of other shards; of a prepared folder its held-out part, or all where there is none."""
    if isinstance(source, ShardFiles):
        return TokenShards(source.paths)
    opened = open_folder(source.folder)
    return opened.validation if len(opened.validation) else opened.train


def _vocabulary(config: DataConfig, source: ShardFiles) -> tuple[int, str | None]:
    """Size of the vocabulary of shards that do not say it, and the tokenizer where it is known."""
    if config.tokenizer == BYTES:
        require(
            config.vocab_size is not None,
            f"{source.paths[0]} has no manifest that says how large its vocabulary is; name its "
            "tokenizer, or give vocab_size (50257 for GPT-2's)",
        )
        return int(config.vocab_size or 0), None
    tokenizer = load_tokenizer(config.tokenizer, separator=config.separator)
    return config.vocab_size or tokenizer.vocab_size, tokenizer.name


class ShuffledSequences(torch.utils.data.Dataset[LoadedBatch]):
    """Sequences by their position in the endless global order: epoch after epoch, each shuffled."""

    def __init__(self, reader: SequenceReader, *, seed: int) -> None:
        self._reader = reader
        self._seed = seed
        self._order: tuple[int, EpochOrder] | None = None

    def __getitems__(self, positions: range) -> LoadedBatch:
        """A micro batch; the loader's batched form of ``__getitem__``."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), len(self._reader))
        sequences = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            sequences[chosen] = self._epoch_order(int(epoch))(offsets[chosen])
        try:
            return LoadedBatch(self._reader.read(sequences.tolist()))
        except InputError as error:
            return LoadedBatch(None, str(error))

    def _epoch_order(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, EpochOrder(len(self._reader), seed=self._seed, epoch=epoch)
        return self._order[1]


class ShardBatches(TrainBatches):
    """Training batches from shards."""

    def __init__(
        self,
        reader: SequenceReader,
        share: BatchShare,
        *,
        seed: int,
        identity: dict[str, Any],
        workers: int,
        prefetch: int,
    ) -> None:
        super().__init__(share, identity)
        self._dataset = ShuffledSequences(reader, seed=seed)
        self._workers = workers
        self._prefetch = prefetch

    def _make_loader(self, first_sequence: int, source_state: Any) -> StatefulDataLoader[Any]:
        return make_loader(
            self._dataset,
            workers=self._workers,
            prefetch=self._prefetch,
            batch_sampler=_Positions(self.share, first_sequence),
            collate_fn=_as_it_is,
        )


class _Positions:
    """Positions of this rank's micro batches, step after step."""

    def __init__(self, share: BatchShare, first_sequence: int) -> None:
        self._share = share
        self._first_sequence = first_sequence

    def __iter__(self) -> Iterator[range]:
        first = self._first_sequence
        while True:
            for batch in self._share.micro_batches():
                yield range(first + batch.start, first + batch.stop)
            first += self._share.global_batch_size


def _as_it_is(batch: LoadedBatch) -> LoadedBatch:
    return batch


class ShardData(PretrainData):
    """Data in shards of tokens."""

    def __init__(
        self, config: DataConfig, opened: OpenedShards, *, sequence_length: int, seed: int
    ) -> None:
        self._config = config
        self._opened = opened
        self._sequence_length = sequence_length
        self._seed = seed
        self._fingerprint = opened.train.fingerprint()
        self.vocab_size = opened.vocab_size

    def describe(self) -> dict[str, Any]:
        return {
            "source": list(self._config.source),
            "kind": "shards",
            "tokenizer": self._opened.tokenizer,
            "vocab_size": self.vocab_size,
            "fingerprint": self._fingerprint,
            "sequence_length": self._sequence_length,
            "train_tokens": len(self._opened.train),
            "train_sequences": len(self._reader(self._opened.train)),
            "validation_tokens": len(self._opened.validation),
        }

    def train_batches(
        self, *, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
    ) -> TrainBatches:
        reader = self._reader(self._opened.train)
        require(
            len(reader) >= global_batch_size,
            f"the training data has {counted(len(self._opened.train), 'token')}, "
            f"{counted(len(reader), 'sequence')} of {self._sequence_length}; one batch "
            f"takes {global_batch_size}: give more data or a smaller batch",
        )
        return ShardBatches(
            reader,
            BatchShare(
                global_batch_size=global_batch_size,
                micro_batch_size=micro_batch_size,
                rank=rank,
                world_size=world_size,
            ),
            seed=self._seed,
            identity={
                "kind": "shards",
                "fingerprint": self._fingerprint,
                "sequence_length": self._sequence_length,
                "seed": self._seed,
            },
            workers=self._config.workers,
            prefetch=self._config.prefetch,
        )

    def validation_batches(
        self, *, tokens: int, batch_size: int, rank: int, world_size: int
    ) -> Iterable[Tensor]:
        return ValidationBatches(
            self._reader(self._opened.validation),
            num_sequences=tokens // self._sequence_length,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )

    def _reader(self, tokens: TokenShards) -> SequenceReader:
        return SequenceReader(
            tokens, sequence_length=self._sequence_length, vocab_size=self.vocab_size
        )
