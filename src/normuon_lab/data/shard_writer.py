"""Writes tokens into shards, each whole or not at all, and goes on where it was stopped."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

from normuon_lab.data.shards import HEADER_BYTES, TOKEN_BYTES, Tokens, header


class ShardWriter:
    """The shards of one part of the data.

    The shard that is being filled has another name, `.NAME.partial`, until it is complete.

    Args:
        folder: where to write.
        part: the shards' common name.
        shard_tokens: tokens of every shard but the last.
        state: what `state_dict` gave when the writing was stopped; None begins.
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
        """Where the writing is; everything up to there is on the disk when this returns."""
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
