"""The AdamW half of parameters that several ranks share: torch's kernels on the local shards.

Ranks agree first on which parameters have gradients, in one small all-reduce, so that a gradient
missing on some of them counts as zero there and the others' shards stay in step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normuon.adamw import adamw_
from normuon.sharded_params import GRADIENT, gradient_flag, group_that_shares, local_tensor
from normuon.state import State


def step_sharded_adamw_(
    params: Sequence[Tensor],
    states: Sequence[State],
    group: Mapping[str, Any],
    *,
    process_group: dist.ProcessGroup | None,
) -> None:
    """One AdamW step for a param group's shared parameters, those without gradients included.

    Args:
        params: DTensors, or plain tensors that the ranks of `process_group` hold alike.
        states: each one's state, written to.
        group: the param group, read as it stands now.
        process_group: for plain tensors.
    """
    by_group: dict[dist.ProcessGroup, list[int]] = {}
    for index, param in enumerate(params):
        shared_by = group_that_shares(param, process_group)
        assert shared_by is not None
        by_group.setdefault(shared_by, []).append(index)
    for shared_by, indices in by_group.items():
        flags = torch.cat([gradient_flag(params[i], group["skip_nonfinite"]) for i in indices])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=shared_by)
        certain = []
        for index, flag in zip(indices, flags, strict=True):
            if params[index].grad is not None and not group["skip_nonfinite"]:
                certain.append(index)  # Its own gradient says that the step takes place.
            else:
                _step_if_(params[index], states[index], group, flag)
        if certain:
            adamw_(
                [local_tensor(params[i]) for i in certain],
                [_local_gradient(params[i]) for i in certain],
                [_local_state(states[i]) for i in certain],
                group,
            )


def _step_if_(param: Tensor, state: State, group: Mapping[str, Any], flag: Tensor) -> None:
    """Steps one parameter where the ranks' flag says so, without waiting to read it."""
    untouched = flag != GRADIENT
    if "skipped_steps" in state:
        local_tensor(state["skipped_steps"]).add_(flag > GRADIENT)
    adamw_(
        [local_tensor(param)],
        [_local_gradient(param)],
        [_local_state(state)],
        group,
        found_inf=untouched.to(torch.float32),
    )


def _local_gradient(param: Tensor) -> Tensor:
    if param.grad is None:
        return torch.zeros_like(local_tensor(param))
    return local_tensor(param.grad)


def _local_state(state: State) -> State:
    return {key: local_tensor(value) for key, value in state.items()}
