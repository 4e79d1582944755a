"""Data in shards of tokens: opened, and read in a shuffled order of all their sequences.

Text is tokenised into shards first, in a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from normuon_lab.atomic_files import prove_folder
from normuon_lab.data.batches import BatchShare, LoadedBatch, PretrainData, TrainBatches
from normuon_lab.data.config import DataConfig
from normuon_lab.data.documents import PARTS
from normuon_lab.data.prepare import PrepareRequest, describe_job, prepare, read_manifest
from normuon_lab.data.sequences import EpochOrder, SequenceReader
from normuon_lab.data.shards import TokenShards
from normuon_lab.data.sources import PreparedFolder, ShardFiles, TextFiles, resolve_validation
from normuon_lab.data.tokenizer import BYTES, load_tokenizer
from normuon_lab.errors import InputError, counted, require


@dataclass(frozen=True, slots=True)
class OpenedShards:
    """Tokens of both parts, and their vocabulary."""

    train: TokenShards
    validation: TokenShards
    vocab_size: int
    tokenizer: str | None


def prepare_in_cache(config: DataConfig, source: TextFiles) -> Path:
    """Tokenise text into the cache, unless it is there, and return its folder."""
    root = cache_folder(config)
    prove_folder(root, f"--data.cache {root}")
    request = PrepareRequest(config=config, out=root)
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
    """Both parts of shards; the held-out part is `config.validation`'s, if given.

    Raises:
        InputError: they are missing or damaged, or the size of their vocabulary is unknown.
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
    validation = resolve_validation(config.validation, source)
    if not isinstance(validation, (PreparedFolder, ShardFiles)):
        raise InputError(
            "the training data is .bin shards, but the validation data is text: prepare both"
        )
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
    """Size of the vocabulary of shards without a manifest, and the tokenizer if it is known."""
    if config.tokenizer == BYTES:
        if config.vocab_size is None:
            raise InputError(
                f"{source.paths[0]} has no manifest that says how large its vocabulary is; name "
                "its tokenizer, or give vocab_size (50257 for GPT-2's)"
            )
        return config.vocab_size, None
    tokenizer = load_tokenizer(config.tokenizer, separator=config.separator)
    return config.vocab_size or tokenizer.vocab_size, tokenizer.name


def _shuffled_batches(
    reader: SequenceReader, share: BatchShare, seed: int, first_sequence: int, _: object
) -> Iterator[LoadedBatch]:
    """A rank's micro batches from a position in the endless global order.

    That is epoch after epoch, each shuffled. Loading processes take the micro batches in turn.
    """
    worker = get_worker_info()
    number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
    micro_batches = (
        range(first + batch.start, first + batch.stop)
        for first in count(first_sequence, share.global_batch_size)
        for batch in share.micro_batches()
    )
    for positions in islice(micro_batches, number, None, num_workers):
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), len(reader))
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            order = EpochOrder(len(reader), seed=seed, epoch=int(epoch))
            places[chosen] = order(places[chosen])
        yield LoadedBatch(reader.read(places.tolist()))


class ShardData(PretrainData):
    """Data in shards of tokens."""

    kind = "shards"

    def __init__(
        self, config: DataConfig, opened: OpenedShards, *, sequence_length: int, seed: int
    ) -> None:
        super().__init__(config, sequence_length=sequence_length, seed=seed)
        self._opened = opened
        self.fingerprint = opened.train.fingerprint()
        self.vocab_size = opened.vocab_size
        self.tokenizer_name = opened.tokenizer

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "train_tokens": len(self._opened.train),
            "train_sequences": len(self._reader(self._opened.train)),
            "validation_tokens": len(self._opened.validation),
        }

    def _batches(self, share: BatchShare) -> TrainBatches:
        reader = self._reader(self._opened.train)
        require(
            len(reader) >= share.global_batch_size,
            f"the training data has {counted(len(self._opened.train), 'token')}, "
            f"{counted(len(reader), 'sequence')} of {self._sequence_length}; one batch "
            f"takes {share.global_batch_size}: give more data or a smaller batch",
        )
        return TrainBatches(
            share,
            self._identity(),
            partial(_shuffled_batches, reader, share, self._seed),
            workers=self._config.workers,
            prefetch=self._config.prefetch,
        )

    def _validation_tokens(self, num_tokens: int) -> TokenShards:
        return self._opened.validation
