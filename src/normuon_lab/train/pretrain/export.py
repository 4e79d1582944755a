"""`normuon export`: a checkpoint's weights as a folder that transformers loads, and a sample of it.

One process reads a checkpoint of any number of ranks.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from normuon_lab.atomic_files import prove_folder
from normuon_lab.errors import InputError, require

# The command line is read before torch is imported, which takes seconds.
if TYPE_CHECKING:
    from normuon_lab.data.tokenizer import TextTokenizer
    from normuon_lab.train.pretrain.checkpoint import CheckpointDescription

NO_TOKENIZER = "none"


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a checkpoint of `normuon train` as a transformers folder, and a text it generates."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """A checkpoint's folder, or a run's folder for its newest."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write; absent or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights."""
    tokenizer: str | None = None
    """bytes, a `tokenizers` JSON file, or a transformers tokenizer, if the run's data is gone; none
    writes only the model."""
    prompt: str = ""
    """Text that the sample continues; by default the start of a document."""
    sample_tokens: int = 64
    """Length of the sample; 0 generates none."""
    seed: int = 0
    """Seed of the sample, which is drawn from the model's distribution."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        require(self.sample_tokens >= 0, f"--sample-tokens {self.sample_tokens}: give at least 0")
        _check_out(self.out)

        from transformers.utils import logging

        from normuon_lab.train.pretrain.checkpoint import resolve, verify

        logging.disable_progress_bar()
        path = resolve(self.checkpoint)
        description = verify(path)
        tokenizer = self._tokenizer(description)
        try:
            export(path, description, tokenizer, self.out, dtype=self.dtype)
        except OSError as error:
            raise InputError(f"cannot write {self.out}: {error.strerror or error}") from error
        print(f"{path} is exported to {self.out}")
        if tokenizer is not None and self.sample_tokens:
            text = sample(
                self.out, prompt=self.prompt, num_tokens=self.sample_tokens, seed=self.seed
            )
            print(_printable(text))
        return 0

    def _tokenizer(self, description: CheckpointDescription) -> TextTokenizer | None:
        from normuon_lab.data.config import DataConfig
        from normuon_lab.data.prepare import tokenizer_of_run
        from normuon_lab.data.tokenizer import load_tokenizer
        from normuon_lab.train.pretrain.checkpoint import DESCRIPTION_FILE
        from normuon_lab.train.pretrain.config import merged

        if self.tokenizer == NO_TOKENIZER:
            return None
        if self.tokenizer is not None:
            return load_tokenizer(self.tokenizer)
        data = description.config["data"]
        try:
            found = tokenizer_of_run(merged(DataConfig(), data, source=DESCRIPTION_FILE))
        except InputError as error:
            raise InputError(f"{error} with --tokenizer, or give --tokenizer none") from error
        require(
            found is not None,
            "the run's shards do not say which tokenizer they have: name it with --tokenizer, or "
            "give --tokenizer none",
        )
        return found


def export(
    path: Path,
    description: CheckpointDescription,
    tokenizer: TextTokenizer | None,
    out: Path,
    *,
    dtype: str,
) -> None:
    """Write a checkpoint, verified before, as a transformers folder.

    Raises:
        InputError: the weights do not fit the model that the checkpoint describes, or the tokenizer
            does not fit the model.
        OSError: the folder cannot be written; it is removed then.
    """
    import torch

    from normuon_lab.data.tokenizer import save_for_transformers
    from normuon_lab.train.pretrain.checkpoint_tensors import load_model_only, model_of

    model: Any = model_of(description)
    vocab_size = int(model.config.vocab_size)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}: the "
            "model was trained with another; name it with --tokenizer"
        )
    load_model_only(path, model)
    model.to(getattr(torch, dtype))
    beside = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        beside.mkdir(parents=True)
        model.save_pretrained(beside)
        if tokenizer is not None:
            save_for_transformers(tokenizer, beside)
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sample(folder: Path, *, prompt: str, num_tokens: int, seed: int) -> str:
    """Load a transformers folder as users do, and generate text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Every document in training began with it; byte 0 where the tokenizer has no such token.
    first = 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    ids = torch.tensor([[first, *tokenizer.encode(prompt, add_special_tokens=False)]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=first,
            eos_token_id=None,
        )
    return str(tokenizer.decode(generated[0, 1:], skip_special_tokens=False))


def _printable(text: str) -> str:
    """Replaces control characters, because models may generate any byte."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _check_out(out: Path) -> None:
    require(not out.exists() or out.is_dir(), f"{out} is a file; name a folder")
    entries = list(out.iterdir()) if out.is_dir() else []
    require(not entries, f"{out} is not empty; name another folder")
    prove_folder(out.parent, str(out))
