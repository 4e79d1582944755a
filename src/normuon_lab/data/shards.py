"""Files of uint16 tokens in modded-nanogpt's format: written whole, read through memory maps.

A header of 256 int32 (magic 20240520, version 1, number of tokens), then the tokens, little-endian.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from normuon_lab.errors import InputError, require

Tokens = npt.NDArray[np.uint16]

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
MAX_VOCAB_SIZE = 1 << 16

_MEND = "prepare it again (normuon data prepare) or copy it again"
_FINGERPRINT_SAMPLES = 16
_FINGERPRINT_BYTES = 1 << 16


def header(num_tokens: int) -> bytes:
    """The 1024 bytes that begin a shard."""
    values = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    values[:3] = MAGIC, VERSION, num_tokens
    return values.tobytes()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the system raises into one line that names the shard."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read the shard {path}: {error.strerror}") from error


def read_num_tokens(path: Path) -> int:
    """Check a shard's header and size, and return its number of tokens.

    Raises:
        InputError: it is missing, no shard, or shorter or longer than its header says.
    """
    with _readable(path), path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    require(
        len(head) == HEADER_BYTES,
        f"the shard {path} is truncated: {size} bytes do not hold its header; {_MEND}",
    )
    magic, version, num_tokens = (int(x) for x in np.frombuffer(head, dtype="<i4")[:3])
    require(
        magic == MAGIC,
        f"{path} is not a shard of tokens: it begins with {magic}, not {MAGIC}; "
        "write shards with normuon data prepare",
    )
    require(
        version == VERSION,
        f"the shard {path} has version {version}; this version of normuon reads {VERSION}",
    )
    expected = HEADER_BYTES + TOKEN_BYTES * num_tokens
    require(
        num_tokens >= 0 and size == expected,
        f"the shard {path} is {'truncated' if size < expected else 'damaged'}: it has {size} "
        f"bytes, and the {num_tokens} tokens of its header take {expected}; {_MEND}",
    )
    return num_tokens


class TokenShards:
    """Shards as one long array of tokens.

    Files are mapped when they are first read, by the process that reads them.

    Args:
        paths: shards, in order.
        start: first token of the array within the shards together.
        stop: token after its last; None is the end.

    Raises:
        InputError: a shard is missing or damaged; names the file.
    """

    def __init__(self, paths: Sequence[Path], *, start: int = 0, stop: int | None = None) -> None:
        self.paths = tuple(paths)
        self._ends = list(accumulate(read_num_tokens(path) for path in self.paths))
        total = self._ends[-1] if self._ends else 0
        self._start, self._stop = start, total if stop is None else stop
        assert 0 <= self._start <= self._stop <= total
        self._maps: dict[int, tuple[int, Tokens]] = {}

    def __len__(self) -> int:
        return self._stop - self._start

    def narrow(self, start: int, stop: int) -> TokenShards:
        """A part of the array, in its own coordinates."""
        return TokenShards(self.paths, start=self._start + start, stop=self._start + stop)

    def __getitem__(self, part: slice) -> Tokens:
        """A copy of the tokens ``[start:stop]``; they may lie in several shards.

        Raises:
            InputError: a file vanished or became shorter since it was opened.
        """
        assert 0 <= part.start <= part.stop <= len(self)
        start, stop = self._start + part.start, self._start + part.stop
        pieces = []
        while start < stop:
            shard = bisect_right(self._ends, start)
            first = self._ends[shard - 1] if shard else 0
            end = min(stop, self._ends[shard])
            pieces.append(self._mapped(shard)[start - first : end - first])
            start = end
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)

    def fingerprint(self) -> str:
        """SHA-256 over the shards' sizes and bytes sampled evenly from each; not their names.

        A sample, the ends of each included: reading a hundred gigabytes would delay every start.
        """
        digest = hashlib.sha256(f"{self._start},{self._stop}".encode())
        for path in self.paths:
            with _readable(path), path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"\0{size}\0".encode())
                last = max(0, size - _FINGERPRINT_BYTES)
                for place in range(_FINGERPRINT_SAMPLES):
                    file.seek(last * place // (_FINGERPRINT_SAMPLES - 1))
                    digest.update(file.read(_FINGERPRINT_BYTES))
        return digest.hexdigest()

    def _mapped(self, shard: int) -> Tokens:
        path = self.paths[shard]
        if shard not in self._maps:
            # Checked again: it may have changed since the run began.
            num_tokens = read_num_tokens(path)
            first = self._ends[shard - 1] if shard else 0
            require(
                num_tokens == self._ends[shard] - first,
                f"the shard {path} changed while it was in use; {_MEND}",
            )
            with _readable(path):
                mapped = np.memmap(
                    path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=num_tokens
                )
                self._maps[shard] = os.open(path, os.O_RDONLY), mapped
        descriptor, tokens = self._maps[shard]
        # Reading a map beyond the end of its file would end the process with SIGBUS.
        require(
            os.fstat(descriptor).st_size >= HEADER_BYTES + TOKEN_BYTES * len(tokens),
            f"the shard {path} was truncated while it was in use; {_MEND}",
        )
        return tokens

    def __getstate__(self) -> dict[str, object]:
        # Maps and descriptors belong to the process that opened them.
        return {**self.__dict__, "_maps": {}}

    def __del__(self) -> None:
        for descriptor, _ in getattr(self, "_maps", {}).values():
            os.close(descriptor)


class ShardWriter:
    """The shards of one part of the data.

    The shard that is being filled has another name, `.NAME.partial`, until it is complete.
    """

    def __init__(
        self, folder: Path, part: str, *, shard_tokens: int, state: dict[str, Any] | None = None
    ) -> None:
        self._folder = folder
        self._part = part
        self._shard_tokens = shard_tokens
        self.shards: list[dict[str, Any]] = list(state["shards"]) if state else []
        self._filled = int(state["filled"]) if state else 0
        self._file = self._open()

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return sum(shard["tokens"] for shard in self.shards) + self._filled

    def append(self, tokens: Tokens) -> None:
        """Write tokens, `[n]`, filling as many shards as they do."""
        while len(tokens):
            taken = tokens[: self._shard_tokens - self._filled]
            self._file.write(taken.astype("<u2", copy=False).tobytes())
            self._filled += len(taken)
            tokens = tokens[len(taken) :]
            if self._filled == self._shard_tokens:
                self._complete_shard()
                self._file = self._open()

    def state_dict(self) -> dict[str, Any]:
        """The writing position; everything before it is on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"shards": list(self.shards), "filled": self._filled}

    def finish(self) -> None:
        """Complete the last shard; an empty one is dropped."""
        if self._filled:
            self._complete_shard()
        else:
            self.close()
            self._partial.unlink()

    def close(self) -> None:
        """Leave the shard that is being filled as it is."""
        self._file.close()

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._part}-{len(self.shards):05d}.bin"

    @property
    def _partial(self) -> Path:
        return self._folder / f".{self._path.name}.partial"

    def _open(self) -> BinaryIO:
        if not self._filled:
            file: BinaryIO = self._partial.open("wb")
            file.write(bytes(HEADER_BYTES))
            return file
        if not self._partial.exists():
            # It was completed after the state was saved; its first tokens are the same.
            self._path.rename(self._partial)
        file = self._partial.open("r+b")
        file.truncate(HEADER_BYTES + TOKEN_BYTES * self._filled)
        file.seek(0, os.SEEK_END)
        return file

    def _complete_shard(self) -> None:
        self._file.seek(0)
        self._file.write(header(self._filled))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = sha256_of(self._partial)
        self._partial.replace(self._path)
        self.shards.append({"file": self._path.name, "tokens": self._filled, "sha256": digest})
        self._filled = 0


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
