"""Which tokenizer the tokens of a run were made with."""

from __future__ import annotations

from tokenizers import Tokenizer

from normuon_lab.data.config import DataConfig
from normuon_lab.data.prepare import read_manifest
from normuon_lab.data.sources import PreparedFolder, ShardFiles, resolve_source
from normuon_lab.data.tokenizer import BYTES, TOKENIZER_FILE, TextTokenizer, load_tokenizer
from normuon_lab.errors import InputError


def tokenizer_of_run(config: DataConfig) -> TextTokenizer | None:
    """The tokenizer of a run's data; None for shards that nobody named one for.

    Raises:
        InputError: the data is not there any more, and its tokenizer with it.
    """
    try:
        source = resolve_source(config.source)
    except InputError as error:
        raise InputError(
            f"the run's data says which tokenizer it has, and cannot be found: {error}; name the "
            "tokenizer"
        ) from error
    if isinstance(source, PreparedFolder):
        described = read_manifest(source.folder)["tokenizer"]
        if described["name"] == BYTES:
            return load_tokenizer(BYTES)
        path = source.folder / TOKENIZER_FILE
        backend = Tokenizer.from_file(str(path))
        return TextTokenizer(
            str(path), int(described["vocab_size"]), int(described["separator_id"]), backend
        )
    if isinstance(source, ShardFiles) and config.tokenizer == BYTES:
        return None
    return load_tokenizer(config.tokenizer, separator=config.separator)
