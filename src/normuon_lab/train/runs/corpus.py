"""Text on this machine as two disjoint token arrays, train and validation, and a digest.

Tokens are the bytes of the text, or those of a BPE made from its training part. Nothing is
downloaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from normuon_lab.data.sources import shakespeare_documents, stdlib_documents
from normuon_lab.data.tokenizer import train_bpe
from normuon_lab.errors import InputError, counted, require
from normuon_lab.train.runs.config import NUM_BYTES, Experiment, check_tokenizer

# The text is read and checked before anything slow starts, and importing torch takes seconds.
if TYPE_CHECKING:
    from torch import Tensor

    from normuon_lab.data.sequences import SequenceReader

Tokens = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
"""A text, ``[num_tokens]``."""

# One document in ten, or the last tenth of a single document, is held out.
VALIDATION_SHARE = 10
END_OF_DOCUMENT = b"\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Token arrays and where they came from.

    `train` and `validation` share no document, or, for a single file, no line.

    Attributes:
        digest: SHA-256 of the text, whatever its tokens.
        train_bytes_per_token: bytes of the training text over its tokens, to convert losses to nats
            per byte.
        validation_bytes_per_token: the same of the held-out text.
    """

    name: str
    train: Tokens
    validation: Tokens
    digest: str
    num_train_documents: int
    num_validation_documents: int
    tokenizer: str = "bytes"
    vocab_size: int = NUM_BYTES
    train_bytes_per_token: float = 1.0
    validation_bytes_per_token: float = 1.0

    def train_batches(
        self, experiment: Experiment, *, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of each step, both int64 `[batch, sequence]`, without end.

        They depend on the seed alone, so that all arms see the same.
        """
        from normuon_lab.data.sequences import example_order, inputs_and_targets

        reader = self._reader(self.train, experiment)
        order = example_order(len(reader), batch_size=experiment.training.batch_size, seed=seed)
        return (inputs_and_targets(reader.read(chosen)) for chosen in order)

    def held_out(self, experiment: Experiment, *, seed: int) -> list[tuple[Tensor, Tensor]]:
        """The batches that every evaluation reads, the same for every seed."""
        from normuon_lab.data.sequences import ValidationBatches, inputs_and_targets

        batches = ValidationBatches(
            self._reader(self.validation, experiment),
            num_sequences=experiment.training.eval_tokens // experiment.model.sequence_length,
            batch_size=experiment.training.batch_size,
        )
        return [inputs_and_targets(tokens) for tokens in batches]

    def _reader(self, tokens: Tokens, experiment: Experiment) -> SequenceReader:
        from normuon_lab.data.sequences import SequenceReader

        return SequenceReader(
            tokens,
            sequence_length=experiment.model.sequence_length,
            vocab_size=self.vocab_size,
        )

    def to_json(self) -> dict[str, Any]:
        """What results record of the text: everything but the text."""
        return {
            "name": self.name,
            "sha256": self.digest,
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "train_tokens": int(self.train.size),
            "validation_tokens": int(self.validation.size),
            "train_bytes_per_token": self.train_bytes_per_token,
            "validation_bytes_per_token": self.validation_bytes_per_token,
            "train_documents": self.num_train_documents,
            "validation_documents": self.num_validation_documents,
        }


def load_corpus(
    sources: Sequence[str], *, tokenizer: str = "bytes", vocab_size: int = NUM_BYTES
) -> Corpus:
    """Read the text that `--data` names.

    Args:
        sources: `("stdlib",)`, `("shakespeare",)`, or paths of text files.
        tokenizer: bytes, or bpe: made from the training documents, never from those held out.
        vocab_size: how many tokens the BPE has; 256 for bytes.

    Returns:
        The corpus; uint8 tokens for bytes, uint16 for a BPE. Several documents are split by
        document, a single one at a line near its end.

    Raises:
        InputError: a file is missing, unreadable or empty, an optional package is absent, or the
            text is not UTF-8 or too short for the BPE.

    Example:
        >>> corpus = load_corpus(["stdlib"])
        >>> corpus.train.size > 5 * corpus.validation.size
        True
    """
    check_tokenizer(tokenizer, vocab_size=vocab_size)
    name, documents = _read(sources)
    train, validation, end = _split(documents)
    with_ends = [[text + end for text in part] for part in (train, validation)]
    if tokenizer == "bytes":
        arrays = [np.frombuffer(b"".join(part), dtype=np.uint8) for part in with_ends]
    else:
        bpe = train_bpe(_decoded(train, name), vocab_size=vocab_size)
        arrays = [
            np.concatenate(bpe.encode(_decoded(part, name))).astype(np.uint16) for part in with_ends
        ]
    # The held-out end of a very short text is empty; `check_lengths` refuses it.
    bytes_per_token = [
        sum(map(len, part)) / max(tokens.size, 1)
        for part, tokens in zip(with_ends, arrays, strict=True)
    ]
    return Corpus(
        name=name,
        train=arrays[0],
        validation=arrays[1],
        digest=_digest(documents),
        num_train_documents=len(train),
        num_validation_documents=len(validation),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        train_bytes_per_token=bytes_per_token[0],
        validation_bytes_per_token=bytes_per_token[1],
    )


def _read(sources: Sequence[str]) -> tuple[str, list[tuple[str, bytes]]]:
    """The name of the text, and its documents with their names, in the order of the names."""
    require(len(sources) > 0, "--data names nothing: give stdlib, shakespeare or text files")
    packaged = {
        "stdlib": ("Python standard library", stdlib_documents),
        "shakespeare": ("Shakespeare", shakespeare_documents),
    }
    if len(sources) == 1 and sources[0] in packaged:
        shown, read = packaged[sources[0]]
        documents = list(read())
        require(bool(documents), f"no text was found for {shown}")
        return shown, sorted(documents)
    texts = [_read_text_file(source) for source in sources]
    paths = [Path(source).resolve() for source in sources]
    require(len(set(paths)) == len(paths), "--data names the same file twice")
    # Relative to their common folder, so that the split and the digest are the same elsewhere.
    folder = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(folder).as_posix() for path in paths]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return shown, sorted(zip(names, texts, strict=True))


def check_lengths(corpus: Corpus, experiment: Experiment) -> None:
    """Raise `InputError` unless the text fills one training batch and the validation batches."""
    length = experiment.model.sequence_length
    # One token more than the windows hold: the last target.
    train_need = experiment.training.batch_size * length + 1
    validation_need = experiment.training.eval_tokens // length * length + 1
    require(
        corpus.validation.size >= validation_need,
        f"the text is too short: its validation part has "
        f"{counted(corpus.validation.size, 'token')} and one "
        f"evaluation reads {validation_need}; give more text or a smaller --eval-tokens",
    )
    require(
        corpus.train.size >= train_need,
        f"the text is too short: its training part has {counted(corpus.train.size, 'token')} and "
        f"one batch reads {train_need}; give more text or a smaller --batch-size",
    )


def _split(documents: list[tuple[str, bytes]]) -> tuple[list[bytes], list[bytes], bytes]:
    """The texts to train on, those held out, and what ends each of them.

    Several documents are split by document, a single one at a line near its end.
    """
    if len(documents) > 1:
        held_out = _held_out_names([name for name, _ in documents])
        return (
            [text for name, text in documents if name not in held_out],
            [text for name, text in documents if name in held_out],
            END_OF_DOCUMENT,
        )
    ((_, text),) = documents
    cut = len(text) - len(text) // VALIDATION_SHARE
    line_end = text.find(b"\n", cut)
    # A text without line breaks is cut where the share falls.
    cut = line_end + 1 if 0 <= line_end < len(text) - 1 else cut
    return [text[:cut]], [text[cut:]], b""


def _held_out_names(names: Sequence[str]) -> set[str]:
    """The documents of the validation set: by hash, so that adding a file moves no other."""

    def rank(name: str) -> int:
        return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)

    held_out = {name for name in names if rank(name) % VALIDATION_SHARE == 0}
    if not held_out or len(held_out) == len(names):
        held_out = {min(names, key=rank)}
    return held_out


def _decoded(documents: Sequence[bytes], name: str) -> list[str]:
    try:
        return [document.decode() for document in documents]
    except UnicodeDecodeError as error:
        raise InputError(
            f"--data: {name} is not UTF-8 ({error.reason}), which --tokenizer bpe needs: "
            "take --tokenizer bytes"
        ) from error


def _digest(documents: Sequence[tuple[str, bytes]]) -> str:
    """SHA-256 over every document's name, length and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, text in documents:
        digest.update(f"{name}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()


def _read_text_file(source: str) -> bytes:
    path = Path(source)
    require(path.exists(), f"--data: no such file: {source}")
    require(not path.is_dir(), f"--data: {source} is a directory; give the text files themselves")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"--data: cannot read {source}: {error.strerror}") from error
    require(bool(text.strip()), f"--data: {source} is empty")
    return text
