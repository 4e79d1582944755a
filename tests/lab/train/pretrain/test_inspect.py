"""Inspect: true numbers of what a checkpoint holds, and a damaged one refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from normuon_lab.cli import main
from normuon_lab.train.pretrain.checkpoint import newest_complete
from normuon_lab.train.pretrain.checkpoint_tensors import load_tensors_
from tests.lab.train.pretrain.conftest import words_for
from tests.lab.train.pretrain.processes import Job


def inspected(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["inspect", *map(str, words), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_everything_of_a_checkpoint_of_two_ranks(
    llama_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = inspected(capsys, llama_run)
    assert contents["step"] == 4
    assert contents["tokens"] == 4 * 4 * 32
    assert contents["world_size"] == 2
    assert contents["model"] == "llama"
    assert contents["config"]["optimizer"]["arm"] == "normuon"
    path = newest_complete(llama_run)
    assert path is not None
    assert contents["checkpoint"] == str(path)
    files = [file for file in path.iterdir() if file.name != "checkpoint.json"]
    assert contents["bytes"] == sum(file.stat().st_size for file in files)
    # Two layers of q, k, v, o, gate, up and down.
    assert len(contents["matrices"]) == 14
    for matrix in contents["matrices"]:
        m, n = matrix["shape"]
        name = matrix["name"]
        stored = {f"model.{name}": torch.zeros(m, n)}
        stored[f"optimizer.{name}.momentum_buffer"] = torch.zeros(m, n)
        load_tensors_(stored, path)
        for kind, x in zip(("weight", "momentum"), stored.values(), strict=True):
            values = torch.linalg.svdvals(x.double())
            shares = values.square() / values.square().sum()
            figures = matrix[kind]
            # The Gram matrix squares condition numbers of up to 1e7: 1e14 * 2^-53 is 1%.
            condition = float(values[0] / values[-1])
            assert figures["condition"] == pytest.approx(condition, rel=0.05)
            rank = math.exp(float(torch.special.entr(shares).sum()))
            assert figures["effective_rank"] == pytest.approx(rank, rel=1e-6)
            norms = x.double().norm(dim=1)
            cv = float(norms.std(correction=0) / norms.mean())
            assert figures["row_norm_cv"] == pytest.approx(cv, rel=1e-6)
            rms = float(x.double().square().mean().sqrt())
            assert figures["rms"] == pytest.approx(rms, rel=1e-6)


def test_adamw_and_transposed_weights(gpt2_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2's Conv1D keeps its neurons in columns; AdamW calls its momentum exp_avg."""
    contents = inspected(capsys, gpt2_run, "--matrices", "*c_fc*")
    (matrix,) = contents["matrices"]
    assert matrix["shape"] == [128, 32]
    path = newest_complete(gpt2_run)
    assert path is not None
    momentum = torch.zeros(32, 128)
    load_tensors_({f"optimizer.{matrix['name']}.exp_avg": momentum}, path)
    norms = momentum.double().norm(dim=0)
    cv = float(norms.std(correction=0) / norms.mean())
    assert matrix["momentum"]["row_norm_cv"] == pytest.approx(cv, rel=1e-6)
    # AdamW keeps two elements per element; one step number per parameter comes on top.
    elements = contents["elements"]
    assert 2.0 <= elements["optimizer"] / elements["model"] < 2.01


def test_the_table_for_people(llama_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llama_run), "--matrices", "*layers.1.mlp.up_proj*"]) == 0
    printed = capsys.readouterr().out
    assert "step 4, 512 tokens, written by 2 ranks" in printed
    assert "176x64" in printed
    assert "momentum" in printed


def test_damage_and_nothing_to_measure_are_one_line(
    llama_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = newest_complete(llama_run)
    assert path is not None
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    (copy / "__0_0.distcp").write_bytes((copy / "__0_0.distcp").read_bytes()[:-1])
    cases = [
        ([copy], "is damaged: __0_0.distcp has"),
        ([tmp_path], "is not a checkpoint and contains no complete one"),
        ([path, "--matrices", "*nothing*"], "no hidden matrix of"),
    ]
    for words, message in cases:
        assert main(["inspect", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_momentum_in_8_bits_is_read_as_numbers(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for(text_file, tmp_path / "cache", **{"momentum-dtype": "int8", "steps": 2})
    Job([*words, "--out", tmp_path / "run"], tmp_path / "logs").wait().check()
    path = newest_complete(tmp_path / "run")
    assert path is not None
    for matrix in inspected(capsys, tmp_path / "run")["matrices"]:
        m, n = matrix["shape"]
        codes = torch.zeros(m, n, dtype=torch.int8)
        absmax = torch.zeros(m, -(-n // 128))
        prefix = f"optimizer.{matrix['name']}"
        stored = {f"{prefix}.momentum_codes": codes, f"{prefix}.momentum_absmax": absmax}
        load_tensors_(stored, path)
        momentum = codes.double() * absmax.double().repeat_interleave(128, 1)[:, :n] / 127
        rms = float(momentum.square().mean().sqrt())
        assert matrix["momentum"]["rms"] == pytest.approx(rms, rel=1e-5)
