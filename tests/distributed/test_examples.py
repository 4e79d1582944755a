"""Every example runs under torchrun as its first lines say, and its loss falls."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 300
GRACE_SECONDS = 45


def run_bounded(command: list[str]) -> tuple[int, str, str]:
    """Runs a command and ends all that it started, should it hang."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        # torchrun's workers are in sessions of their own, and it ends them when it is told to end.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, errors


@pytest.mark.parametrize(
    "name",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.slow),
        pytest.param("hsdp", marks=pytest.mark.slow),
        "fsdp2_tp",
    ],
)
def test_an_example_runs_as_it_says_and_its_loss_falls(name):
    path = EXAMPLES / f"{name}.py"
    says = re.compile(r"^\$ torchrun (--nproc-per-node \d) examples/(\w+)\.py$", re.M)
    found = says.search(path.read_text())
    assert found is not None, "the example does not say how to run it"
    assert found[2] == name
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    code, out, errors = run_bounded([*torchrun, *found[1].split(), str(path), "--steps", "8"])
    assert code == 0, errors[-4000:]
    losses = [float(loss) for loss in re.findall(r"^step \d+ loss ([\d.]+)$", out, re.M)]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.2
