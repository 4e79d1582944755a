"""Export: a folder that transformers loads, with the checkpoint's weights to the bit."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from normuon_lab.cli import main
from normuon_lab.data.tokenizer import load_tokenizer, save_for_transformers
from normuon_lab.train.pretrain.checkpoint import newest_complete, read_description
from normuon_lab.train.pretrain.checkpoint_tensors import load_tensors_, model_of
from normuon_lab.train.pretrain.export import sample
from tests.lab.conftest import command


def stored_weight(run: Path, name: str, shape: torch.Size) -> torch.Tensor:
    """One weight, read from the checkpoint by its name."""
    weight = torch.zeros(shape)
    path = newest_complete(run)
    assert path is not None
    load_tensors_({f"model.{name}": weight}, path)
    return weight


def test_two_ranks_checkpoint_becomes_a_folder_of_transformers(
    llama_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "exported"
    path = newest_complete(llama_run)
    assert path is not None
    assert read_description(path).world_size == 2
    assert main(["export", str(llama_run), str(out), "--prompt", "neuron", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"step-00000004 is exported to {out}" in printed
    assert "neuron" in printed
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in out.parent.iterdir()] == ["exported"]

    model = AutoModelForCausalLM.from_pretrained(out)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored_weight(llama_run, name, parameter.shape)), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "naïve 日本\0 end\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tied_head_and_a_tokenizer_of_prepared_data(
    gpt2_run: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    out = tmp_path / "exported"
    words = ["export", str(gpt2_run), str(out), "--dtype", "bfloat16", "--sample-tokens", "0"]
    assert main(words) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.transformer.wte.weight
    weight = model.transformer.wte.weight
    stored = stored_weight(gpt2_run, "transformer.wte.weight", weight.shape)
    assert torch.equal(weight, stored.bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<|endoftext|>"
    text = "momentum matrix 日本"
    assert tokenizer.encode(text) == Tokenizer.from_file(str(tokenizer_file)).encode(text).ids


def test_a_sample_follows_its_seed(llama_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    assert main(["export", str(llama_run), str(out), "--sample-tokens", "0"]) == 0
    state = torch.get_rng_state()
    first, again, other = (
        sample(out, prompt="row", num_tokens=20, seed=seed) for seed in (0, 0, 1)
    )
    assert first.startswith("row")
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_the_meta_model_has_the_checkpoints_shapes(gpt2_run: Path) -> None:
    path = newest_complete(gpt2_run)
    assert path is not None
    model = model_of(read_description(path), device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.get_input_embeddings().weight.shape == (300, 32)


@pytest.fixture
def damaged(llama_run: Path, tmp_path: Path) -> Path:
    """A checkpoint with one flipped bit."""
    path = newest_complete(llama_run)
    assert path is not None
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    file = copy / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return copy


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    llama_run: Path,
    gpt2_run: Path,
    damaged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    cases = [
        ([tmp_path / "nowhere", out], "nowhere: no such folder"),
        ([damaged, out], "is damaged: the bytes of __1_0.distcp have changed"),
        ([llama_run, full], "is not empty; name another folder"),
        ([llama_run, full / "mine.txt"], "mine.txt is a file; name a folder"),
        ([gpt2_run, out, "--tokenizer", tmp_path / "no.json"], "tokenizer: no such file"),
        ([llama_run, out, "--sample-tokens", -1], "--sample-tokens -1: give at least 0"),
    ]
    for words, message in cases:
        assert main(["export", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_a_tokenizer_of_another_model_is_refused(
    llama_run: Path, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(llama_run), str(tmp_path / "out"), "--tokenizer", str(tokenizer_file)]
    assert main(words) == 2
    assert "the tokenizer has 300 tokens and the model 256" in capsys.readouterr().err
    assert main([*words[:-1], "none"]) == 0
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_data_that_is_gone_asks_for_the_tokenizer(
    gpt2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = gpt2_run.parent / "data"
    moved = data.rename(tmp_path / "moved")
    try:
        assert main(["export", str(gpt2_run), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "cannot be found: no such file of data" in error
        assert "name the tokenizer with --tokenizer, or give --tokenizer none" in error
        words = ["export", str(gpt2_run), str(tmp_path / "out"), "--sample-tokens", "0"]
        assert main([*words, "--tokenizer", str(moved / "tokenizer.json")]) == 0
    finally:
        moved.rename(data)


def test_what_is_on_the_hub_alone_is_asked_for_once(
    llama_run: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    """The Hub's client tried twelve times, with 48 seconds of waiting, before the error came."""
    snapshot = tmp_path / "cache" / "models--somebody--mine" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_for_transformers(load_tokenizer(str(tokenizer_file)), snapshot)
    # A model's repository has one, and AutoTokenizer looks for it first.
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "cache")}
    for name, offline, message in (
        ("nobody/nothing", "0", "not on this machine, and the Hub cannot be reached: "),
        ("nobody/nothing", "1", "not on this machine, and HF_HUB_OFFLINE is set"),
        # From the cache, although the Hub cannot be reached: it is read, and does not fit.
        ("somebody/mine", "0", "the tokenizer has 300 tokens and the model 256"),
    ):
        done = subprocess.run(
            command(["export", llama_run, tmp_path / "out", "--tokenizer", name]),
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, **nowhere, "HF_HUB_OFFLINE": offline},
            check=False,
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
