"""Opens the data that a configuration names and gives out its batches.

Text is tokenised first, once, into a cache; shards are read as they are; streams are tokenised
while training reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from normuon_lab.data.batches import BatchShare, TrainBatches
from normuon_lab.data.config import DataConfig
from normuon_lab.data.documents import PARTS
from normuon_lab.data.prepare import PrepareRequest, describe_job, prepare, read_manifest
from normuon_lab.data.shard_data import SequenceReader, ShardBatches
from normuon_lab.data.shards import TokenShards
from normuon_lab.data.sources import (
    PreparedFolder,
    ShardFiles,
    Stream,
    TextFiles,
    resolve_source,
)
from normuon_lab.data.tokenizer import BYTES, load_tokenizer
from normuon_lab.errors import require
from normuon_lab.machine import default_num_workers

__all__ = ["PretrainData", "TrainBatches", "open_data"]


class PretrainData(ABC):
    """Training and validation data of one run.

    Attributes:
        vocab_size: token numbers are below it.
    """

    vocab_size: int

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a run records of its data, in plain values."""

    @abstractmethod
    def train_batches(
        self, *, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
    ) -> TrainBatches:
        """This rank's share of the training batches, from the first.

        Args:
            global_batch_size: sequences of an optimizer step, on all ranks together.
            micro_batch_size: sequences of one tensor.
            rank: among the data-parallel ranks.
            world_size: number of data-parallel ranks.

        Raises:
            InputError: the sizes do not divide, or the data is too short for one batch.
        """

    @abstractmethod
    def validation_batches(
        self, *, tokens: int, batch_size: int, rank: int, world_size: int
    ) -> Iterable[Tensor]:
        """The sequences that every evaluation reads, ``[<= batch_size, sequence + 1]``, int64.

        The ranks' shares together are the same sequences on any number of ranks; a rank may have
        one sequence less than another, or none.

        Args:
            tokens: how many targets to read, in whole sequences, spread evenly over the data.
            batch_size: sequences of one tensor.
            rank: among the data-parallel ranks.
            world_size: number of data-parallel ranks.

        Raises:
            InputError: the validation data is shorter.
        """


def open_data(config: DataConfig, *, sequence_length: int, seed: int) -> PretrainData:
    """Open what a run reads; tokenise text that is not in the cache yet.

    Every rank calls this. Where ranks share the cache one of them tokenises, and the others wait.

    Args:
        config: what to read.
        sequence_length: tokens that a sequence feeds to the model.
        seed: of the run; decides the order of the training data.

    Raises:
        InputError: the data is missing, damaged or of an unknown kind.
    """
    require(sequence_length >= 1, f"sequence length {sequence_length}: give at least 1")
    source = resolve_source(config.source)
    if isinstance(source, Stream):
        from normuon_lab.data.stream_data import StreamData

        return StreamData(config, source, sequence_length=sequence_length, seed=seed)
    if isinstance(source, TextFiles):
        opened = _open_folder(prepare_in_cache(config, source))
    else:
        opened = _open_shards(config, source)
    return ShardData(config, opened, sequence_length=sequence_length, seed=seed)


@dataclass(frozen=True, slots=True)
class OpenedShards:
    """Tokens of both parts, and what they are numbers of."""

    train: TokenShards
    validation: TokenShards
    vocab_size: int
    tokenizer: str | None


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
            f"the training data has {len(self._opened.train)} tokens, {len(reader)} sequences of "
            f"{self._sequence_length}; one batch takes {global_batch_size}: give more data or a "
            "smaller batch",
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


class ValidationBatches:
    """The same sequences at every evaluation, read anew each time.

    Args:
        reader: the validation data.
        num_sequences: how many to read, spread evenly over the data.
        batch_size: sequences of one tensor.
        rank: among the data-parallel ranks.
        world_size: number of data-parallel ranks.
    """

    def __init__(
        self,
        reader: SequenceReader,
        *,
        num_sequences: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        require(num_sequences >= 1, "an evaluation reads less than one sequence; give more tokens")
        require(
            len(reader) >= num_sequences,
            f"the validation data has {len(reader)} sequences and an evaluation reads "
            f"{num_sequences}: give more data, a larger validation_fraction or fewer tokens",
        )
        chosen = [i * len(reader) // num_sequences for i in range(num_sequences)]
        bounds = [num_sequences * i // world_size for i in (rank, rank + 1)]
        self._reader = reader
        self._chosen = chosen[bounds[0] : bounds[1]]
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._chosen), self._batch_size):
            yield self._reader.read(self._chosen[start : start + self._batch_size])


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


def _open_shards(config: DataConfig, source: PreparedFolder | ShardFiles) -> OpenedShards:
    if isinstance(source, PreparedFolder):
        opened = _open_folder(source.folder)
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
        "the training data is .bin shards and the validation data text: prepare both",
    )
    assert isinstance(validation, (PreparedFolder, ShardFiles))
    train = opened.train if isinstance(source, PreparedFolder) else TokenShards(source.paths)
    return replace(opened, train=train, validation=open_validation_shards(validation))


def _open_folder(folder: Path) -> OpenedShards:
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
    opened = _open_folder(source.folder)
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
