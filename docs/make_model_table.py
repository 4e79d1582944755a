"""Which parameter of which model takes which algorithm: writes docs/how-to/models.md.

    python docs/make_model_table.py

needs transformers; the page is checked against this by a test.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from model_classes import all_models
from torch import nn

from normuon import param_groups

PAGE = Path(__file__).parent / "how-to" / "models.md"
START, END = "<!-- table: make_model_table.py -->\n", "<!-- end of table -->\n"

HEAD, EMBEDDING = "output head", "embedding"


def short_name(name: str) -> str:
    """A parameter's layer without numbers: ``layers.*.mlp.up_proj`` is ``up_proj``."""
    segments = [s for s in name.removesuffix(".weight").split(".") if not s.isdigit()]
    return re.sub(r"_\d+$", "", segments[-1]) if segments else name


def cell(names: Iterable[str]) -> str:
    """Names once each, in their order."""
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names)) or "-"


def cells(model: nn.Module) -> str:
    """What a line of the table says of a model."""
    columns: dict[str, list[str]] = {"normuon": [], HEAD: [], EMBEDDING: [], "rest": []}
    for group in param_groups(model):
        for (param_name, param), reason in zip(group["params"], group["reasons"], strict=True):
            full = param_name.removesuffix(".weight")
            if group["algorithm"] == "normuon":
                columns["normuon"].append(short_name(param_name))
            elif param.ndim < 2:
                continue
            elif reason.startswith(HEAD):
                columns[HEAD].append(full)
            elif reason.startswith(EMBEDDING):
                tied = " (tied head)" if "tied to the output head" in reason else ""
                columns[EMBEDDING].append(short_name(param_name) + tied)
            elif not reason.startswith(("norm", "bias")):
                what = reason.split(":")[0].split(" [")[0]
                columns["rest"].append(f"{short_name(param_name)}: {what}")
    return " | ".join(cell(names) for names in columns.values())


def table() -> str:
    """The whole table: models whose layers are treated alike share a line."""
    names: dict[str, list[str]] = {}
    for name, model in all_models():
        names.setdefault(cells(model), []).append(name)
    lines = [
        "| model | NorMuon | AdamW: output head | AdamW: embeddings | AdamW: other |",
        "|---|---|---|---|---|",
        *(f"| {', '.join(alike)} | {row} |" for row, alike in names.items()),
    ]
    return "\n".join(lines) + "\n"


def page_with(text: str, page: str) -> str:
    """The page with its table replaced."""
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    return before + START + "\n" + text + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page_with(table(), PAGE.read_text()))
