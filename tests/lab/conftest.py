"""For all lab tests: a text, a tiny experiment, and one real comparison made by the command."""

from __future__ import annotations

import os
import random
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from normuon_lab.train.runs.config import Experiment, ModelConfig, TrainConfig
from normuon_lab.train.runs.corpus import Corpus, load_corpus
from tests.distributed.ranks import Ranks

TINY_STEPS = 6


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 kB of lines with a little structure to learn."""
    words = ["neuron", "matrix", "momentum", "row", "step", "norm", "orthogonal", "update"]
    choose = random.Random(0)
    lines = [" ".join(choose.choices(words, k=8)) for _ in range(400)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus(text_file: Path) -> Corpus:
    return load_corpus([str(text_file)])


@pytest.fixture(scope="session")
def experiment(text_file: Path) -> Experiment:
    """The same as `tiny_options` asks for."""
    return Experiment(
        model=ModelConfig(num_layers=1, width=16, num_heads=2, mlp_width=32, sequence_length=16),
        training=TrainConfig(steps=TINY_STEPS, batch_size=4, num_evals=3, eval_tokens=256),
        data=(str(text_file),),
    )


@pytest.fixture(scope="session")
def tiny_options(text_file: Path) -> list[str]:
    values = {
        "--data": text_file,
        "--steps": TINY_STEPS,
        "--evals": 3,
        "--batch-size": 4,
        "--layers": 1,
        "--width": 16,
        "--heads": 2,
        "--mlp-width": 32,
        "--sequence-length": 16,
        "--eval-tokens": 256,
    }
    return [str(part) for pair in values.items() for part in pair]


RATES = ("--lr", "adamw=0.004", "muon=0.004", "normuon=0.004")


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and both streams."""

    code: int
    stdout: str
    stderr: str


def command(arguments: Sequence[object]) -> list[str]:
    """The installed console script, as a user calls it."""
    script = Path(sysconfig.get_path("scripts"), "normuon")
    return [str(script), *map(str, arguments)]


def run_command(*arguments: object) -> Outcome:
    done = subprocess.run(
        command(arguments),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "120"},
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def tiny_comparison(
    tmp_path_factory: pytest.TempPathFactory, tiny_options: list[str]
) -> tuple[Path, Outcome]:
    """The folder of a finished comparison of three arms and two seeds, and what was printed."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    outcome = run_command("compare", *tiny_options, *RATES, "--seeds", 2, "--out", out)
    assert outcome.code == 0, outcome.stderr
    return out, outcome


@pytest.fixture
def make_corpus() -> Callable[..., Corpus]:
    """A corpus of given lengths."""

    def make(num_train: int, num_validation: int = 100) -> Corpus:
        return Corpus(
            name="made",
            train=np.arange(num_train, dtype=np.int64).astype(np.uint8),
            validation=np.arange(num_validation, dtype=np.int64).astype(np.uint8),
            digest="0" * 64,
            num_train_documents=1,
            num_validation_documents=1,
        )

    return make


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """One pool of processes for the lab's tests."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A byte-level BPE of 300 tokens, trained here by `tokenizers`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text_file.read_text().splitlines(), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    tokenizer.save(str(path))
    return path
