"""A parameter's matrices as the planner's tasks, for the live step and for plans without one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from normuon.distributed.layout import Region, ShardLayout
from normuon.distributed.slabs import Split
from normuon.distributed.task import MatrixTask
from normuon.models.view import MatrixView
from normuon.options import MatrixOptions
from normuon.orthogonalize import num_panels, transport_dtype
from normuon.orthogonalize.flops import symmetric_product_flops
from normuon.orthogonalize.segments import segments_for
from normuon.step.normalizer import DividedNormalizer
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
        split = split_of(
            (m, n),
            options,
            dims=(view.neuron_dim, view.matrix_dims(ndim, -1)[0]),
            ns_dtype=ns_dtype,
            device_type=device_type,
        )
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
                split=split,
            )
            for index in range(run.count)
        ]
    return tasks


def split_of(
    shape: tuple[int, int],
    options: MatrixOptions,
    *,
    dims: tuple[int, int],
    ns_dtype: torch.dtype,
    device_type: str,
) -> Split | None:
    """How a team would divide an m x n matrix; None where the options need the whole of it.

    Those are an orthogonaliser of the user's own, `equilibrate`, and a rule whose statistics are no
    sums.

    Args:
        shape: m and n.
        options: of the group.
        dims: the parameter's dims that rows and columns are cut along.
        ns_dtype: dtype of Newton-Schulz.
        device_type: where that runs.
    """
    normalizer = options.normalizer
    if (
        callable(options.orthogonalizer)
        or options.equilibrate
        or not isinstance(normalizer, DividedNormalizer)
    ):
        return None
    m, n = shape
    short, long = min(m, n), max(m, n)
    panels = num_panels(short, device_type=device_type)
    # In as few segments as the dtype bears, since every segment's Gram matrix is exchanged.
    method = "newton_schulz" if options.orthogonalizer == "newton_schulz" else "gram"
    return Split(
        dim=dims[0] if m >= n else dims[1],
        cuts_rows=m >= n,
        short=short,
        long=long,
        segments=segments_for(
            method, m, n, coefficients=options.coefficients, dtype=ns_dtype, panels=panels
        ),
        gram_flops=symmetric_product_flops(short, 1, panels=panels),
        square_flops=symmetric_product_flops(short, short, panels=panels),
        num_totals=normalizer.num_totals,
        element_bytes=ns_dtype.itemsize,
    )
