"""Tables of how evenly, and with how many bytes, matrices are distributed over ranks.

    python benchmarks/plan_table.py --out benchmarks/results

writes plan_table.md and plan_table.json there and prints the former. Counted, not timed; only
`plan_seconds` and `plan_peak_bytes` are measured, the latter by tracemalloc in another process, so
that neither finds the layouts that the other made.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import tracemalloc
from pathlib import Path
from typing import Any

from normuon.distributed.cost import CostModel, format_bytes
from normuon.distributed.plan import DEFAULT_BUCKET_BYTES
from normuon_lab.machine import describe_machine, utc_now
from normuon_lab.plan.contents import PlanRequest, plan_contents, plan_model
from normuon_lab.plan.mesh import Mesh
from normuon_lab.plan.model_matrices import ModelShapes, model_shapes
from normuon_lab.plan.text import format_ratio

COMMAND = "python benchmarks/plan_table.py --out benchmarks/results"
MODELS = (
    *("gpt2-124m", "gpt2-350m", "llama-1.1b", "llama-5.4b"),
    *("llama3-8b", "llama3-70b", "mixtral-8x7b"),
)
WORLD_SIZES = (8, 16, 64, 256, 1024)
COLUMNS = {
    "model": "model",
    "world_size": "ranks",
    "imbalance": "plan",
    "packing_imbalance": "plan / packing bound",
    "round_robin": "round-robin",
    "padding": "padding",
    "replicate": "replicate",
    "bytes_ratio": "plan",
    "round_robin_bytes_ratio": "round-robin",
    "padding_bytes_ratio": "padding",
    "replicate_bytes_ratio": "replicate",
    "plan_seconds": "planned in",
    "plan_peak_bytes": "peak",
}


def request_for(mesh: Mesh) -> PlanRequest:
    """Everything at its default."""
    return PlanRequest(
        mesh=mesh,
        balance="flops",
        bucket_bytes=DEFAULT_BUCKET_BYTES,
        wire_dtype="bfloat16",
        cost_model=CostModel(),
    )


def table_row(model: ModelShapes, world_size: int) -> dict[str, Any]:
    """One model on one number of FSDP2 ranks."""
    peak = peak_bytes(model, world_size)
    planned = plan_model(model, request_for(Mesh(dp_shard=world_size)))
    contents = plan_contents(planned)
    others = contents["alternatives"]
    least = contents["bytes_least_total"]
    return {
        "model": model.name,
        "world_size": world_size,
        "num_matrices": contents["model"]["num_matrices"],
        "imbalance": contents["imbalance"],
        "packing_imbalance": contents["packing_imbalance"],
        **{name: others[name]["imbalance"] for name in others},
        "bytes_sent_total": contents["bytes_sent_total"],
        "bytes_least_total": least,
        "bytes_ratio": contents["bytes_sent_total"] / least,
        **{f"{name}_bytes_ratio": others[name]["bytes_sent_total"] / least for name in others},
        "predicted_step_seconds": contents["predicted_step_seconds"],
        **{
            f"{name}_predicted_step_seconds": others[name]["predicted_step_seconds"]
            for name in others
        },
        "plan_seconds": contents["plan_seconds"],
        "plan_peak_bytes": peak,
    }


def peak_bytes(model: ModelShapes, world_size: int) -> int:
    """Most memory that planning holds at once, in a child process that has no layout yet."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_traced_peak, (model.name, world_size))


def _traced_peak(name: str, world_size: int) -> int:
    model = model_shapes(name)
    tracemalloc.start()
    plan_model(model, request_for(Mesh(dp_shard=world_size)))
    return tracemalloc.get_traced_memory()[1]


def to_markdown(rows: list[dict[str, Any]], record: dict[str, Any]) -> str:
    """The rows as a table, with what made them."""
    packages = record["machine"]["packages"]
    lines = [
        "# Imbalance and bytes of a step, under FSDP2",
        "",
        "Imbalance: FLOPs of the busiest rank over the makespan bound (the largest of total / W,",
        "the largest matrix, and for every k the k + 1 smallest among the k W + 1 largest",
        "matrices). Where it exceeds 1, `plan / packing bound` says whether less is possible:",
        "1.000 there means that it is not. Bytes: sent by all ranks in one step, over the least",
        "that the plan's owners must send. Round-robin is the paper's sort and deal; replicate",
        "lets every rank gather and compute everything; padding fills same-shape groups up to W,",
        "and leaves experts on ranks that store them whole: that is why it sends less for Mixtral.",
        "",
        "GPT-2 stores [in, out], so FSDP2's shards split its neurons' inputs and each shard gets",
        "all second moments of its matrix: that is what its bytes exceed the least by.",
        "",
        "| | | imbalance | | | | | bytes / least | | | | planning | |",
        "|" + "---|" * len(COLUMNS),
        "| " + " | ".join(COLUMNS.values()) + " |",
    ]
    lines += ["| " + " | ".join(_cell(name, row[name]) for name in COLUMNS) + " |" for row in rows]
    lines += [
        "",
        f"Made by `{record['command']}` on {record['created']} with one thread of "
        f"{record['machine']['processor']}, Python {record['machine']['python']}, torch "
        f"{packages['torch']}, transformers {packages['transformers']}. Mesh: dp_shard = ranks.",
        "",
    ]
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if name == "plan_seconds":
        return f"{1e3 * value:.0f} ms"
    if name == "plan_peak_bytes":
        return format_bytes(value)
    return format_ratio(value) if isinstance(value, float) else str(value)


def main() -> None:
    """Plan everything, print the table, and write it when told where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="existing folder for the .md and .json files")
    arguments = parser.parse_args()
    started = time.perf_counter()
    rows = [
        table_row(model, world_size)
        for model in map(model_shapes, MODELS)
        for world_size in WORLD_SIZES
    ]
    record = {
        "command": COMMAND,
        "created": utc_now(),
        "machine": describe_machine(num_workers=1),
        "total_seconds": time.perf_counter() - started,
        "rows": rows,
    }
    text = to_markdown(rows, record)
    print(text)
    if arguments.out is not None:
        (arguments.out / "plan_table.md").write_text(text, encoding="utf-8")
        (arguments.out / "plan_table.json").write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
