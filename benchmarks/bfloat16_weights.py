"""What bfloat16 weights cost at two learning rates, with and without a Kahan sum.

    python benchmarks/bfloat16_weights.py --out benchmarks/results/bfloat16_weights.json

Runs `normuon compare` four times, at each rate with bfloat16 and with float32 weights, and keeps
the final held-out losses. Finished runs under --runs are kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = "python benchmarks/bfloat16_weights.py --out benchmarks/results/bfloat16_weights.json"
RATES = ("0.0003", "0.003")
ARMS = {"bfloat16": ("normuon", "normuon-kahan"), "float32": ("normuon",)}
SMALL = (
    *("--layers", "2", "--width", "64", "--heads", "2", "--mlp-width", "176"),
    *("--sequence-length", "64", "--steps", "300", "--evals", "6", "--eval-tokens", "4096"),
    *("--seeds", "3"),
)


def compared(rate: str, weights: str, folder: Path) -> dict[str, Any]:
    """The results of one comparison."""
    out = folder / f"{weights}-{rate}"
    command = [sys.executable, "-m", "normuon_lab", "compare", *SMALL, "--weights", weights]
    command += ["--arms", *ARMS[weights], "--lr", *(f"{arm}={rate}" for arm in ARMS[weights])]
    command += ["--out", str(out), *(["--resume"] if (out / "results.json").exists() else [])]
    subprocess.run(command, check=True)
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def main() -> None:
    """Compare, print the means, and write where told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/bfloat16_weights"))
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"command": COMMAND, "rows": []}
    for rate in RATES:
        for weights, arms in ARMS.items():
            results = compared(rate, weights, arguments.runs)
            record |= {key: results[key] for key in ("created", "machine", "corpus")}
            for arm in arms:
                losses = [run["final_loss"] for run in results["runs"] if run["arm"] == arm]
                row = {"learning_rate": float(rate), "weights": weights, "arm": arm}
                record["rows"].append(row | {"final_losses": sorted(losses)})
                print(f"{rate} {weights} {arm}: {statistics.mean(losses):.3f}", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
