"""Opens the data that a configuration names.

Text is tokenised first, once, into a cache; shards are read as they are; streams are tokenised
while training reads them.
"""

from __future__ import annotations

from normuon_lab.data.batches import PretrainData
from normuon_lab.data.config import DataConfig
from normuon_lab.data.shard_data import ShardData, open_folder, open_shards, prepare_in_cache
from normuon_lab.data.sources import Stream, TextFiles, resolve_source
from normuon_lab.data.stream_data import StreamData
from normuon_lab.errors import require


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
