"""Tokenizers: bytes, files and transformers' by one interface, and back to transformers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from normuon_lab.data.config import DataConfig
from normuon_lab.data.prepare import PrepareRequest, prepare, tokenizer_of_run
from normuon_lab.data.tokenizer import byte_tokenizer, load_tokenizer, save_for_transformers
from normuon_lab.errors import InputError

TEXT = "naïve 日本 \x00\x7f\tmomentum\n"


def test_bytes_equal_the_tokenizer_that_stands_for_them() -> None:
    ours = load_tokenizer("bytes")
    assert ours.encode([TEXT])[0].tolist() == list(TEXT.encode())
    theirs = byte_tokenizer()
    assert theirs.encode(TEXT).ids == list(TEXT.encode())
    assert theirs.decode(list(TEXT.encode())) == TEXT
    assert theirs.get_vocab_size() == ours.vocab_size == 256
    # Every byte, not only those of valid UTF-8, has a number.
    assert sorted(theirs.get_vocab().values()) == list(range(256))


def test_a_file_of_tokenizers(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    expected = Tokenizer.from_file(str(tokenizer_file))
    assert tokenizer.encode(["a b", TEXT])[1].tolist() == expected.encode(TEXT).ids
    assert tokenizer.separator_id == expected.token_to_id("<|endoftext|>")
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode([TEXT])[0].tolist() == expected.encode(TEXT).ids


@pytest.fixture
def transformers_folder(tokenizer_file: Path, tmp_path: Path) -> Path:
    """A tokenizer that begins every text with a token of its own, as Llama's do, when asked to."""
    backend = Tokenizer.from_file(str(tokenizer_file))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    fast.save_pretrained(tmp_path / "fast")
    return tmp_path / "fast"


def test_a_folder_of_transformers(
    transformers_folder: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(transformers_folder))
    expected = load_tokenizer(str(tokenizer_file))
    assert tokenizer.encode([TEXT])[0].tolist() == expected.encode([TEXT])[0].tolist()
    assert tokenizer.separator_id == expected.separator_id
    out = tmp_path / "out"
    out.mkdir()
    save_for_transformers(tokenizer, out)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|endoftext|>"


def test_the_separator_may_be_named(tokenizer_file: Path) -> None:
    backend = Tokenizer.from_file(str(tokenizer_file))
    tokenizer = load_tokenizer(str(tokenizer_file), separator="a")
    assert tokenizer.separator_id == backend.token_to_id("a")


def test_what_is_no_tokenizer_is_one_line(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"model": 3}))
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    (untrained / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    nameless = tmp_path / "nameless.json"
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(nameless))
    cases = [
        (str(broken), None, "is not a file of `tokenizers`"),
        (str(tmp_path / "none.json"), None, "tokenizer: no such file"),
        (str(nameless), None, "does not say which token ends a text; name it as separator"),
        (str(tokenizer_file), "<nope>", "has no token '<nope>'"),
        ("bytes", "x", "separator: the tokenizer bytes has only byte 0"),
        (str(tmp_path), None, "neither bytes, a tokenizers file, nor a transformers tokenizer"),
        # transformers makes a tokenizer of one token of it.
        (str(untrained), None, "holds no vocabulary"),
    ]
    for name, separator, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            load_tokenizer(name, separator=separator)
        assert "\n" not in str(caught.value)


def test_which_tokenizer_a_run_had(tokenizer_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(TEXT * 50)
    config = DataConfig(source=(str(text),), tokenizer=str(tokenizer_file))
    expected = load_tokenizer(str(tokenizer_file))
    prepare(PrepareRequest(config=config, out=tmp_path / "bpe"))
    prepare(PrepareRequest(config=DataConfig(source=(str(text),)), out=tmp_path / "bytes"))

    found = tokenizer_of_run(config)
    assert found is not None
    assert found.describe() == expected.describe()
    found = tokenizer_of_run(DataConfig(source=(str(tmp_path / "bpe"),)))
    assert found is not None
    assert found.encode([TEXT])[0].tolist() == expected.encode([TEXT])[0].tolist()
    assert (found.vocab_size, found.separator_id) == (300, expected.separator_id)
    found = tokenizer_of_run(DataConfig(source=(str(tmp_path / "bytes"),)))
    assert found is not None
    assert found.name == "bytes"
    shards = str(tmp_path / "bpe" / "train-*.bin")
    assert tokenizer_of_run(DataConfig(source=(shards,), vocab_size=300)) is None
    with pytest.raises(InputError, match="cannot be found: no such file of data"):
        tokenizer_of_run(DataConfig(source=(str(tmp_path / "gone"),)))
