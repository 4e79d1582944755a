"""A parameter's matrices as the planner's tasks, for the live step and for plans without one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from normuon.distributed.layout import Region, ShardLayout
from normuon.distributed.task import MatrixTask
from normuon.models.view import MatrixView
from normuon.options import MatrixOptions
from normuon.orthogonalize import transport_dtype
from normuon.step.order import stats_dtype


def wire_dtypes(ns_dtype: torch.dtype, param_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which matrices and their vectors travel; vectors' is never the narrower.

    Example:
        >>> wire_dtypes(torch.bfloat16, torch.bfloat16)
        (torch.bfloat16, torch.float32)
    """
    wire = transport_dtype(ns_dtype)
    return wire, torch.promote_types(stats_dtype(param_dtype), wire)


def tasks_of_param(
    name: str,
    shape: Sequence[int],
    view: MatrixView,
    *,
    place: tuple[int, int],
    layout: ShardLayout,
    options: MatrixOptions,
    param_dtype: torch.dtype,
    ns_dtype: torch.dtype,
    device_type: str,
    wire: tuple[torch.dtype, torch.dtype],
) -> list[MatrixTask]:
    """One task per matrix of a parameter.

    Args:
        name: the parameter's, for people.
        shape: its global shape.
        view: how it becomes matrices.
        place: its group and its index there.
        layout: where it is stored.
        options: its group's.
        param_dtype: its dtype.
        ns_dtype: dtype of Newton-Schulz.
        device_type: where that runs.
        wire: from `wire_dtypes`.
    """
    tasks: list[MatrixTask] = []
    ndim = len(shape)
    key = f"group {place[0]}, {param_dtype}"
    for run in view.runs(shape):
        m, n = run.block.m, run.block.n
        normalizer = options.normalizer
        state_dims = tuple(
            view.matrix_dims(ndim, dim) for dim in normalizer.state_dims(m, n).values()
        )
        summary_dims = tuple(
            () if dim is None else view.matrix_dims(ndim, dim)
            for dim in normalizer.summary_dims(m, n).values()
        )
        flops = options.flops(m, n, dtype=ns_dtype, device_type=device_type)
        tasks += [
            MatrixTask(
                name=name,
                param=place,
                index=run.first + index,
                region=Region(run.offsets_of(index), run.shape),
                rows=m,
                cols=n,
                layout=layout,
                flops=flops,
                # Vectors lie alike in all matrices of a batch.
                key=f"{key}, each {list(run.shape)}",
                state_dims=state_dims,
                summary_dims=summary_dims,
                wire_bytes=wire[0].itemsize,
                side_bytes=wire[1].itemsize,
            )
            for index in range(run.count)
        ]
    return tasks
