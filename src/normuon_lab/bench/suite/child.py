"""The process of one part, so that a crash or a hang costs no other part.

Its first line on standard input says what to do; the input's end says that the suite is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading

import torch

from normuon_lab.bench.suite.options import SuiteOptions
from normuon_lab.bench.suite.part import run_part


def main() -> int:
    """Runs the part that standard input names."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    run_part(
        request["part"],
        SuiteOptions.from_json(request["options"]),
        device=torch.device(request["device"]),
        budget_seconds=request["budget_seconds"],
    )
    return 0


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Without waiting for threads of compilers, nor for the input that the parent holds open.
    os._exit(code)
