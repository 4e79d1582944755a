"""Runs Accelerate's FSDP2 on CPU ranks, where Accelerate itself would choose DDP.

Sets what Accelerate's state says of the ranks and nothing else: sharding, the optimizer's new
parameters, saving and loading are its own code. Runs under torchrun: EXAMPLE OUT STEPS [--resume].
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


def main(example: str, out: str, steps: str, *flags: str) -> None:
    torch.set_num_threads(1)
    names = runpy.run_path(example)
    plugin = names["fsdp2_plugin"]()
    accelerator = Accelerator(
        cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=names["ACCUMULATED"]
    )
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    names["train"](accelerator, int(steps), Path(out), "--resume" in flags)
    groups = accelerator._optimizers[0].param_groups
    params = [p for group in groups for p in group["params"]]
    assert all(isinstance(param, DTensor) for param in params), "the model was not sharded"
    # The schedule has run to its end once, on two ranks with two batches a step.
    assert all(abs(group["lr"] - 2e-4) < 1e-9 for group in groups), groups[0]["lr"]
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
