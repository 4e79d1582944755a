"""`normuon data prepare` and `verify`: their options and progress."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from normuon_lab.data.config import DEFAULT_SHARD_TOKENS, DataConfig
from normuon_lab.errors import counted

if TYPE_CHECKING:
    from rich.progress import Progress

    from normuon_lab.data.prepare import PrepareRequest

_DEFAULTS = DataConfig()


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Tokenise text into .bin shards, in modded-nanogpt's format, with a manifest.

    The same source gives the same bytes for any number of processes. After an interruption, the
    same command continues.
    """

    source: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """stdlib; text, jsonl or parquet files, by path or glob; or hub:NAME[:CONFIG]."""
    out: Path
    """Folder for the shards."""
    validation: tuple[str, ...] = ()
    """Another source for validation. Without it a part of SOURCE is held out."""
    validation_fraction: float = _DEFAULTS.validation_fraction
    """Share of the documents to hold out, by the hash of their text; of a single text file the last
    part."""
    tokenizer: str = _DEFAULTS.tokenizer
    """bytes, a `tokenizers` JSON file, or the folder or Hub name of a transformers tokenizer."""
    separator: str | None = None
    """Token that begins every document; by default the tokenizer's end of text, and byte 0."""
    text_field: str = _DEFAULTS.text_field
    """Field of jsonl, parquet and Hub rows that holds the text."""
    split: str = _DEFAULTS.split
    """Split of a Hub data set."""
    seed: int = _DEFAULTS.seed
    """Decides which documents are held out."""
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    """Tokens of every shard but the last."""
    processes: int | None = None
    """Processes that tokenise; by default as many as cores."""
    json: bool = False
    """Print the manifest as JSON."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        from rich.console import Console

        from normuon_lab.data.prepare import prepare

        request = self.request()
        if self.json or not sys.stderr.isatty():
            manifest = prepare(request)
        else:
            with _progress_bar() as progress:
                task = progress.add_task("Tokenising", total=None, documents=0)

                def show(documents: int, tokens: int) -> None:
                    progress.update(task, completed=tokens, documents=documents)

                manifest = prepare(request, show)
        if self.json:
            from json import dumps

            print(dumps(manifest))
        else:
            Console().print(summary_of(manifest, self.out), highlight=False, soft_wrap=True)
        return 0

    def request(self) -> PrepareRequest:
        """The validated request."""
        from normuon_lab.data.prepare import PrepareRequest

        shared = [field.name for field in fields(DataConfig) if hasattr(self, field.name)]
        return PrepareRequest(
            config=DataConfig(**{name: getattr(self, name) for name in shared}),
            out=self.out,
            shard_tokens=self.shard_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every byte of a prepared folder against its manifest, for example after a copy."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A folder of `normuon data prepare`."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        from normuon_lab.data.prepare import verify

        manifest = verify(self.folder)
        print(f"every byte is intact\n{summary_of(manifest, self.folder)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class DataCommand:
    """Prepare data for pretraining."""

    action: Annotated[
        Annotated[Prepare, tyro.conf.subcommand("prepare")]
        | Annotated[Verify, tyro.conf.subcommand("verify")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        """Run the command and return its exit code."""
        return self.action.run()


def summary_of(manifest: dict[str, Any], out: Path) -> str:
    """What was written, in a few lines."""
    lines = [
        f"{part}: {counted(contents['tokens'], 'token')} in "
        f"{counted(len(contents['shards']), 'shard')}"
        for part, contents in manifest["parts"].items()
    ]
    return "\n".join([*lines, f"{counted(manifest['documents'], 'document')} in {out}"])


def _progress_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} tokens, {task.fields[documents]:,} documents"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
