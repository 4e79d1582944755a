"""Triton's interpreter in place of a GPU: the library's kernels on CPU tensors.

`tests/conftest.py` chooses the interpreter where there is no CUDA device. Its bfloat16 products and
roundings are wrong, so that only float32 is compared closely.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Inside, kernels serve CPU tensors."""
    with (
        mock.patch("normuon.orthogonalize.fused.why_not_fused", return_value=None),
        mock.patch("normuon.step.fused.why_not_fused", return_value=None),
        mock.patch("normuon.state.why_not_fused", return_value=None),
    ):
        yield
