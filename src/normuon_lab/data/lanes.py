"""One lane of a stream: sequences of tokens from every n-th file, from any saved position.

A lane reads rows in blocks and shuffles each block separately, so that a position is three numbers:
a block, a document in it and a token in that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from normuon_lab.data.documents import DocumentGroup
from normuon_lab.data.sequences import EpochOrder
from normuon_lab.data.tokenizer import Ids, TextTokenizer
from normuon_lab.errors import require

if TYPE_CHECKING:
    from datasets import IterableDataset

_ORDERS_PER_EPOCH = 1 << 32
"""Blocks of an epoch have permutations of their own, numbered below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneOptions:
    """How every lane of a stream reads.

    Attributes:
        group: what is read.
        rows: of all lanes; a lane takes its files.
        tokenizer: makes them tokens.
        num_lanes: how many lanes read side by side.
        block_documents: documents that are shuffled among themselves; 1 keeps their order.
        sequence_length: T, the tokens a sequence feeds to the model.
        seed: decides the order within blocks.
    """

    group: DocumentGroup
    rows: IterableDataset
    tokenizer: TextTokenizer
    num_lanes: int
    block_documents: int
    sequence_length: int
    seed: int


@dataclass(slots=True)
class _OpenDocument:
    """A document with tokens left, and its position: block, rows before it, place."""

    position: dict[str, Any]
    tokens: Ids
    taken: int


class Lane:
    """Sequences of one lane, without end: epochs follow each other."""

    def __init__(
        self, options: LaneOptions, lane: int, *, state: dict[str, Any] | None = None
    ) -> None:
        self._options = options
        self._lane = lane
        self._open: deque[_OpenDocument] = deque()
        self._start = state or {"epoch": 0, "block": 0, "rows": None, "place": 0, "taken": 0}
        self._documents = self._read_documents()

    def read(self, count: int) -> Ids:
        """The next sequences, ``[count, T + 1]``.

        Each begins with the last token of the one before.

        Raises:
            InputError: the data cannot be read, or the lane has no documents.
        """
        return np.stack([self._next_sequence() for _ in range(count)])

    def state_dict(self) -> dict[str, Any]:
        """The position of the next sequence, in plain values."""
        if not self._open:
            return dict(self._start)
        head = self._open[0]
        return {**head.position, "taken": head.taken}

    def _next_sequence(self) -> Ids:
        length = self._options.sequence_length
        available = sum(len(one.tokens) - one.taken for one in self._open)
        while available <= length:
            document = next(self._documents)
            self._open.append(document)
            available += len(document.tokens) - document.taken
        pieces = []
        wanted = length
        while wanted:
            head = self._open[0]
            piece = head.tokens[head.taken : head.taken + wanted]
            pieces.append(piece)
            head.taken += len(piece)
            wanted -= len(piece)
            if head.taken == len(head.tokens):
                self._open.popleft()
        # The last target is the next sequence's first input.
        head = self._open[0]
        pieces.append(head.tokens[head.taken : head.taken + 1])
        return np.concatenate(pieces)

    def _read_documents(self) -> Iterator[_OpenDocument]:
        options, taken = self._options, self._start["taken"]
        first = self._start["place"]
        for epoch, number, rows_state, texts in self._blocks():
            order = EpochOrder(
                max(1, len(texts)),
                seed=options.seed,
                epoch=epoch * _ORDERS_PER_EPOCH + number * options.num_lanes + self._lane,
            )(np.arange(len(texts)))
            for place in range(first, len(texts)):
                (ids,) = options.tokenizer.encode([texts[int(order[place])]])
                tokens = np.concatenate([[options.tokenizer.separator_id], ids])
                position = {"epoch": epoch, "block": number, "rows": rows_state, "place": place}
                yield _OpenDocument(position, tokens, taken)
                taken = 0
            first = 0

    def _blocks(self) -> Iterator[tuple[int, int, dict[str, Any] | None, list[str]]]:
        """Blocks of training texts from the starting position on, epoch after epoch.

        Each with its epoch, its number in it, and the state of the rows where it begins.
        """
        options = self._options
        epoch, number, state = self._start["epoch"], self._start["block"], self._start["rows"]
        while True:
            with options.group.readable():
                rows = options.rows.shard(num_shards=options.num_lanes, index=self._lane)
                if state is not None:
                    rows.load_state_dict(state)
                training_texts = (
                    document.text
                    for row in rows
                    for document in options.group.documents(row)
                    if document.part == "train"
                )
                while texts := list(islice(training_texts, options.block_documents)):
                    yield epoch, number, state, texts
                    number, state = number + 1, rows.state_dict()
            require(
                number > 0,
                f"lane {self._lane} of {options.num_lanes} of the stream has no documents; give "
                "fewer stream_lanes",
            )
            epoch, number, state = epoch + 1, 0, None
