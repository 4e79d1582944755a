"""Reads documents in order through `datasets`, and holds some out.

Every reader streams: nothing is copied into a cache of `datasets`, and a position can be saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normuon_lab.data.config import DataConfig
from normuon_lab.data.sources import Stream, TextFiles, builder_of, resolve_validation
from normuon_lab.errors import InputError, counted, first_line, require

# Importing `datasets` takes seconds.
if TYPE_CHECKING:
    from datasets import IterableDataset

Part = Literal["train", "validation"]
PARTS: tuple[Part, ...] = ("train", "validation")

HoldOut = Literal["none", "all", "by_hash", "tail"]
"""Which documents of a group are held out: none, all, those whose hash says so, or the last part
of the only one."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the part of the data it belongs to; or one of the pieces of a long text.

    Attributes:
        text: the text.
        part: the part of the data it belongs to.
        is_start: whether the separator comes before it; not before the pieces after the first.
    """

    text: str
    part: Part
    is_start: bool = True


@dataclass(frozen=True, slots=True)
class DocumentGroup:
    """Rows that one builder of `datasets` reads.

    Attributes:
        source: the builder, and where its rows are.
        config: how rows become documents, and how many are held out.
        hold_out: which of them are for validation.
    """

    source: Stream
    config: DataConfig
    hold_out: HoldOut

    def open(self) -> IterableDataset:
        """Opens the rows as a streaming data set.

        Raises:
            InputError: all its files are empty.
        """
        import datasets

        datasets.disable_progress_bars()
        builder, paths = self.source.builder, self.source.paths
        options: dict[str, Any] = {"split": self.config.split}
        if paths:
            # An empty file among others ends the reading of those after it.
            filled = [str(path.resolve()) for path in paths if path.stat().st_size]
            require(bool(filled), f"no text was found in {', '.join(map(str, paths))}")
            options = {"data_files": filled, "split": "train"}
        if builder == "text":
            options["sample_by"] = "document"
        try:
            rows = datasets.load_dataset(builder, self.source.config, streaming=True, **options)
        except StopIteration:  # What its reader of JSON makes of compressed files without a row.
            files = ", ".join(map(str, paths))
            raise InputError(f"no text was found in {files}, or not in the first of them") from None
        assert isinstance(rows, datasets.IterableDataset)
        return rows

    def documents(self, row: dict[str, Any]) -> list[Document]:
        """A row's text, if it has one, in the part of the data it belongs to; or in both.

        Raises:
            InputError: the row lacks the field.
        """
        field = "text" if self.source.builder == "text" else self.config.text_field
        text = row.get(field)
        if not isinstance(text, str):
            raise InputError(
                f"rows of {self._label()} have no text in the field {field!r}: they have "
                f"{', '.join(row)}; name another text_field"
            )
        if not text.strip():
            return []
        fraction = self.config.validation_fraction
        if self.hold_out == "tail":
            cut = _tail_start(text, fraction)
            return [Document(text[:cut], "train"), Document(text[cut:], "validation")]
        if self.hold_out == "by_hash":
            held_out = is_held_out(text, fraction=fraction, seed=self.config.seed)
        else:
            held_out = self.hold_out == "all"
        return [Document(text, "validation" if held_out else "train")]

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Turn what `datasets` raises into one line that names the data."""
        try:
            yield
        except InputError:
            raise
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self._undecodable()} is not text in UTF-8 ({error.reason})"
            ) from error
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"cannot read {self._label()}: {first_line(error)}") from error

    def _label(self) -> str:
        builder, config, paths = self.source.builder, self.source.config, self.source.paths
        if not paths:
            return f"hub:{builder}" + (f":{config}" if config else "")
        num_more = len(paths) - 1
        if num_more == 1:
            return f"{paths[0]} or the file after it"
        more = f" or one of the {counted(num_more, 'file')} after it" if num_more else ""
        return f"{paths[0]}{more}"

    def _undecodable(self) -> str:
        for path in self.source.paths:
            try:
                path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                return str(path)
        return self._label()


