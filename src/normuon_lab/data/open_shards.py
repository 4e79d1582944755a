"""Opens the shards that a configuration names; text is tokenised into shards first, in a cache."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from normuon_lab.data.config import DataConfig
from normuon_lab.data.documents import PARTS
from normuon_lab.data.prepare import PrepareRequest, describe_job, prepare, read_manifest
from normuon_lab.data.shards import TokenShards
from normuon_lab.data.sources import PreparedFolder, ShardFiles, TextFiles, resolve_source
from normuon_lab.data.tokenizer import BYTES, load_tokenizer
from normuon_lab.errors import require
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
        "the training data is .bin shards and the validation data text: prepare both",
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
