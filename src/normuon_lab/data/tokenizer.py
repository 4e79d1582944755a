"""Tokenizers behind one interface: bytes, a `tokenizers` file, a transformers tokenizer, a trained
BPE.

Downloads only names that are neither a local path nor in the cache of the Hub.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from normuon_lab.errors import InputError, first_line, require

# They take a second to import, and reading bytes needs neither.
if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = npt.NDArray[np.int64]

BYTES = "bytes"
TOKENIZER_FILE = "tokenizer.json"

_KNOWN_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token numbers, without special tokens.

    Attributes:
        name: as the configuration calls it.
        vocab_size: numbers are below it.
        separator_id: the token that begins every document.
        backend: the tokenizer; None is bytes.
    """

    name: str
    vocab_size: int
    separator_id: int
    backend: Tokenizer | None = None

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of each text, int64."""
        if self.backend is None:
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int64) for one in encoded]

    def serialized(self) -> str:
        """The tokenizer as JSON of `tokenizers`."""
        backend = self.backend if self.backend is not None else byte_tokenizer()
        return str(backend.to_str(pretty=False))

    def describe(self) -> dict[str, Any]:
        """What a manifest records about the tokenizer."""
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "separator_id": self.separator_id,
            "sha256": hashlib.sha256(self.serialized().encode()).hexdigest(),
        }


def load_tokenizer(name: str, *, separator: str | None = None) -> TextTokenizer:
    """The tokenizer that a configuration names.

    Args:
        name: bytes, a JSON file of `tokenizers`, or what transformers' AutoTokenizer takes.
        separator: the token that begins a document; None finds the end-of-text token.

    Raises:
        InputError: it cannot be loaded, or has no such token.

    Example:
        >>> load_tokenizer("bytes").encode(["hé"])[0].tolist()
        [104, 195, 169]
    """
    if name == BYTES:
        require(separator is None, "separator: the tokenizer bytes has only byte 0; leave it out")
        return TextTokenizer(BYTES, 256, 0)
    path = Path(name)
    if path.suffix == ".json":
        require(path.exists(), f"tokenizer: no such file: {name}")
        return _from_file(name, path, separator)
    return _from_transformers(name, separator)


@dataclass(frozen=True, slots=True)
class HubAnswer:
    """Whether something must be asked of the Hugging Face Hub, and can be.

    Attributes:
        local_only: it is to be loaded from this machine.
        failure: one line that says why the Hub cannot be asked; None if it can be or need not be.
    """

    local_only: bool
    failure: str | None = None


def hub_answer(name: str, *, file: str) -> HubAnswer:
    """Ask the Hub once; not at all for files on this machine or if HF_HUB_OFFLINE is set.

    Its own client tries six times, with half a minute of waiting, before it gives up.

    Args:
        name: a folder, or a repository of the Hub.
        file: what is needed of it; if the Hub's cache has it, the cache is used.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if Path(name).exists():
        return HubAnswer(local_only=True)
    try:
        is_cached = isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError:
        return HubAnswer(True, f"there is no such file, and {name} is not a name of the Hub")
    if is_cached:
        return HubAnswer(local_only=True)
    if is_offline_mode():
        return HubAnswer(True, "it is not on this machine, and HF_HUB_OFFLINE is set")
    try:
        HfApi().model_info(name, timeout=10)
    except HfHubHTTPError:
        pass  # It answers, and loading shows what it says of the name.
    except Exception as error:  # Of whichever library it asks by.
        failure = "it is not on this machine, and the Hub cannot be reached"
        return HubAnswer(True, f"{failure}: {first_line(error)}")
    return HubAnswer(local_only=False)


def byte_tokenizer() -> Tokenizer:
    """A `tokenizers` tokenizer whose numbers are the bytes of the text in UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """A byte-level BPE made from `texts`: the 256 bytes and the merges of their commonest pairs.

    Texts are cut into words as GPT-2 does it. The same texts in the same order give the same
    tokenizer, on any number of threads. Byte 0 separates documents, as it does where tokens are
    bytes.

    Args:
        texts: what to count pairs in.
        vocab_size: tokens in all, at least 256.

    Raises:
        InputError: the texts have too few different words for as many tokens.

    Example:
        >>> bpe = train_bpe(["low lower lowest"] * 3, vocab_size=258)
        >>> bpe.backend.encode("low").tokens
        ['low']
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size()
    require(
        found == vocab_size,
        f"the text is too short for a BPE of {vocab_size} tokens: it has pairs for {found}; "
        "give more text or a smaller vocabulary",
    )
    zero = next(character for character, byte in _byte_characters().items() if byte == 0)
    return _with_backend(f"BPE of {vocab_size}", backend, zero)


def save_for_transformers(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write the files from which AutoTokenizer loads it; a transformers folder's are copied."""
    source = Path(tokenizer.name)
    if source.is_dir():
        for file in source.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "added_")):
                shutil.copy(file, folder / file.name)
        return
    from transformers import PreTrainedTokenizerFast

    if tokenizer.backend is None:
        # Byte 0 is an ordinary byte: made a special token, a text with it would not survive.
        saved = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())
    else:
        separator = tokenizer.backend.id_to_token(tokenizer.separator_id)
        saved = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend, eos_token=separator, bos_token=separator
        )
    saved.save_pretrained(folder)


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable character for every byte: Latin-1's own, and 256 onwards for the rest."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


def _from_file(name: str, path: Path, separator: str | None) -> TextTokenizer:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions.
        raise InputError(f"tokenizer: {name} is not a file of `tokenizers`: {error}") from error
    return _with_backend(name, backend, separator)


def _from_transformers(name: str, separator: str | None) -> TextTokenizer:
    from transformers import AutoTokenizer

    hub = hub_answer(name, file=TOKENIZER_FILE)
    try:
        loaded = AutoTokenizer.from_pretrained(name, local_files_only=hub.local_only)
    except (OSError, ValueError) as error:
        reason = hub.failure or first_line(error)
        raise InputError(
            f"tokenizer: {name} is neither bytes, a tokenizers file, nor a transformers tokenizer "
            f"that can be loaded: {reason}"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    require(backend is not None, f"tokenizer: {name} has no fast version in `tokenizers`")
    assert backend is not None
    # What transformers makes of a folder that has a model's configuration and no tokenizer.
    is_blank = backend.get_vocab_size() <= len(loaded.all_special_tokens)
    require(not is_blank, f"tokenizer: {name} holds no vocabulary")
    return _with_backend(name, backend, separator or loaded.eos_token)


def _with_backend(name: str, backend: Tokenizer, separator: str | None) -> TextTokenizer:
    # Said outright, because `tokenizers` otherwise warns whenever a process that has encoded is
    # forked; our forked processes load batches and never encode.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend.no_padding()
    backend.no_truncation()
    if separator is None:
        known = [token for token in _KNOWN_SEPARATORS if backend.token_to_id(token) is not None]
        require(
            bool(known),
            f"tokenizer: {name} does not say which token ends a text; name it as separator",
        )
        separator = known[0]
    separator_id = backend.token_to_id(separator)
    if separator_id is None:
        raise InputError(f"separator: {name} has no token {separator!r}")
    return TextTokenizer(name, backend.get_vocab_size(), int(separator_id), backend)
