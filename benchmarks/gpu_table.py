"""The GPU tables of docs/explanation/costs.md, from what `make gpu` wrote.

    python benchmarks/gpu_table.py

reads benchmarks/results/gpu_h100.json, gpu_h100_gram.json (gram-newton-schulz's Muon, on the same
card, against NorMuon again) and gpu_h200.json. Milliseconds are medians over interleaved rounds,
and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from normuon.distributed.cost import CostModel

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
H100, GRAM, H200 = (RESULTS / f"gpu_{name}.json" for name in ("h100", "h100_gram", "h200"))
PAGE = ROOT / "docs" / "explanation" / "costs.md"
START, END = "<!-- table: gpu_table.py -->\n", "<!-- end of table -->\n"
MIB = 2**20
COLUMNS = ("step", "ms", "over NorMuon's", "host ms", "device ms", "launches", "scratch")

Suite = Mapping[str, Any]


def contenders(suite: Suite) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every contender with its model; of NorMuon, which is in every race, the first race alone."""
    for model in suite["parts"]["step"]["values"]["models"]:
        seen = set()
        for one in (one for race in model["races"] for one in race["contenders"]):
            if one["name"] not in seen:
                yield model["title"], one
            seen.add(one["name"])


def peers_of(suite: Suite) -> Iterator[tuple[str, dict[str, Any]]]:
    """`contenders` without NorMuon itself."""
    return (found for found in contenders(suite) if found[1]["name"] != "NorMuon")


def of_ranks(suite: Suite) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every contender of the sharded step, with its rank."""
    for case in suite["parts"]["sharded"]["values"]["cases"]:
        for one in case["contenders"]:
            yield f"rank 0 of {case['ranks']}", one


def rows(first: str, found: Iterator[tuple[str, dict[str, Any]]]) -> list[str]:
    """A table's lines."""
    lines = [f"| {' | '.join((first, *COLUMNS))} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for title, one in found:
        scratch = one["scratch_kept_bytes"] + one["scratch_peak_bytes"]
        lines.append(
            f"| {title} | {one['name']} | {one['median_ms']:.2f} | {one['ratio_to_first']:.2f} | "
            f"{one['host_ms']:.2f} | {one['device_ms']:.2f} | {one['launches']:,} | "
            f"{scratch / MIB:,.0f} MiB |"
        )
    return lines


def table(h100: Suite, gram: Suite, h200: Suite) -> str:
    """Both tables, and what they were measured on."""
    by_model = sorted([*contenders(h100), *peers_of(gram)], key=lambda found: found[0])
    return (
        "\n".join(
            [
                *rows("matrices of", iter(by_model)),
                "",
                said(h100),
                "",
                "One rank of llama-1.1b sharded by rows, on the same card. The other ranks only "
                "pretend, so the network's time is left out:",
                "",
                *rows("rank", of_ranks(h100)),
                "",
                rates(h100),
                "",
                f"The same on another card (`benchmarks/results/gpu_h200.json`). {said(h200)}",
            ]
        )
        + "\n"
    )


def rates(suite: Suite) -> str:
    """What the planner may reckon with: a rank's share of the FLOPs over its time.

    112 matrices are dealt evenly to 16 ranks.
    """
    flops = next(
        one["flops_by_model"]
        for title, one in contenders(suite)
        if title == suite["parts"]["sharded"]["values"]["model"] and one["flops_by_model"]
    )
    launched, captured = (
        1e-12 * flops / 16 / (1e-3 * one["median_ms"])
        for rank, one in of_ranks(suite)
        if rank == "rank 0 of 16" and one["name"].startswith("NorMuon")
    )
    return (
        f"Rank 0 of 16 does {1e-12 * flops / 16:.2f} TFLOP, {launched:.0f} TFLOP/s launched and "
        f"{captured:.0f} captured; `normuon plan --flops-per-second` takes such a rate (default: "
        f"{1e-12 * CostModel().flops_per_second:.0f} TFLOP/s)."
    )


def said(suite: Suite) -> str:
    """The card, its measured roofs, and a whole training step."""
    machine = suite["parts"]["machine"]["values"]
    training = suite["parts"]["training"]["values"]
    versions, (product, *_) = machine["versions"], machine["matmul"]
    adamw, ours = (arm["median_ms"] for arm in training["arms"])
    low, high = (100 * (ratio - 1) for ratio in training["ratio_quartiles"])
    return (
        f"One {machine['name']} under torch {versions['torch']} and Triton {versions['triton']}, "
        f"which copied {machine['copy_bytes_per_second'] / 1e12:.2f} TB/s and multiplied "
        f"{product['side']} x {product['side']} matrices in bfloat16 at "
        f"{product['flops_per_second'] / 1e12:.0f} TFLOP/s. A whole training step of a 124M GPT-2, "
        f"{training['tokens_per_step']:,} tokens, took {adamw:.1f} ms with AdamW and {ours:.1f} ms "
        f"with NorMuon: {training['overhead_percent']:+.1f}% (quartiles of the blocks' ratios "
        f"{low:+.1f}% to {high:+.1f}%)."
    )


def page_with(text: str, page: str) -> str:
    """The page with its table replaced."""
    before, _, rest = page.partition(START)
    return before + START + "\n" + text + "\n" + END + rest.partition(END)[2]


def read() -> tuple[Suite, Suite, Suite]:
    """What the tables are made from."""
    h100, gram, h200 = (json.loads(path.read_text()) for path in (H100, GRAM, H200))
    return h100, gram, h200


if __name__ == "__main__":
    PAGE.write_text(page_with(table(*read()), PAGE.read_text()))
