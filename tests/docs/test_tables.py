"""Tables of the documentation are what their commands make."""

from __future__ import annotations

import json
import statistics
import sys

import pytest
import torch

from normuon import NorMuon
from tests.docs.test_docs import DOCS


def test_the_table_of_models_is_what_param_groups_does(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(DOCS))
    import make_model_table

    try:
        page = make_model_table.PAGE.read_text()
        rows = make_model_table.table()
        assert make_model_table.page_with(rows, page) == page, "run python docs/make_model_table.py"
        assert rows.count("\n|") > 40
    finally:
        for name in ("make_model_table", "model_classes"):
            sys.modules.pop(name, None)


def test_the_table_of_learning_rates_is_its_files(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS.parent / "benchmarks"))
    import learning_rates

    try:
        page = learning_rates.PAGE.read_text()
        contents = json.loads(learning_rates.RESULTS.read_text())
        assert learning_rates.page_with(learning_rates.table(contents), page) == page
    finally:
        for name in ("learning_rates", "learning_rate_tasks"):
            sys.modules.pop(name, None)


def test_the_gpu_tables_are_their_files(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS.parent / "benchmarks"))
    import gpu_table

    try:
        page = gpu_table.PAGE.read_text()
        h100, gram, h200 = gpu_table.read()
        assert gpu_table.page_with(gpu_table.table(h100, gram, h200), page) == page
        ms, ratio = (
            {
                (title, one["name"]): one[figure]
                for found in (
                    gpu_table.contenders(h100),
                    gpu_table.peers_of(gram),
                    gpu_table.of_ranks(h100),
                )
                for title, one in found
            }
            for figure in ("median_ms", "ratio_to_first")
        )
        muon, dion, kernels = "torch.optim.Muon", "dion NorMuon", "gram-newton-schulz Muon"
        readme = (DOCS.parent / "README.md").read_text()
        for model, rank in (("llama-1.1b", "rank 0 of 16"), ("gpt2-124m", "")):
            mine, theirs = ms[model, "NorMuon"], (ms[model, muon], ms[model, dion])
            cells = (f"{mine:.1f} ms", *(f"{other:.1f} ms" for other in theirs))
            assert f"| step of {model} on one H100 | {' | '.join(cells)} |" in readme
            if rank:
                cells = (f"{ms[rank, 'NorMuon']:.1f} ms", "", f"{ms[rank, dion]:.1f} ms")
                assert f"| {rank} of its row shards | {' | '.join(cells)} |" in readme
        assert (
            f"In a CUDA graph GPT-2's step takes {ms['gpt2-124m', 'NorMuon captured']:.1f} ms"
            in (" ".join(readme.split()))
        )
        words = " ".join(page.split())
        took = ms["llama-1.1b", "NorMuon"]
        assert f"On one H100 a step of llama-1.1b's matrices takes {took:.1f} ms" in words
        recipe = " ".join((DOCS / "how-to" / "cuda-graphs.md").read_text().split())
        for model in ("gpt2-124m", "rank 0 of 64", "llama-1.1b"):
            graph, eager = ms[model, "NorMuon captured"], ms[model, "NorMuon"]
            assert any(
                f"{graph:.1f}{unit} instead of {eager:.1f}" in recipe for unit in (" ms", "")
            )
        for name in (muon, dion, kernels):
            assert f"{ratio['llama-1.1b', name]:.2f} times" in words
        for suite in (h100, h200):
            training = suite["parts"]["training"]["values"]
            assert f"{training['overhead_percent']:+.1f}%" in readme
    finally:
        sys.modules.pop("gpu_table", None)


def test_the_cost_of_statistics_is_its_files():
    results = DOCS.parent / "benchmarks" / "results" / "statistics_cost.json"
    found = json.loads(results.read_text())
    cpu = found["cpu"]
    text = " ".join((DOCS / "how-to" / "telemetry.md").read_text().split())
    assert (
        f"it took {cpu['share_of_training_step']:.1%} of a training step and "
        f"{cpu['share_of_optimizer_step']:.0%} of an optimizer step more "
        f"({found['elements'] / 1e6:.1f}M parameters, {found['tokens_per_step']:,} tokens a step"
    ) in text


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ("AdamW", {"algorithm": "adamw"}),
        ("Muon", {"algorithm": "muon"}),
        ("NorMuon", {}),
        ("NorMuon, `momentum_dtype=torch.bfloat16`", {"momentum_dtype": torch.bfloat16}),
        ("NorMuon, `momentum_dtype=torch.int8`", {"momentum_dtype": torch.int8}),
    ],
    ids=str,
)
def test_the_table_of_memory_is_the_state(row, options):
    param = torch.nn.Parameter(torch.empty(4096, 4096, device="meta"))
    optimizer = NorMuon([{"params": [param], **options}])
    state = optimizer.state[param].values()
    each = sum(tensor.numel() * tensor.element_size() for tensor in state) / param.numel()
    page = (DOCS / "explanation" / "costs.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {row} |"))
    assert line.endswith(f"| {each:.3f} | {each * 1.1:.1f} GB |")


def test_the_table_of_bfloat16_weights_is_its_file():
    results = DOCS.parent / "benchmarks" / "results" / "bfloat16_weights.json"
    means = {
        (row["learning_rate"], row["weights"], row["arm"]): statistics.mean(row["final_losses"])
        for row in json.loads(results.read_text())["rows"]
    }
    page = (DOCS / "how-to" / "learning-rate.md").read_text()
    for rate in (0.0003, 0.003):
        plain = means[rate, "bfloat16", "normuon"]
        kept, exact = means[rate, "bfloat16", "normuon-kahan"], means[rate, "float32", "normuon"]
        assert f"| {rate} | {exact:.3f} | {kept:.3f} | {plain:.3f} |" in page
