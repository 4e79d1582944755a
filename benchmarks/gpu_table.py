"""The GPU table of docs/explanation/costs.md, from what `make gpu` wrote.

    python benchmarks/gpu_table.py

reads benchmarks/results/gpu_h200.json. Milliseconds are medians over interleaved rounds, and a
ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_h200.json"
PAGE = ROOT / "docs" / "explanation" / "costs.md"
START, END = "<!-- table: gpu_table.py -->\n", "<!-- end of table -->\n"
MIB = 2**20

Suite = Mapping[str, Any]


def contenders(suite: Suite) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every contender with its model."""
    for model in suite["parts"]["step"]["values"]["models"]:
        for race in model["races"]:
            for one in race["contenders"]:
                yield model["title"], one


def table(suite: Suite) -> str:
    """The table, and what it was measured on."""
    lines = [
        "| matrices of | step | ms | over NorMuon's | host ms | device ms | launches | scratch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, one in contenders(suite):
        scratch = one["scratch_kept_bytes"] + one["scratch_peak_bytes"]
        lines.append(
            f"| {title} | {one['name']} | {one['median_ms']:.2f} | {one['ratio_to_first']:.2f} | "
            f"{one['host_ms']:.2f} | {one['device_ms']:.2f} | {one['launches']:,} | "
            f"{scratch / MIB:,.0f} MiB |"
        )
    return "\n".join([*lines, "", said(suite)]) + "\n"


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


if __name__ == "__main__":
    PAGE.write_text(page_with(table(json.loads(RESULTS.read_text())), PAGE.read_text()))
