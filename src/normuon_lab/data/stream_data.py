"""Batches from a stream: rows of the Hub or of local files, tokenised while training reads them.

A step's sequences come in equal parts from a fixed number of lanes, and a rank reads whole lanes.
So two ranks never read the same row, the steps are the same on any number of ranks that divides the
lanes, and a position is one small record per lane.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from normuon_lab.atomic_files import write_bytes
from normuon_lab.data.batches import BatchShare, LoadedBatch, PretrainData, TrainBatches
from normuon_lab.data.config import DataConfig
from normuon_lab.data.documents import DocumentGroup, DocumentReader, groups_of
from normuon_lab.data.lanes import Lane, LaneOptions
from normuon_lab.data.sequences import TokenArray
from normuon_lab.data.shard_data import cache_folder, open_validation_shards
from normuon_lab.data.sources import PreparedFolder, ShardFiles, Stream, resolve_validation
from normuon_lab.data.tokenizer import Ids, load_tokenizer
from normuon_lab.errors import InputError, counted, require

MAX_DEFAULT_LANES = 64


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
