"""Writes the accuracy tables of docs/accuracy.md, and their figures as JSON.

    python benchmarks/accuracy.py

Run from the repository's root. Takes about a minute; nothing is timed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from normuon.orthogonalize import METHODS, resolve_coefficients
from normuon_lab.bench.accuracy import (
    HALF_AND_SINGLE,
    Accuracy,
    accuracy_of_methods,
    error_of_updates,
    image_of_interval,
)
from normuon_lab.machine import describe_machine, utc_now

TABLES = (("jordan", 5), ("you", 5), ("polar_express", 5), ("polar_express", 8), ("cans", 5))
PAGE = Path("docs/accuracy.md")
RESULT = Path("benchmarks/results/accuracy.json")
BEGIN, END = "<!-- tables: benchmarks/accuracy.py -->", "<!-- end of tables -->"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, figures to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def worst(found: Iterable[Accuracy]) -> tuple[str, str, str]:
    """The worst error, relative error and largest singular value of some measurements."""
    measured = list(found)
    return (
        f"{max(a.error for a in measured):.1e}",
        f"{max(a.relative_error for a in measured):.1e}",
        f"{max(a.largest_singular_value for a in measured):.3f}",
    )


def main() -> None:
    """Measures, writes the JSON, and puts the tables between the page's marks."""
    torch.manual_seed(0)
    coefficients = {key: resolve_coefficients(*key) for key in TABLES}
    ranges = {key: image_of_interval(value) for key, value in coefficients.items()}
    measured = {key: list(accuracy_of_methods(value)) for key, value in coefficients.items()}
    updates = {
        (dtype, method): error_of_updates(dtype, method)
        for dtype in HALF_AND_SINGLE
        for method in METHODS
    }
    result = {
        "command": "python benchmarks/accuracy.py",
        "created": utc_now(),
        "machine": describe_machine(num_workers=1),
        "ranges": [
            {"table": table, "steps": steps, "lowest": low, "highest": high}
            for (table, steps), (low, high) in ranges.items()
        ],
        "methods": [
            {"table": table, "steps": steps, **asdict(entry)}
            for (table, steps), entries in measured.items()
            for entry in entries
        ],
        "updates": [
            {"dtype": str(dtype), "method": method, "error_by_spectrum": errors}
            for (dtype, method), errors in updates.items()
        ],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    tables = "\n\n".join(sections(ranges, measured, updates))
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


def sections(ranges, measured, updates) -> list[str]:
    """The page's headings and tables."""
    by_table = [
        [f"`{table}`", str(steps), f"{low:.3f}", f"{high:.3f}"]
        for (table, steps), (low, high) in ranges.items()
    ]
    by_method = []
    for (table, steps), entries in measured.items():
        for dtype in HALF_AND_SINGLE:
            name = str(dtype).removeprefix("torch.")
            for method in METHODS:
                found = [e for e in entries if e.dtype == name and e.method == method]
                cut = "+".join(map(str, found[0].segments))
                by_method.append([f"`{table}` {steps}", name, f"`{method}` {cut}", *worst(found)])
    spectra = list(next(iter(updates.values())))
    by_update = [
        [f"{str(dtype).removeprefix('torch.')}, `{method}`", *[f"{e:.1e}" for e in errors.values()]]
        for (dtype, method), errors in updates.items()
    ]
    return [
        "## Singular values that come out for inputs from 0.001 to 1",
        markdown(["table", "steps", "lowest", "highest"], by_table),
        "## Error against the same polynomial in float64",
        "Worst over the spectra, matrices of 192 x 576: spectral norm of the error, its Frobenius "
        "norm relative to the result's, and the largest singular value that came out. The numbers "
        "after the method are its steps per segment.",
        markdown(["table", "dtype", "method", "error", "relative", "largest value"], by_method),
        "## Error of the whole update",
        "Ten steps of NorMuon with its defaults on gradients of each spectrum, float32 weights, "
        "against float64 throughout: error over the distance moved.",
        markdown(["`ns_dtype`, method", *spectra], by_update),
    ]


if __name__ == "__main__":
    main()
