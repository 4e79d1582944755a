"""Tokenises a source into a folder of shards with a manifest: whole, repeatable, resumable.

The same source and options give the same bytes, whatever the number of processes and however
often the work was interrupted. The manifest is written last: a folder without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock

from normuon_lab.atomic_files import (
    PROBE,
    damage_named,
    prove_folder,
    read_json,
    write_json,
    write_text,
)
from normuon_lab.config_difference import first_difference
from normuon_lab.data.config import DEFAULT_SHARD_TOKENS, DataConfig
from normuon_lab.data.documents import PARTS, Document, DocumentReader, document_groups
from normuon_lab.data.encoding import batches_of, encode_in_order
from normuon_lab.data.shards import (
    HEADER_BYTES,
    MAX_VOCAB_SIZE,
    TOKEN_BYTES,
    ShardWriter,
    sha256_of,
)
from normuon_lab.data.sources import (
    MANIFEST,
    PROGRESS,
    PreparedFolder,
    ShardFiles,
    Stream,
    TextFiles,
    resolve_source,
    resolve_validation,
)
from normuon_lab.data.tokenizer import BYTES, TOKENIZER_FILE, TextTokenizer, load_tokenizer
from normuon_lab.errors import InputError, require
from normuon_lab.machine import default_num_workers

KIND = "normuon data prepare"
SCHEMA_VERSION = 1
LOCK = ".lock"

_TOKENS_BETWEEN_SAVES = 16_000_000

OnProgress = Callable[[int, int], None]
"""Called with the documents and tokens so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRequest:
    """What to tokenise, and where to.

    Attributes:
        config: the source and how it becomes tokens.
        out: the folder; absent, empty, or from an earlier call with the same request.
        shard_tokens: tokens of every shard but the last.
    """

    config: DataConfig
    out: Path
    shard_tokens: int = DEFAULT_SHARD_TOKENS

    def __post_init__(self) -> None:
        require(self.shard_tokens >= 1, f"--shard-tokens {self.shard_tokens}: give at least 1")