def document_groups(config: DataConfig, source: TextFiles | Stream) -> list[DocumentGroup]:
    """The groups of a source, and of the validation source where there is one."""
    if config.validation:
        validation = resolve_validation(config.validation, source)
        if not isinstance(validation, (TextFiles, Stream)):
            raise InputError(
                "the validation data is .bin shards, but the training data is text: prepare both"
            )
        return [*groups_of(config, source, "none"), *groups_of(config, validation, "all")]
    if isinstance(source, Stream) or any(builder_of(path) != "text" for path in source.paths):
        return groups_of(config, source, "by_hash")
    if len(source.paths) == 1:
        return groups_of(config, source, "tail")
    held_out = _held_out_files(source.paths, config.validation_fraction, config.seed)
    kept = tuple(path for path in source.paths if path not in held_out)
    others = tuple(path for path in source.paths if path in held_out)
    return [
        *groups_of(config, TextFiles(kept), "none"),
        *groups_of(config, TextFiles(others), "all"),
    ]


def groups_of(
    config: DataConfig, source: TextFiles | Stream, hold_out: HoldOut
) -> list[DocumentGroup]:
    """A source's groups, one for each kind of file, all of whose documents are held out alike."""
    if isinstance(source, Stream):
        return [DocumentGroup(source, config, hold_out)]
    by_builder: dict[str, list[Path]] = {}
    for path in source.paths:
        by_builder.setdefault(builder_of(path), []).append(path)
    return [
        DocumentGroup(Stream(builder, None, tuple(paths)), config, hold_out)
        for builder, paths in by_builder.items()
    ]


class DocumentReader:
    """Iterates over the rows of groups, as lists of documents, from any saved position.

    Raises:
        InputError: while iterating: a file cannot be read, or rows lack the field.
    """

    def __init__(self, groups: Sequence[DocumentGroup]) -> None:
        self._groups = groups
        self._number = 0
        self._rows: IterableDataset | None = None
        self._rows_state: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[list[Document]]:
        while self._number < len(self._groups):
            group = self._groups[self._number]
            with group.readable():
                self._rows = group.open()
                if self._rows_state is not None:
                    self._rows.load_state_dict(self._rows_state)
                for row in self._rows:
                    yield group.documents(row)
            self._number, self._rows, self._rows_state = self._number + 1, None, None

    def state_dict(self) -> dict[str, Any]:
        """The position after the last row that was taken, in plain values."""
        rows = self._rows.state_dict() if self._rows is not None else self._rows_state
        return {"group": self._number, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave."""
        self._number, self._rows, self._rows_state = state["group"], None, state["rows"]


def is_held_out(text: str, *, fraction: float, seed: int) -> bool:
    """Whether a document is held out: by its text, so that copies of it fall on the same side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _held_out_files(paths: Sequence[Path], fraction: float, seed: int) -> set[Path]:
    """Text files for validation: in the order of their names' hashes, as many as fit the share.

    At least one, the smallest, so that there is something to validate on.
    """
    sizes = {path: path.stat().st_size for path in paths}
    left = fraction * sum(sizes.values())
    held_out: set[Path] = set()
    for path in sorted(
        paths, key=lambda path: hashlib.sha256(f"{seed},{path.name}".encode()).digest()
    ):
        if 0 < sizes[path] <= left:
            held_out.add(path)
            left -= sizes[path]
    return held_out or {min(paths, key=lambda path: (sizes[path], path.name))}


def _tail_start(text: str, fraction: float) -> int:
    """Where the held-out end of a text begins: after a line, where there is one."""
    cut = len(text) - int(fraction * len(text))
    line_end = text.find("\n", cut)
    return line_end + 1 if 0 <= line_end < len(text) - 1 else cut
