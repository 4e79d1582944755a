"""Opens the data that a configuration names, as the training and validation batches of a run.

Text is tokenised first, once, into shards in a cache; shards are read in a shuffled order of all
their sequences. Streams are tokenised while training reads them: a step's sequences come in equal
parts from a fixed number of lanes, and a rank reads whole lanes. So two ranks never read the same
row, the steps are the same on any number of ranks that divides the lanes, and a position is one
small record per lane.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import get_worker_info

from normuon_lab.atomic_files import prove_folder, write_bytes
from normuon_lab.data.batches import BatchShare, LoadedBatch, PretrainData, TrainBatches
from normuon_lab.data.config import DataConfig
from normuon_lab.data.documents import PARTS, DocumentGroup, DocumentReader, groups_of
from normuon_lab.data.lanes import Lane, LaneOptions
from normuon_lab.data.prepare import PrepareRequest, describe_job, prepare, read_manifest
from normuon_lab.data.sequences import EpochOrder, SequenceReader, TokenArray
from normuon_lab.data.shards import TokenShards
from normuon_lab.data.sources import (
    PreparedFolder,
    ShardFiles,
    Stream,
    TextFiles,
    resolve_source,
    resolve_validation,
)
from normuon_lab.data.tokenizer import BYTES, Ids, load_tokenizer
from normuon_lab.errors import InputError, counted, require

MAX_DEFAULT_LANES = 64


def open_data(config: DataConfig, *, sequence_length: int, seed: int) -> PretrainData:
    """Open what a run reads; tokenise text that is not in the cache yet.

    Every rank calls this. Where ranks share the cache one of them tokenises, and the others wait.

    Raises:
        InputError: the data is missing, damaged or of an unknown kind.
    """
    require(sequence_length >= 1, f"sequence length {sequence_length}: give at least 1")
    source = resolve_source(config.source)
    if isinstance(source, Stream):
        return StreamData(config, source, sequence_length=sequence_length, seed=seed)
    if isinstance(source, TextFiles):
        opened = open_folder(prepare_in_cache(config, source))
    else:
        opened = open_shards(config, source)
    return ShardData(config, opened, sequence_length=sequence_length, seed=seed)


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


class StreamData(PretrainData):
    """Data that is tokenised while it is read."""

    kind = "stream"

    def __init__(
        self, config: DataConfig, source: Stream, *, sequence_length: int, seed: int
    ) -> None:
        super().__init__(config, sequence_length=sequence_length, seed=seed)
        self._source = source
        self._tokenizer = load_tokenizer(config.tokenizer, separator=config.separator)
        self.vocab_size, self.tokenizer_name = self._tokenizer.vocab_size, self._tokenizer.name
        (self._group,) = groups_of(config, source, "none" if config.validation else "by_hash")
        with self._group.readable():
            self._rows = self._group.open()
            self.fingerprint = self._describe_source()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "files": self._rows.num_shards}

    def _batches(self, share: BatchShare) -> TrainBatches:
        num_lanes = self._num_lanes(share.global_batch_size)
        require(
            num_lanes % share.world_size == 0,
            f"the stream has {counted(num_lanes, 'lane')}, which {share.world_size} data-parallel "
            "ranks cannot share evenly; give other --data.stream-lanes or batch, or prepare the "
            "data (normuon data prepare), which any number of ranks can read",
        )
        options = LaneOptions(
            group=self._group,
            rows=self._rows,
            tokenizer=self._tokenizer,
            num_lanes=num_lanes,
            block_documents=max(1, self._config.stream_shuffle),
            sequence_length=self._sequence_length,
            seed=self._seed,
        )
        return TrainBatches(
            share,
            {
                **self._identity(),
                "stream_lanes": num_lanes,
                "stream_shuffle": options.block_documents,
            },
            partial(_lane_batches, options, share),
            workers=min(1, self._config.workers),
            prefetch=self._config.prefetch,
            # The parent has used pyarrow's threads, which a forked process would wait for.
            start_method="spawn",
        )

    def _num_lanes(self, global_batch_size: int) -> int:
        """As many lanes as are asked for, or the most that divide the batch and have files."""
        num_files, asked = int(self._rows.num_shards), self._config.stream_lanes
        if asked is None:
            most = min(MAX_DEFAULT_LANES, num_files, global_batch_size)
            return max(n for n in range(1, most + 1) if global_batch_size % n == 0)
        require(
            global_batch_size % asked == 0,
            f"stream-lanes {asked} does not divide the {counted(global_batch_size, 'sequence')} "
            "of a batch",
        )
        require(
            asked <= num_files,
            f"stream-lanes {asked}: the data has {counted(num_files, 'file')}; each lane needs one",
        )
        return asked

    def _describe_source(self) -> str:
        """SHA-256 over what decides which tokens there are: names and sizes, not contents."""
        files = [(path.name, path.stat().st_size) for path in self._source.paths]
        values = [
            files,
            [self._source.builder, self._source.config, self._config.split],
            [self._config.text_field, self._config.validation_fraction, self._config.seed],
            list(self._config.validation),
            self._tokenizer.describe(),
        ]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def _validation_tokens(self, num_tokens: int) -> TokenArray:
        """Held-out tokens: found once, by reading from the start of the data, and then cached."""
        words = self._config.validation
        own = resolve_validation(words, self._source) if words else None
        if isinstance(own, (PreparedFolder, ShardFiles)):
            return open_validation_shards(own)
        groups = [self._group] if own is None else groups_of(self._config, own, "all")
        key = hashlib.sha256(f"{self.fingerprint},{num_tokens}".encode()).hexdigest()[:32]
        folder = cache_folder(self._config)
        path = folder / f"validation-{key}.npy"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{path.name}.lock"):
                if not path.exists():
                    content = io.BytesIO()
                    np.save(content, self._read_validation(groups, num_tokens))
                    write_bytes(path, content.getvalue())
            tokens: Ids = np.load(path, allow_pickle=False)
            return tokens
        except OSError as error:
            raise InputError(f"cannot use the cache {path}: {error.strerror}") from error

    def _read_validation(self, groups: list[DocumentGroup], num_tokens: int) -> Ids:
        separator = np.array([self._tokenizer.separator_id])
        found: list[Ids] = []
        left = num_tokens
        for document in chain.from_iterable(DocumentReader(groups)):
            if document.part == "validation":
                found += [separator, *self._tokenizer.encode([document.text])]
                left -= 1 + len(found[-1])
                if left <= 0:
                    break
        return np.concatenate(found)[:num_tokens] if found else np.empty(0, dtype=np.int64)


def _lane_batches(
    options: LaneOptions, share: BatchShare, _: int, lane_states: dict[str, Any] | None
) -> Iterator[LoadedBatch]:
    """A rank's micro batches; the last of each step carries the positions of the rank's lanes."""
    lanes_per_rank = options.num_lanes // share.world_size
    first = share.rank * lanes_per_rank
    lanes = {
        str(number): Lane(options, number, state=(lane_states or {}).get(str(number)))
        for number in range(first, first + lanes_per_rank)
    }
    count = share.global_batch_size // options.num_lanes
    while True:
        rows = np.concatenate([lane.read(count) for lane in lanes.values()])
        *others, last = torch.from_numpy(rows).split(share.micro_batch_size)
        yield from map(LoadedBatch, others)
        states = {number: lane.state_dict() for number, lane in lanes.items()}
        yield LoadedBatch(last, source_state=states)