def prepare(request: PrepareRequest, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Tokenise, or continue an interrupted run, and return the manifest.

    Several processes may ask for the same folder; one works and the others wait for it.

    Raises:
        InputError: the source cannot be read, the folder belongs to something else, or the disk is
            full. Finished work is kept, and the same request continues.
    """
    source = resolve_source(request.config.source)
    if not isinstance(source, (TextFiles, Stream)):
        raise InputError(f"{request.config.source[0]} contains token shards already")
    tokenizer = load_tokenizer(request.config.tokenizer, separator=request.config.separator)
    require(
        tokenizer.vocab_size <= MAX_VOCAB_SIZE,
        f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, and shards hold "
        f"numbers below {MAX_VOCAB_SIZE}; stream the data instead (stream: or hub:)",
    )
    job = describe_job(request, source, tokenizer)
    try:
        _make_folder(request.out)
        with FileLock(request.out / LOCK):
            if (request.out / MANIFEST).exists():
                manifest = read_manifest(request.out)
                _check_same_job(request.out, manifest["job"], _without_times(job))
                return manifest
            return _Preparation(request, source, tokenizer, job).run(on_progress)
    except OSError as error:
        raise InputError(
            f"cannot write {request.out}: {error.strerror or error}; finished work is kept: run "
            "the same command again to continue"
        ) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """A prepared folder's manifest, checked against the sizes of its files.

    Raises:
        InputError: it is unreadable, or a shard is missing or has another size.
    """
    manifest = read_json(folder / MANIFEST, kind=KIND, schema_version=SCHEMA_VERSION)
    with damage_named(folder / MANIFEST):
        _check_manifest(folder, manifest)
    return manifest


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    tokenizer, parts = manifest["tokenizer"], [manifest["parts"][part] for part in PARTS]
    shards = [shard for part in parts for shard in part["shards"]]
    texts = [tokenizer["name"], manifest["fingerprint"], *(shard["sha256"] for shard in shards)]
    numbers = [manifest["documents"], tokenizer["vocab_size"], tokenizer["separator_id"]]
    numbers += [entry["tokens"] for entry in (*parts, *shards)]
    require(
        isinstance(manifest["job"], dict)
        and all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in numbers),
        f"{folder / MANIFEST} is damaged: an entry is of another type",
    )
    for shard in shards:
        path = folder / shard["file"]
        require(path.exists(), f"the shard {path} of {folder / MANIFEST} is missing")
        expected = HEADER_BYTES + TOKEN_BYTES * shard["tokens"]
        size = path.stat().st_size
        require(
            size == expected,
            f"the shard {path} is {'truncated' if size < expected else 'damaged'}: it has "
            f"{size} bytes, and the manifest says {expected}; prepare it again (normuon data "
            "prepare) or copy it again",
        )


def verify(folder: Path) -> dict[str, Any]:
    """Compare every shard with the SHA-256 of the manifest, and return the manifest.

    Raises:
        InputError: a shard is missing or differs; names the first.
    """
    require(
        (folder / MANIFEST).exists(), f"{folder} has no {MANIFEST}: it is not a prepared folder"
    )
    manifest = read_manifest(folder)
    for shard in chain.from_iterable(manifest["parts"][part]["shards"] for part in PARTS):
        path = folder / shard["file"]
        require(
            sha256_of(path) == shard["sha256"],
            f"the shard {path} is damaged: its bytes do not match the manifest; "
            "prepare it again (normuon data prepare) or copy it again",
        )
    return manifest


def describe_job(
    request: PrepareRequest, source: TextFiles | Stream, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Everything that decides the bytes of the shards, in plain values."""
    config = request.config
    sources = [source]
    if config.validation:
        validation = resolve_validation(config.validation, source)
        sources += [validation] if isinstance(validation, (TextFiles, Stream)) else []
    return {
        "files": [
            {"name": path.name, "bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
            for one in sources
            for path in one.paths
        ],
        "hub": [
            f"{one.builder}:{one.config}:{config.split}"
            for one in sources
            if isinstance(one, Stream) and not one.paths
        ],
        "validation": list(config.validation),
        "validation_fraction": config.validation_fraction,
        "seed": config.seed,
        "text_field": config.text_field,
        "tokenizer": tokenizer.describe(),
        "shard_tokens": request.shard_tokens,
    }


class _Preparation:
    """One run of `prepare`, alone in its folder."""

    def __init__(
        self,
        request: PrepareRequest,
        source: TextFiles | Stream,
        tokenizer: TextTokenizer,
        job: dict[str, Any],
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._job = job
        self._out = request.out
        self._reader = DocumentReader(document_groups(request.config, source))
        fresh: dict[str, Any] = {"documents": 0, "writers": dict.fromkeys(PARTS)}
        saved, path = fresh, self._out / PROGRESS
        with damage_named(path):
            if path.exists():
                saved = read_json(path, kind=KIND, schema_version=SCHEMA_VERSION)
                _check_same_job(self._out, saved["job"], job)
                self._reader.load_state_dict(saved["reader"])
            self._documents = saved["documents"]
            self._writers = {
                part: ShardWriter(
                    self._out, part, shard_tokens=request.shard_tokens, state=saved["writers"][part]
                )
                for part in PARTS
            }
        self._saved_tokens = self._num_tokens
        if saved is fresh:
            # From the first moment on the folder says that it is unfinished.
            self._save(self._reader.state_dict())

    def run(self, on_progress: OnProgress | None) -> dict[str, Any]:
        try:
            processes = self._request.config.processes or default_num_workers(64)
            batches = encode_in_order(
                self._tokenizer, batches_of(self._rows()), processes=processes
            )
            for batch, tokens in batches:
                for part in PARTS:
                    self._writers[part].append(tokens[part])
                self._documents += batch.num_documents
                unsaved = self._num_tokens - self._saved_tokens
                if batch.position is not None and unsaved >= _TOKENS_BETWEEN_SAVES:
                    self._save(batch.position)
                if on_progress is not None:
                    on_progress(self._documents, self._num_tokens)
            require(
                self._writers["train"].num_tokens > 0,
                f"no text was found in {', '.join(self._request.config.source)}",
            )
            for writer in self._writers.values():
                writer.finish()
        finally:
            for writer in self._writers.values():
                writer.close()
        return self._write_manifest()

    @property
    def _num_tokens(self) -> int:
        return sum(writer.num_tokens for writer in self._writers.values())

    def _rows(self) -> Iterator[tuple[list[Document], dict[str, Any]]]:
        for documents in self._reader:
            yield documents, self._reader.state_dict()

    def _save(self, position: dict[str, Any]) -> None:
        writers = {part: writer.state_dict() for part, writer in self._writers.items()}
        progress = {"reader": position, "documents": self._documents, "writers": writers}
        write_json(
            self._out / PROGRESS,
            {"kind": KIND, "schema_version": SCHEMA_VERSION, "job": self._job, **progress},
        )
        self._saved_tokens = self._num_tokens

    def _write_manifest(self) -> dict[str, Any]:
        parts = {
            part: {"tokens": writer.num_tokens, "shards": writer.shards}
            for part, writer in self._writers.items()
        }
        manifest = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "tokenizer": self._job["tokenizer"],
            "documents": self._documents,
            "parts": parts,
            "fingerprint": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
            "job": _without_times(self._job),
        }
        write_text(self._out / TOKENIZER_FILE, self._tokenizer.serialized())
        write_json(self._out / MANIFEST, manifest)
        (self._out / PROGRESS).unlink(missing_ok=True)
        return manifest


def _make_folder(out: Path) -> None:
    """Make the folder, unless it is ours: then its lock is the first file in it."""
    require(not out.exists() or out.is_dir(), f"{out} is a file; name a folder")
    prove_folder(out, f"--out {out}")
    names = {path.name for path in out.iterdir() if not path.name.startswith(PROBE)}
    require(
        not names or bool(names & {LOCK, PROGRESS, MANIFEST}),
        f"{out} holds other files, such as {min(names, default='')}; name another folder",
    )


def _without_times(job: dict[str, Any]) -> dict[str, Any]:
    # When a file was last changed says nothing about its text, and differs between copies.
    files = [{k: v for k, v in f.items() if k != "mtime_ns"} for f in job["files"]]
    return {**job, "files": files}


def _check_same_job(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    difference = first_difference(old, new)
    if difference is not None:
        name, before, after = difference
        values = f" ({before}, now {after})"
        # Lists of files are long, and their names do not help.
        shown = values if len(values) < 120 else ""
        raise InputError(f"{out} was made with another value of {name}{shown}; name another folder")


def tokenizer_of_run(config: DataConfig) -> TextTokenizer | None:
    """The tokenizer of a run's data; None for shards without a named one.

    Raises:
        InputError: the data, which names its tokenizer, is gone.
    """
    try:
        source = resolve_source(config.source)
    except InputError as error:
        raise InputError(
            f"the run's data, which names its tokenizer, cannot be found: {error}; name the "
            "tokenizer"
        ) from error
    if isinstance(source, PreparedFolder):
        described = read_manifest(source.folder)["tokenizer"]
        if described["name"] == BYTES:
            return load_tokenizer(BYTES)
        from tokenizers import Tokenizer

        path = source.folder / TOKENIZER_FILE
        backend = Tokenizer.from_file(str(path))
        return TextTokenizer(
            str(path), int(described["vocab_size"]), int(described["separator_id"]), backend
        )
    if isinstance(source, ShardFiles) and config.tokenizer == BYTES:
        return None
    return load_tokenizer(config.tokenizer, separator=config.separator)
