"""What one optimizer step costs beside peers: GPT-2's matrices, Llama's, and how the cost grows.

    python benchmarks/step.py gpt2 --threads 2 --dion PATH --authors FILE
    python benchmarks/step.py llama --threads 2
    python benchmarks/step.py growth --threads 2

write benchmarks/results/step_{gpt2,llama,growth}.json; the last one draws
docs/figures/step_growth.svg too. The measuring is `normuon bench`'s. Reports, beside what was asked
of each figure; passes or fails on nothing. `growth --sizes` measures some sizes again and keeps the
others that the file has.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from operator import truediv
from pathlib import Path
from typing import Any

# Read when torch is loaded: its profiler otherwise comments on each use on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from matplotlib.figure import Figure
from rich.console import Console

from normuon_lab.atomic_files import read_json, write_json
from normuon_lab.bench.figure import machine_words
from normuon_lab.bench.matrices import parse_shapes
from normuon_lab.bench.peers import PeerPaths
from normuon_lab.bench.race import BenchRequest, polar_error, run_bench
from normuon_lab.bench.text import print_bench
from normuon_lab.errors import InputError
from normuon_lab.plot_style import INK, PALETTE, save_figure, style_axes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GROWTH_FIGURE = ROOT / "docs" / "figures" / "step_growth.svg"
GROWTH_KIND = "normuon step growth"
GROWTH_SCHEMA_VERSION = 1
SIZES = (512, 768, 1024, 1536, 2048, 3072, 4096)
ASPECTS = {"square": 1, "4:1": 4}

OURS = "NorMuon auto float32"
OURS_BFLOAT16 = "NorMuon auto bfloat16"
OURS_POLAR_EXPRESS = "NorMuon auto float32 polar_express"
OPTIMUON = "optimuon Gram float32"
TORCH = "torch.optim.Muon"

# Left out: gram and newton_schulz compiled, and a peer in float16, which CPUs emulate.
GPT2_CONTENDERS = (
    *(OURS, "NorMuon newton_schulz float32", "NorMuon gram float32", f"{OURS} compile"),
    *(f"{OURS} kernels", OURS_POLAR_EXPRESS, OURS_BFLOAT16, f"{OURS_BFLOAT16} polar_express"),
    *("torch*", "optimuon*", "pytorch_optimizer Muon bfloat16", "heavyball*", "muon*", "dion*"),
    "authors*",
)
FEW_CONTENDERS = (OURS, OURS_BFLOAT16, TORCH, OPTIMUON)
GPT2_LAYER = "4x768x768,3072x768,768x3072"
"""With q, k and v apart."""
LLAMA_SHAPES = "4096x4096,1024x4096,14336x4096"

# (what, ours, whose, at most)
ASKED_RATIOS = (
    ("step time over optimuon's float32 Gram", OURS, OPTIMUON, 0.60),
    ("the same, its polynomial in both", OURS_POLAR_EXPRESS, OPTIMUON, 0.60),
    ("step time over torch.optim.Muon", OURS, TORCH, 1 / 8),
    ("the same, bfloat16 in both", OURS_BFLOAT16, TORCH, None),
)


def bench(title: str, arguments: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """One benchmark, printed."""
    request = BenchRequest(
        title=title,
        device=torch.device("cpu"),
        paths=PeerPaths(dion=arguments.dion, authors=arguments.authors),
        dtypes=("float32", "bfloat16"),
        rounds=arguments.repeats,
        threads=arguments.threads,
        command=arguments.command,
        **options,
    )
    contents = run_bench(request, say=_say)
    print_bench(contents, Console())
    return contents


def write_with_asked(contents: Mapping[str, Any], path: Path) -> None:
    """Prints a benchmark's figures beside what was asked of them, and writes both."""
    asked = asked_of(contents)
    for line in asked:
        limit = "" if line["at_most"] is None else f" (asked: at most {line['at_most']:.3g})"
        print(f"{line['what']}: {line['measured']:.3g}{limit}")
    write_json(path, {**contents, "asked": asked})


