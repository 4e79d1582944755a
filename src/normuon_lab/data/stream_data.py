"""Batches from a stream: rows of the Hub or of local files, tokenised while training reads them.

A step's sequences come in equal parts from a fixed number of lanes, and a rank reads whole lanes.
So no row is read by two ranks, the steps are the same on any number of ranks that divides the
lanes, and a position is one small record per lane.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from normuon_lab.atomic_files import write_bytes
from normuon_lab.data.batches import (
    BatchShare,
    LoadedBatch,
    PretrainData,
    TrainBatches,
    make_loader,
)
from normuon_lab.data.config import DataConfig
from normuon_lab.data.documents import (
    DocumentGroup,
    DocumentReader,
    HoldOut,
    groups_of,
    open_rows,
    readable,
)
from normuon_lab.data.lanes import Lane, StreamOptions
from normuon_lab.data.sequences import ArrayTokens, SequenceReader, TokenArray, ValidationBatches
from normuon_lab.data.shard_data import cache_folder, open_validation_shards
from normuon_lab.data.sources import PreparedFolder, ShardFiles, Stream, resolve_source
from normuon_lab.data.tokenizer import Ids, load_tokenizer
from normuon_lab.errors import InputError, counted, require

if TYPE_CHECKING:
    from datasets import IterableDataset

MAX_DEFAULT_LANES = 64


class StreamData(PretrainData):
    """Data that is tokenised while it is read."""

    def __init__(
        self, config: DataConfig, source: Stream, *, sequence_length: int, seed: int
    ) -> None:
        self._config = config
        self._source = source
        self._sequence_length = sequence_length
        self._tokenizer = load_tokenizer(config.tokenizer, separator=config.separator)
        self.vocab_size = self._tokenizer.vocab_size
        (self._group,) = groups_of(source, config.split, _hold_out(config))
        self._options = StreamOptions(
            group=self._group,
            tokenizer=self._tokenizer,
            text_field=config.text_field,
            block_documents=max(1, config.stream_shuffle),
            held_out_fraction=config.validation_fraction,
            split_seed=config.seed,
            seed=seed,
        )
        with readable(self._group):
            self._rows = open_rows(self._group)
            self._fingerprint = self._describe_source()

    def describe(self) -> dict[str, Any]:
        return {
            "source": list(self._config.source),
            "kind": "stream",
            "tokenizer": self._tokenizer.name,
            "vocab_size": self.vocab_size,
            "fingerprint": self._fingerprint,
            "sequence_length": self._sequence_length,
            "files": self._rows.num_shards,
        }

    def train_batches(
        self, *, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
    ) -> TrainBatches:
        share = BatchShare(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        num_lanes = self._num_lanes(global_batch_size)
        require(
            num_lanes % world_size == 0,
            f"the stream has {counted(num_lanes, 'lane')}, which {world_size} data-parallel ranks "
            "cannot share evenly; give other --data.stream-lanes or batch, or prepare the data "
            "(normuon "
            "data prepare), which any number of ranks can read",
        )
        return StreamBatches(
            self._options,
            self._rows,
            share,
            num_lanes=num_lanes,
            sequence_length=self._sequence_length,
            identity={
                "kind": "stream",
                "fingerprint": self._fingerprint,
                "sequence_length": self._sequence_length,
                "seed": self._options.seed,
                "stream_lanes": num_lanes,
                "stream_shuffle": self._options.block_documents,
            },
            workers=min(1, self._config.workers),
            prefetch=self._config.prefetch,
        )

    def validation_batches(
        self, *, tokens: int, batch_size: int, rank: int, world_size: int
    ) -> Iterable[Tensor]:
        num_sequences = tokens // self._sequence_length
        reader = SequenceReader(
            self._validation_tokens(num_sequences * self._sequence_length + 1),
            sequence_length=self._sequence_length,
            vocab_size=self.vocab_size,
        )
        return ValidationBatches(
            reader,
            num_sequences=num_sequences,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
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
        own = resolve_source(self._config.validation) if self._config.validation else None
        if isinstance(own, (PreparedFolder, ShardFiles)):
            return open_validation_shards(own)
        groups = [self._group] if own is None else groups_of(own, self._config.split, "all")
        key = hashlib.sha256(f"{self._fingerprint},{num_tokens}".encode()).hexdigest()[:32]
        folder = cache_folder(self._config)
        path = folder / f"validation-{key}.npy"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{path.name}.lock"):
                if not path.exists():
                    content = io.BytesIO()
                    np.save(content, self._read_validation(groups, num_tokens))
                    write_bytes(path, content.getvalue())
            return ArrayTokens(np.load(path, allow_pickle=False))
        except OSError as error:
            raise InputError(f"cannot use the cache {path}: {error.strerror}") from error

    def _read_validation(self, groups: list[DocumentGroup], num_tokens: int) -> Ids:
        reader = DocumentReader(
            groups,
            text_field=self._config.text_field,
            fraction=self._config.validation_fraction,
            seed=self._config.seed,
        )
        separator = np.array([self._tokenizer.separator_id])
        found: list[Ids] = []
        left = num_tokens
        for document in chain.from_iterable(reader):
            if document.part == "validation":
                found += [separator, *self._tokenizer.encode([document.text])]
                left -= 1 + len(found[-1])
                if left <= 0:
                    break
        return np.concatenate(found)[:num_tokens] if found else np.empty(0, dtype=np.int64)


class StreamBatches(TrainBatches):
    """Training batches from the lanes of a stream.

    With several ranks `state_dict` is a collective of the default process group: each rank knows
    its own lanes.
    """

    def __init__(
        self,
        options: StreamOptions,
        rows: IterableDataset,
        share: BatchShare,
        *,
        num_lanes: int,
        sequence_length: int,
        identity: dict[str, Any],
        workers: int,
        prefetch: int,
    ) -> None:
        super().__init__(share, identity)
        self._workers = workers
        self._prefetch = prefetch
        self._steps = _StreamSteps(options, rows, share, num_lanes, sequence_length)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.share.world_size > 1 and state["source"] is not None:
            by_rank: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(by_rank, state["source"])
            state["source"] = {lane: one for lanes in by_rank for lane, one in lanes.items()}
        return state

    def _make_loader(self, first_sequence: int, source_state: Any) -> StatefulDataLoader[Any]:
        return make_loader(
            replace(self._steps, lane_states=source_state),
            workers=self._workers,
            prefetch=self._prefetch,
            # The parent has used pyarrow's threads, which a forked process would wait for.
            start_method="spawn",
            batch_size=None,
        )


@dataclass(frozen=True, eq=False)
class _StreamSteps(torch.utils.data.IterableDataset[LoadedBatch]):
    """A rank's micro batches; the last of each step carries the positions of the rank's lanes."""

    options: StreamOptions
    rows: IterableDataset
    share: BatchShare
    num_lanes: int
    sequence_length: int
    lane_states: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[LoadedBatch]:
        try:
            yield from self._micro_batches()
        except InputError as error:
            yield LoadedBatch(None, str(error))

    def _micro_batches(self) -> Iterator[LoadedBatch]:
        share = self.share
        lanes_per_rank = self.num_lanes // share.world_size
        first = share.rank * lanes_per_rank
        lanes = {
            str(number): Lane(
                self.options,
                self.rows,
                lane=number,
                num_lanes=self.num_lanes,
                sequence_length=self.sequence_length,
                state=self.lane_states[str(number)] if self.lane_states else None,
            )
            for number in range(first, first + lanes_per_rank)
        }
        count = share.global_batch_size // self.num_lanes
        while True:
            rows = np.concatenate([lane.read(count) for lane in lanes.values()])
            micro_batches = torch.from_numpy(rows).split(share.micro_batch_size)
            for tokens in micro_batches[:-1]:
                yield LoadedBatch(tokens)
            states = {number: lane.state_dict() for number, lane in lanes.items()}
            yield LoadedBatch(micro_batches[-1], source_state=states)


def _hold_out(config: DataConfig) -> HoldOut:
    return "none" if config.validation else "by_hash"
