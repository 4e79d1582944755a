"""Runs a DeepSpeed script with Gloo alone: EXAMPLE [ITS OPTIONS], under torchrun.

On CPUs DeepSpeed compiles a shared-memory all-reduce at the first start, which takes minutes on a
busy machine and is no part of what is tested. DeepSpeed itself goes without where there is none.
"""

from __future__ import annotations

import importlib
import runpy
import sys

if __name__ == "__main__":
    # By its name: as an attribute of its package it is torch itself, which is imported there.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
