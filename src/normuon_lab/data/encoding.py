"""Encodes documents as tokens, in one process or several, in the order of the documents."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any

import numpy as np

from normuon_lab.data.documents import PARTS, Document, Part
from normuon_lab.data.shards import Tokens
from normuon_lab.data.tokenizer import TextTokenizer
from normuon_lab.errors import RunsFailedError

MAX_PIECE_CHARACTERS = 1 << 20
"""Longer documents are tokenised piece by piece, cut at the ends of lines: a tokenizer takes 50
times the memory of its text."""

_BATCH_CHARACTERS = 1 << 20
_BATCHES_WITHOUT_PROCESSES = 8


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Pieces that are encoded together.

    Attributes:
        pieces: in order.
        position: the reader's after them; None within a document.
    """

    pieces: list[Document]
    position: dict[str, Any] | None

    @property
    def num_documents(self) -> int:
        """How many documents begin in them."""
        return sum(piece.is_start for piece in self.pieces)


def pieces_of(document: Document) -> Iterator[Document]:
    """The document whole, or cut at the ends of lines into pieces of about a million characters."""
    text, start = document.text, 0
    while start < len(text):
        stop = min(start + MAX_PIECE_CHARACTERS, len(text))
        if stop < len(text):
            line_end = text.rfind("\n", start, stop)
            stop = line_end + 1 if line_end >= start else stop
        yield Document(text[start:stop], document.part, is_start=start == 0)
        start = stop


def batches_of(rows: Iterable[tuple[list[Document], dict[str, Any]]]) -> Iterator[TextBatch]:
    """Pieces in batches of about a megabyte, so that sending them to processes pays."""
    pieces: list[Document] = []
    characters, position = 0, None
    for documents, position in rows:
        for piece in chain.from_iterable(map(pieces_of, documents)):
            if characters >= _BATCH_CHARACTERS:
                yield TextBatch(pieces, None)
                pieces, characters = [], 0
            pieces.append(piece)
            characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield TextBatch(pieces, position)
            pieces, characters = [], 0
    if pieces:
        yield TextBatch(pieces, position)


def encode_pieces(tokenizer: TextTokenizer, pieces: Sequence[Document]) -> dict[Part, Tokens]:
    """The pieces' tokens by part, uint16, the separator before every document."""
    encoded = tokenizer.encode([piece.text for piece in pieces])
    separator = np.array([tokenizer.separator_id])
    found: dict[Part, list[Any]] = {part: [] for part in PARTS}
    for piece, ids in zip(pieces, encoded, strict=True):
        if piece.is_start:
            found[piece.part].append(separator)
        found[piece.part].append(ids)
    return {
        part: np.concatenate(arrays).astype(np.uint16) if arrays else np.empty(0, np.uint16)
        for part, arrays in found.items()
    }


def encode_in_order(
    tokenizer: TextTokenizer, batches: Iterable[TextBatch], *, processes: int
) -> Iterator[tuple[TextBatch, dict[Part, Tokens]]]:
    """Every batch with its tokens, in order, whatever the number of processes.

    Raises:
        RunsFailedError: a process died.
    """
    batches = iter(batches)
    # Bytes are copied faster than they are sent, and a short text is done before processes start.
    needs_processes = processes > 1 and tokenizer.backend is not None
    for batch in islice(batches, _BATCHES_WITHOUT_PROCESSES if needs_processes else None):
        yield batch, encode_pieces(tokenizer, batch.pieces)
    first = next(batches, None)
    if first is None:
        return
    with ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer,),
    ) as pool:
        waiting: deque[tuple[TextBatch, Future[dict[Part, Tokens]]]] = deque()
        try:
            for batch in chain([first], batches):
                waiting.append((batch, pool.submit(_encode_in_worker, batch.pieces)))
                if len(waiting) > 2 * processes:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise RunsFailedError(
                "a tokenising process died, perhaps out of memory: run the same "
                "command again, with fewer processes"
            ) from error
        finally:
            for _, future in waiting:
                future.cancel()


_worker_tokenizer: TextTokenizer | None = None


def _start_worker(tokenizer: TextTokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    # The parent ends its workers; Ctrl-C reaches them too and would print their tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One thread each: there are as many processes as cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_in_worker(pieces: list[Document]) -> dict[Part, Tokens]:
    assert _worker_tokenizer is not None
    return encode_pieces(_worker_tokenizer, pieces)