def asked_of(contents: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was asked, as far as its contenders ran."""
    by_name = {values["name"]: values for values in contents["contenders"]}
    ours = by_name[OURS]
    lines = [
        {
            "what": what,
            "measured": ratio_of(by_name[ours_name], by_name[their_name]),
            "at_most": limit,
        }
        for what, ours_name, their_name, limit in ASKED_RATIOS
        if ours_name in by_name and their_name in by_name
    ]
    for our_name, their_name in ((OURS, TORCH), (OURS_POLAR_EXPRESS, OPTIMUON)):
        if our_name in by_name and their_name in by_name and by_name[our_name]["polar"]:
            theirs = polar_error(by_name[their_name])
            mine = polar_error(by_name[our_name])
            what = f"polar error of {our_name} over that of {their_name}"
            lines.append({"what": what, "measured": mine / theirs, "at_most": 1.0})
    scratch = ours["scratch_bytes"] / contents["largest_class_bytes"]
    state = ours["state_elements"] / contents["normuon_state_elements"]
    return [
        *lines,
        {"what": "time over its FLOP bound", "measured": ours["time_over_bound"], "at_most": 1.25},
        {"what": "scratch over the largest class", "measured": scratch, "at_most": 2.0},
        {"what": "state over m (n + 1)", "measured": state, "at_most": 1.0},
    ]


def ratio_of(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Median over rounds of one contender's time over another's."""
    return statistics.median(map(truediv, ours["step_ms"], theirs["step_ms"]))


def gpt2(arguments: argparse.Namespace) -> None:
    """Layers of GPT-2 124M, everyone."""
    contents = bench(
        f"gpt2-124m, {arguments.layers} layers",
        arguments,
        matrices=parse_shapes(",".join([GPT2_LAYER] * arguments.layers)),
        coefficients=("jordan", "polar_express"),
        only=GPT2_CONTENDERS,
    )
    write_with_asked(contents, arguments.out / "step_gpt2.json")


def llama(arguments: argparse.Namespace) -> None:
    """Three matrices of a model like Llama 3 8B, the few contenders that matter at this size."""
    contents = bench(
        "three matrices of Llama 3 8B",
        arguments,
        matrices=parse_shapes(LLAMA_SHAPES),
        only=FEW_CONTENDERS,
    )
    write_with_asked(contents, arguments.out / "step_llama.json")


def growth(arguments: argparse.Namespace) -> None:
    """One matrix at a time, from 512 to 4096, square and four times as tall."""
    path = arguments.out / "step_growth.json"
    measured: dict[tuple[int, str], dict[str, Any]] = {}
    if path.exists() and set(arguments.sizes) != set(SIZES):
        earlier = read_json(path, kind=GROWTH_KIND, schema_version=GROWTH_SCHEMA_VERSION)
        measured = {(row["size"], row["aspect"]): row for row in earlier["rows"]}
    for size in arguments.sizes:
        for aspect, factor in ASPECTS.items():
            shape = f"{factor * size}x{size}"
            contents = bench(
                f"one matrix of {shape}",
                arguments,
                matrices=parse_shapes(shape),
                only=FEW_CONTENDERS,
                with_polar=False,
            )
            measured[size, aspect] = {"size": size, "aspect": aspect, "bench": contents}
            rows = [measured[key] for key in sorted(measured)]
            values = {
                "kind": GROWTH_KIND,
                "schema_version": GROWTH_SCHEMA_VERSION,
                "command": arguments.command,
                "rows": rows,
            }
            write_json(path, values)
    save_figure(growth_figure(values), arguments.figure)


def growth_figure(values: Mapping[str, Any]) -> Figure:
    """Milliseconds per step over the short side, both logarithmic; one panel per aspect."""
    figure = Figure(figsize=(10, 4.6))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(ASPECTS), sharey=True)
    for axes, (aspect, factor) in zip(panels, ASPECTS.items(), strict=True):
        rows = [row for row in values["rows"] if row["aspect"] == aspect]
        _draw_growth(axes, rows)
        axes.set_title(f"{'' if factor == 1 else factor}n x n".strip(), color=INK)
        axes.set_xlabel("n", color=INK)
    panels[0].set_ylabel("ms per step of one matrix (median)", color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(machine_words(values["rows"][0]["bench"]), color=INK)
    return figure


def _draw_growth(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    sizes = [row["size"] for row in rows]
    for name, color, marker in zip(FEW_CONTENDERS, PALETTE, "osD^", strict=False):
        found = [
            (row["size"], values)
            for row in rows
            for values in row["bench"]["contenders"]
            if values["name"] == name
        ]
        if not found:
            continue
        axes.plot(
            [size for size, _ in found],
            [values["median_ms"] for _, values in found],
            color=color,
            marker=marker,
            label=name,
        )
        if name == OURS:
            axes.plot(
                [size for size, _ in found],
                [values["bound_ms"] for _, values in found],
                color=color,
                linestyle="--",
                label="its FLOPs at the measured rate",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    style_axes(axes, grid_axis="both")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure one table and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", choices=("gpt2", "llama", "growth"))
    parser.add_argument("--repeats", type=int, help="rounds; 7 for gpt2, 3 for the others")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2, help="layers of GPT-2, of 12")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of growth")
    parser.add_argument("--dion", type=Path, help="a checkout of github.com/microsoft/dion")
    parser.add_argument("--authors", type=Path, help="normuon.py of github.com/zichongli5/NorMuon")
    parser.add_argument("--out", type=Path, default=RESULTS, help="existing folder")
    parser.add_argument("--figure", type=Path, default=GROWTH_FIGURE)
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (7 if arguments.table == "gpt2" else 3)
    arguments.command = _recorded_command()
    try:
        {"gpt2": gpt2, "llama": llama, "growth": growth}[arguments.table](arguments)
    except InputError as error:
        parser.error(str(error))


def _recorded_command() -> str:
    """What was typed, but for the paths of this machine."""
    words = list(sys.argv[1:])
    for index, word in enumerate(words[:-1]):
        if word in ("--dion", "--authors", "--out", "--figure"):
            words[index + 1] = "PATH"
    return shlex.join(["python", "benchmarks/step.py", *words])


if __name__ == "__main__":
    main()
