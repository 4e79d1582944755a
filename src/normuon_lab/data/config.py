"""The data of a run, as one frozen and validated value.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from normuon_lab.errors import require

MAX_PROCESSES = 1024
"""A typing error should not start more processes than a machine can hold."""
DEFAULT_SHARD_TOKENS = 100_000_000
"""Tokens in a shard, modded-nanogpt's number: files of 200 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The text a run trains on, and how it becomes sequences of tokens."""

    source: tuple[str, ...] = ("stdlib",)
    """What to train on: stdlib (the running Python's library); text, jsonl or parquet files, by
    path or glob; a folder that `normuon data prepare` wrote, or other .bin shards;
    hub:NAME[:CONFIG], a data set of the Hugging Face Hub, streamed; stream:GLOB, local files,
    streamed."""
    validation: tuple[str, ...] = ()
    """Another source for validation, as above. Without it a part of `source` is held out."""
    validation_fraction: float = 0.02
    """Share of the documents to hold out if there is no `validation`: by the hash of their text; of
    a single text file the last part, of shards without a manifest the last tokens."""
    tokenizer: str = "bytes"
    """bytes (256 tokens, nothing to download), a `tokenizers` JSON file, or the folder or Hub name
    of a transformers tokenizer. Prepared folders bring their own."""
    separator: str | None = None
    """Token that begins every document; by default the tokenizer's end of text, and byte 0."""
    text_field: str = "text"
    """Field of jsonl, parquet and Hub rows that holds the text."""
    split: str = "train"
    """Split of a Hub data set."""
    vocab_size: int | None = None
    """Size of the vocabulary of .bin shards without a manifest: 50257 for GPT-2's."""
    seed: int = 0
    """Decides which documents are held out. The order of training follows the seed of the run."""
    cache: str | None = None
    """Folder for tokenised text; by default normuon/data in $XDG_CACHE_HOME or ~/.cache."""
    processes: int | None = None
    """Processes that tokenise text before training; by default as many as cores."""
    workers: int = 1
    """Processes that load batches during training; 0 loads them in the training process."""
    prefetch: int = 4
    """Batches that each of them has ready."""
    stream_lanes: int | None = None
    """Streams only: how many streams are read side by side, which bounds the number of ranks; it
    must divide the sequences of a step, and the data needs as many files. By default the largest
    such number up to 64."""
    stream_shuffle: int = 256
    """Streams only: documents of each lane that are shuffled among themselves; 0 keeps their
    order."""

    def __post_init__(self) -> None:
        require(len(self.source) > 0, "the data source is empty: give stdlib or files")
        require(
            0.0 < self.validation_fraction < 1.0,
            f"validation-fraction {self.validation_fraction}: give a number between 0 and 1",
        )
        for name, least in (
            *(("seed", 0), ("workers", 0), ("prefetch", 1), ("stream_shuffle", 0)),
            *(("vocab_size", 1), ("processes", 1), ("stream_lanes", 1)),
        ):
            value = getattr(self, name)
            is_enough = value is None or value >= least
            require(is_enough, f"{name.replace('_', '-')} {value}: give at least {least}")
        for name in ("workers", "processes"):
            value = getattr(self, name)
            is_few = value is None or value <= MAX_PROCESSES
            require(is_few, f"{name} {value}: give at most {MAX_PROCESSES:,}")
