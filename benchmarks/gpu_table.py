"""The GPU table of docs/explanation/costs.md, from what `make gpu` wrote.

    python benchmarks/gpu_table.py

reads benchmarks/results/gpu_h200.json and gpu_h200_peers.json, two runs of the suite on one kind of
card. Milliseconds are medians over interleaved rounds; a ratio is the median of a run's own rounds,
so that no figure of one run is divided by one of the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = [ROOT / "benchmarks" / "results" / f"gpu_h200{part}.json" for part in ("", "_peers")]
PAGE = ROOT / "docs" / "explanation" / "costs.md"
START, END = "<!-- table: gpu_table.py -->\n", "<!-- end of table -->\n"
MIB = 2**20

Suite = Mapping[str, Any]


def contenders(suites: list[Suite]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every contender of every race with its model, the first of a name only."""
    seen = set()
    models: dict[str, list[dict[str, Any]]] = {}
    for suite in suites:
        for model in suite["parts"]["step"]["values"]["models"]:
            models.setdefault(model["title"], []).extend(model["races"])
    for title, races in models.items():
        for race in races:
            for one in race["contenders"]:
                if (title, one["name"]) not in seen:
                    seen.add((title, one["name"]))
                    yield title, one


def table(suites: list[Suite]) -> str:
    """The table, and what it was measured on."""
    lines = [
        "| matrices of | step | ms | over NorMuon's | host ms | device ms | launches | scratch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, one in contenders(suites):
        scratch = one["scratch_kept_bytes"] + one["scratch_peak_bytes"]
        lines.append(
            f"| {title} | {one['name']} | {one['median_ms']:.2f} | {one['ratio_to_first']:.2f} | "
            f"{one['host_ms']:.2f} | {one['device_ms']:.2f} | {one['launches']:,} | "
            f"{scratch / MIB:,.0f} MiB |"
        )
    return "\n".join([*lines, "", said(suites[0])]) + "\n"


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


def read() -> list[Suite]:
    """The files."""
    return [json.loads(path.read_text()) for path in RESULTS]


if __name__ == "__main__":
    PAGE.write_text(page_with(table(read()), PAGE.read_text()))
