"""One lane of a stream: sequences of tokens from every n-th file, from any saved position.

A lane reads rows in blocks and shuffles each block by a permutation of its own, so that a position
is a block, a document in it and a token in that: nothing has to be stored but numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from normuon_lab.data.documents import DocumentGroup, is_held_out, readable, text_of
from normuon_lab.data.sequences import EpochOrder
from normuon_lab.data.tokenizer import Ids, TextTokenizer
from normuon_lab.errors import require

if TYPE_CHECKING:
    from datasets import IterableDataset

_ORDERS_PER_EPOCH = 1 << 32
"""Blocks of an epoch have permutations of their own, numbered below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """How every lane of a stream reads.

    Attributes:
        group: the rows.
        tokenizer: makes them tokens.
        text_field: the rows' field of text.
        block_documents: documents that are shuffled among themselves; 1 keeps their order.
        held_out_fraction: share of the documents that a ``by_hash`` group holds out.
        split_seed: decides which documents are held out.
        seed: decides the order within blocks.
    """

    group: DocumentGroup
    tokenizer: TextTokenizer
    text_field: str
    block_documents: int
    held_out_fraction: float
    split_seed: int
    seed: int

    def is_for_training(self, text: str) -> bool:
        """Whether a document is not held out."""
        return self.group.hold_out != "by_hash" or not is_held_out(
            text, fraction=self.held_out_fraction, seed=self.split_seed
        )


@dataclass(slots=True)
class _Block:
    """Rows that are shuffled among themselves, and where they begin."""

    epoch: int
    number: int
    rows_state: dict[str, Any] | None
    texts: list[str]


@dataclass(slots=True)
class _OpenDocument:
    """A document of which some tokens are left."""

    block: _Block
    place: int
    tokens: Ids
    taken: int


class Lane:
    """Sequences of one lane, without end: epochs follow each other.

    Args:
        options: how to read.
        rows: the whole data set.
        lane: number of this lane.
        num_lanes: how many lanes read the data set side by side.
        sequence_length: T, the tokens a sequence feeds to the model.
        state: what `state_dict` gave; None begins.
    """

    def __init__(
        self,
        options: StreamOptions,
        rows: IterableDataset,
        *,
        lane: int,
        num_lanes: int,
        sequence_length: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._options = options
        self._all_rows = rows
        self._lane = lane
        self._num_lanes = num_lanes
        self._length = sequence_length
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
        return {
            "epoch": head.block.epoch,
            "block": head.block.number,
            "rows": head.block.rows_state,
            "place": head.place,
            "taken": head.taken,
        }

    def _next_sequence(self) -> Ids:
        available = sum(len(one.tokens) - one.taken for one in self._open)
        while available <= self._length:
            document = next(self._documents)
            self._open.append(document)
            available += len(document.tokens) - document.taken
        pieces = []
        wanted = self._length
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
        place, taken = self._start["place"], self._start["taken"]
        for block in self._blocks():
            order = EpochOrder(
                max(1, len(block.texts)),
                seed=self._options.seed,
                epoch=block.epoch * _ORDERS_PER_EPOCH + block.number * self._num_lanes + self._lane,
            )(np.arange(len(block.texts)))
            for number in range(place, len(block.texts)):
                tokens = self._tokens(block.texts[int(order[number])])
                yield _OpenDocument(block, number, tokens, taken)
                taken = 0
            place = 0

    def _tokens(self, text: str) -> Ids:
        (ids,) = self._options.tokenizer.encode([text])
        return np.concatenate([[self._options.tokenizer.separator_id], ids])

    def _blocks(self) -> Iterator[_Block]:
        """Blocks of training documents from the starting position on, epoch after epoch."""
        epoch, number, state = self._start["epoch"], self._start["block"], self._start["rows"]
        while True:
            with readable(self._options.group):
                rows = self._all_rows.shard(num_shards=self._num_lanes, index=self._lane)
                if state is not None:
                    rows.load_state_dict(state)
                for texts, state_after in self._row_blocks(rows):
                    yield _Block(epoch, number, state, texts)
                    number, state = number + 1, state_after
            require(
                number > 0,
                f"lane {self._lane} of {self._num_lanes} of the stream has no documents; give "
                "fewer stream_lanes",
            )
            epoch, number, state = epoch + 1, 0, None

    def _row_blocks(self, rows: IterableDataset) -> Iterator[tuple[list[str], dict[str, Any]]]:
        texts: list[str] = []
        for row in rows:
            text = text_of(self._options.group, row, self._options.text_field)
            if text.strip() and self._options.is_for_training(text):
                texts.append(text)
            if len(texts) == self._options.block_documents:
                yield texts, rows.state_dict()
                texts = []
        if texts:
            yield texts, rows.state_dict()
