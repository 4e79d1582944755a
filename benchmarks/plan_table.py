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
from normuon_lab.plan.text import format_ratio, format_seconds

COMMAND = "python benchmarks/plan_table.py --out benchmarks/results"
MODELS = (
    *("gpt2-124m", "gpt2-350m", "llama-1.1b", "llama-5.4b"),
    *("llama3-8b", "llama3-70b", "mixtral-8x7b"),
)
WORLD_SIZES = (8, 16, 64, 256, 1024)
MORE_RANKS_THAN_MATRICES = (("llama-1.1b", 256), ("llama3-8b", 1024), ("llama3-70b", 2048))
BYTES_PER_SECOND = (4e11, 5e10)
"""What one rank sends: within a node of H100s, and between nodes."""
TEAM_COLUMNS = {
    "model": "model",
    "world_size": "ranks",
    "bytes_per_second": "GB/s",
    "way": "",
    "busiest_over_mean": "busiest / mean",
    "imbalance": "busiest / bound",
    "bytes_sent_busiest": "sent by the busiest",
    "predicted_step_seconds": "predicted step",
    "plan_seconds": "planned in",
}
WAYS = {
    "plan": "teams",
    "owners": "one owner each",
    "replicate": "every rank computes everything",
    "all_reduce": "one all-reduce per step over shards",
}
COLUMNS = {
    "model": "model",
    "world_size": "ranks",
    "busiest_over_mean": "plan / mean",
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


def request_for(mesh: Mesh, **rates: float) -> PlanRequest:
    """Everything at its default, but for given rates, at which teams are planned too."""
    return PlanRequest(
        mesh=mesh,
        balance="flops",
        bucket_bytes=DEFAULT_BUCKET_BYTES,
        wire_dtype="bfloat16",
        cost_model=CostModel(**rates),
        teams="auto" if rates else "off",
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
        "busiest_over_mean": contents["busiest_over_mean"],
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


def team_rows(name: str, world_size: int, bytes_per_second: float) -> list[dict[str, Any]]:
    """More ranks than large matrices: teams, one owner each, and what others do."""
    request = request_for(Mesh(dp_shard=world_size), bytes_per_second=bytes_per_second)
    contents = plan_contents(plan_model(model_shapes(name), request))
    schemes = {"plan": contents} | contents["alternatives"]
    keys = TEAM_COLUMNS.keys() - {"model", "world_size", "bytes_per_second", "way"}
    return [
        {
            "model": name,
            "world_size": world_size,
            "bytes_per_second": bytes_per_second,
            "way": WAYS[way],
            **{key: schemes[way][key] for key in keys},
        }
        for way in WAYS
    ]


def peak_bytes(model: ModelShapes, world_size: int) -> int:
    """Most memory that planning holds at once, in a child process that has no layout yet."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_traced_peak, (model.name, world_size))


def _traced_peak(name: str, world_size: int) -> int:
    model = model_shapes(name)
    tracemalloc.start()
    plan_model(model, request_for(Mesh(dp_shard=world_size)))
    return tracemalloc.get_traced_memory()[1]


def to_markdown(record: dict[str, Any]) -> str:
    """The rows as a table, with what made them."""
    packages, rows = record["machine"]["packages"], record["rows"]
    lines = [
        "# Imbalance and bytes of a step, under FSDP2",
        "",
        "Imbalance: FLOPs of the busiest rank over the makespan bound (the largest of total / W,",
        "the largest matrix, and for every k the k + 1 smallest among the k W + 1 largest",
        "matrices); `plan / mean` is over total / W, which one large matrix may exceed by far.",
        "Where it exceeds 1, `plan / packing bound` says whether less is possible:",
        "1.000 there means that it is not. Bytes: sent by all ranks in one step, over the least",
        "that the plan's owners must send. Round-robin is the paper's sort and deal; replicate",
        "lets every rank gather and compute everything; padding fills same-shape groups up to W,",
        "and leaves experts on ranks that store them whole: that is why it sends less for Mixtral.",
        "",
        "GPT-2 stores [in, out], so FSDP2's shards split its neurons' inputs and each shard gets",
        "all second moments of its matrix: that is what its bytes exceed the least by.",
        "",
        "| | | | imbalance | | | | | bytes / least | | | | planning | |",
        "|" + "---|" * len(COLUMNS),
        "| " + " | ".join(COLUMNS.values()) + " |",
    ]
    lines += ["| " + " | ".join(_cell(name, row[name]) for name in COLUMNS) + " |" for row in rows]
    lines += [
        "",
        "## More ranks than large matrices",
        "",
        'With `teams="auto"` up to eight ranks divide a matrix where that shortens the predicted',
        "step. FLOPs are over the mean of one owner each, so that teams, whose square products are",
        "half of symmetric ones, may be below 1. Predicted at 2e14 FLOP/s, 20 microseconds a",
        "message between ranks and 10 within a team, which is one node; the last two ways are what",
        "torch.optim.Muon does on DTensors, and Newton-Schulz on shards as tensor parallelism has",
        "it.",
        "",
        "| " + " | ".join(TEAM_COLUMNS.values()) + " |",
        "|" + "---|" * len(TEAM_COLUMNS),
        *(
            "| " + " | ".join(_cell(name, row[name]) for name in TEAM_COLUMNS) + " |"
            for row in record["teams"]
        ),
        "",
        f"Made by `{record['command']}` on {record['created']} with one thread of "
        f"{record['machine']['processor']}, Python {record['machine']['python']}, torch "
        f"{packages['torch']}, transformers {packages['transformers']}. Mesh: dp_shard = ranks.",
        "",
    ]
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if name == "bytes_per_second":
        return f"{value / 1e9:.0f}"
    if name == "predicted_step_seconds":
        return format_seconds(value)
    if name == "plan_seconds":
        return f"{1e3 * value:.0f} ms"
    if name in ("plan_peak_bytes", "bytes_sent_busiest"):
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
        "teams": [
            row
            for name, world_size in MORE_RANKS_THAN_MATRICES
            for bytes_per_second in BYTES_PER_SECOND
            for row in team_rows(name, world_size, bytes_per_second)
        ],
    }
    text = to_markdown(record)
    print(text)
    if arguments.out is not None:
        (arguments.out / "plan_table.md").write_text(text, encoding="utf-8")
        (arguments.out / "plan_table.json").write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
