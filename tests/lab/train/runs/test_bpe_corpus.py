"""A text as tokens of a BPE: it comes back, a run learns it, the held-out part teaches nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from normuon_lab.cli import parse
from normuon_lab.config_difference import first_difference
from normuon_lab.data.tokenizer import train_bpe
from normuon_lab.errors import InputError
from normuon_lab.study.compare.command import CompareCommand
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.corpus import Corpus, Tokens, load_corpus
from normuon_lab.train.runs.tasks import load_task
from normuon_lab.train.runs.train import train_run
from normuon_lab.train.runs.workers import Finished, Job, run_jobs

VOCAB_SIZE = 280


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve files; each has a word of its own, thrice, that no other has."""
    folder = tmp_path_factory.mktemp("works")
    paths = []
    for i in range(12):
        path = folder / f"{i}.txt"
        own = chr(ord("a") + i) * 9
        path.write_text(f"Ophélia and the sea, the sea and {own}, {own}, {own}.\n" * 3)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def bpe_experiment(experiment: Experiment) -> Experiment:
    return dataclasses.replace(
        experiment,
        tokenizer="bpe",
        model=dataclasses.replace(experiment.model, vocab_size=VOCAB_SIZE),
        training=dataclasses.replace(experiment.training, eval_tokens=64),
    )


def text_of(tokens: Tokens, training_texts: list[str]) -> bytes:
    backend = train_bpe(training_texts, vocab_size=VOCAB_SIZE).backend
    assert backend is not None
    text: str = backend.decode(tokens.tolist())
    return text.encode()


def load_bpe(works: list[str]) -> Corpus:
    return load_corpus(works, tokenizer="bpe", vocab_size=VOCAB_SIZE)


def training_texts(works: list[str]) -> list[str]:
    plain = bytes(load_corpus(works).train).decode()
    return plain.split("\0")[:-1]


def test_a_bpe_of_the_training_documents_alone_gives_both_parts_back(works: list[str]) -> None:
    plain, bpe = load_corpus(works), load_bpe(works)
    texts = training_texts(works)
    assert len(texts) == bpe.num_train_documents == plain.num_train_documents
    assert text_of(bpe.train, texts) == bytes(plain.train)
    assert text_of(bpe.validation, texts) == bytes(plain.validation)


def test_words_of_held_out_documents_are_not_in_the_vocabulary(works: list[str]) -> None:
    bpe = train_bpe(training_texts(works), vocab_size=VOCAB_SIZE).backend
    assert bpe is not None
    held_out = bytes(load_corpus(works).validation).decode()
    letters = {letter for letter in "abcdefghijkl" if letter * 9 in held_out}
    assert 1 <= len(letters) < 12
    for letter in "abcdefghijkl":
        has_run = any(letter * 2 in token for token in bpe.get_vocab())
        assert has_run == (letter not in letters), letter


def test_another_held_out_text_changes_no_training_token(works: list[str]) -> None:
    before = load_bpe(works)
    held_out = [
        path for path in works if Path(path).read_bytes() in bytes(load_corpus(works).validation)
    ]
    texts = {path: Path(path).read_text() for path in held_out}
    for path in held_out:
        Path(path).write_text("Something else entirely. " * 20)
    try:
        after = load_bpe(works)
    finally:
        for path, text in texts.items():
            Path(path).write_text(text)
    assert np.array_equal(after.train, before.train)
    assert after.validation.size != before.validation.size


def test_the_same_text_gives_the_same_tokens_and_says_what_they_are(works: list[str]) -> None:
    first, second = load_bpe(works), load_bpe(works[::-1])
    assert np.array_equal(first.train, second.train)
    assert first.train.dtype == first.validation.dtype == np.uint16
    plain = load_corpus(works)
    described = first.to_json()
    assert described == {**second.to_json(), "name": described["name"]}
    assert (described["tokenizer"], described["vocab_size"]) == ("bpe", VOCAB_SIZE)
    assert described["sha256"] == plain.digest
    for part in ("train", "validation"):
        expected = plain.to_json()[f"{part}_tokens"] / described[f"{part}_tokens"]
        assert described[f"{part}_bytes_per_token"] == expected > 1
        assert plain.to_json()[f"{part}_bytes_per_token"] == 1


def test_a_run_on_bpe_tokens_trains_and_is_the_same_in_a_worker(
    works: list[str], bpe_experiment: Experiment
) -> None:
    experiment = dataclasses.replace(bpe_experiment, data=tuple(works))
    task = load_task(experiment)
    spec = RunSpec(arm="normuon", seed=0, learning_rate=0.004)
    record = train_run(spec, experiment, task)
    assert record.final_loss is not None
    assert record.final_loss < record.eval_losses[0] == pytest.approx(np.log(VOCAB_SIZE), abs=0.2)
    events = list(run_jobs([Job(spec)], experiment, task, num_workers=1))
    finished = [event for event in events if isinstance(event, Finished)]
    assert [event.record.eval_losses for event in finished] == [record.eval_losses]


def test_files_from_before_bpe_equal_experiments_on_bytes(
    experiment: Experiment, bpe_experiment: Experiment
) -> None:
    fields_before = {"model", "training", "data", "compile"}
    assert set(experiment.to_json()) == fields_before
    before = {name: bpe_experiment.to_json()[name] for name in fields_before}
    assert first_difference(before, bpe_experiment.to_json()) == ("tokenizer", None, "bpe")


@pytest.mark.parametrize(
    ("words", "tokenizer", "vocab_size"),
    [
        ([], "bytes", 256),
        (["--tokenizer", "bpe"], "bpe", 1024),
        (["--tokenizer", "bpe", "--vocab-size", "300"], "bpe", 300),
    ],
)
def test_the_command_line_names_the_tokens(
    words: list[str], tokenizer: str, vocab_size: int
) -> None:
    command = parse(["compare", *words])
    assert isinstance(command, CompareCommand)
    asked = command.experiment()
    assert (asked.tokenizer, asked.model.vocab_size) == (tokenizer, vocab_size)


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "message"),
    [
        ("words", 256, "--tokenizer words: choose one of bytes, bpe"),
        ("bytes", 300, "--vocab-size 300: bytes are 256"),
        ("bpe", 256, "a BPE has the 256 bytes and more"),
        ("bpe", 70000, "--vocab-size 70000: a BPE has .* up to 65536 tokens"),
        ("bpe", 4000, "too short for a BPE of 4000 tokens"),
    ],
)
def test_impossible_vocabularies_are_refused(
    works: list[str], tokenizer: str, vocab_size: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_corpus(works, tokenizer=tokenizer, vocab_size=vocab_size)


def test_a_bpe_needs_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("caf\xe9 ".encode("latin-1") * 100)
    assert load_corpus([str(path)]).train.size > 0
    with pytest.raises(InputError, match=r"latin1\.txt is not UTF-8 .* take --tokenizer bytes"):
        load_corpus([str(path)], tokenizer="bpe", vocab_size=VOCAB_SIZE)


def test_a_text_too_short_to_hold_anything_out_is_one_line(
    tmp_path: Path, experiment: Experiment
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("five\n")
    with pytest.raises(InputError, match="its validation part has 0 tokens"):
        load_task(dataclasses.replace(experiment, data=(str(path),)))
