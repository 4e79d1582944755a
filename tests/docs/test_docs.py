"""Every block of Python in the documentation runs, and every page and file that it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import free_port

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if BLOCK.search(page.read_text())]

EXPORTED = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
config = LlamaConfig(
    vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
LlamaForCausalLM(config).save_pretrained("exported")
words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained("exported")
"""

BEFORE = {"lab/diagnostics.md": EXPORTED}
"""What a reader of a page has already, as code."""


SAID = {
    "tutorial.md": (
        r"^mix\.weight .* normuon .* Linear$",
        r"^lm_head\.weight .* adamw .* output head$",
        r"^loss after 100 steps: (0\.0\d|\d\.\d+e-)",
        r"^group0\.normuon/update_rms +0\.0004$",
    ),
    "how-to/name-heads.md": (r"^layers\.0\.qkv\.weight .* 12 of 8x32 ",),
    "how-to/parametrizations.md": (
        r"^2\.parametrizations\.weight\.original1 .* adamw .* part of a parametrized weight",
        r"^spectral_norm: loss 0\.0",
        r"^weight_norm: loss 0\.0",
        r"^2\.weight .* normuon .* Linear$",
    ),
    "how-to/rnn.md": (r"^rnn\.weight_hh_l1 .* 1 of 64x64, 1 of 64x64, ", r"^loss [01]\."),
    "how-to/lora.md": (
        r"^0\.lora_A .* 1 of 4x16 .* low-rank adapter",
        r"^loss 0\.[0-4]",
        r"^B .* 1 of 32x4 .* 1 ",
    ),
    "how-to/learning-rate.md": (r"^0\.0036\d*$",),
    "how-to/cuda-graphs.md": (r"^loss 0\.",),
    "how-to/telemetry.md": (r"^0 0\.00\d+$", r"^10 0\.00\d+$"),
    "how-to/debugging.md": (r"^\{0: 1, 1: 0\}$", r"^tensor\(0\.2000"),
}
"""What pages say that their code prints."""


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_pages_code_runs_from_top_to_bottom(page, tmp_path):
    """In a process of its own, as one rank, in an empty folder: as a reader would run it."""
    code = "\n".join([BEFORE.get(name_of(page), ""), *BLOCK.findall(page.read_text())])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "RANK": "0",
            "WORLD_SIZE": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"
    for said in SAID.get(name_of(page), ()):
        assert re.search(said, done.stdout, re.MULTILINE), f"{said!r} is not in {done.stdout}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {name_of(page) for page in DOCS.rglob("*.md")} == listed


def test_the_files_that_pages_name_exist():
    """Paths in backticks, such as `examples/ddp.py` or `benchmarks/results/plan_table.md`."""
    named = re.compile(r"`((?:examples|benchmarks|docs|src)/[\w./-]+\.\w+)`")
    for page in DOCS.rglob("*.md"):
        missing = [path for path in named.findall(page.read_text()) if not (ROOT / path).exists()]
        assert not missing, f"{name_of(page)} names {missing}"
