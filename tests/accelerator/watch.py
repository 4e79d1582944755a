"""Watches every operation of a step for what an accelerator would wait for or should not see."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

ROOT = Path(__file__).parents[2]

READS = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"),
    *("aten::nonzero", "aten::nonzero_numpy", "aten::masked_select", "aten::bincount"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::allclose"),
    *("aten::repeat_interleave", "aten::_linalg_check_errors"),
}
"""What hands a value, or a size that depends on values, to the host."""

INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""With booleans they count them first, and the host waits for the number."""

BY_VALUE = {
    *("aten::mul", "aten::mul_", "aten::add", "aten::add_", "aten::sub", "aten::sub_"),
    *("aten::div", "aten::div_", "aten::rsub", "aten::_foreach_mul_", "aten::_foreach_div_"),
    "aten::_fused_adamw_",
}
"""What hands a host tensor without dims to a kernel as a number. Others, as `where`, copy it."""

QUESTIONS = {"prim::device", "aten::promote_types"}
"""What asks for no value."""

PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}


class Fault(AssertionError):  # noqa: N818
    """What a step does that it must not do on an accelerator."""


class Watch(TorchDispatchMode):
    """Fails on the first operation that makes the host wait or mixes in tensors of the host.

    - a host read: `item`, `nonzero`, a copy to the host and whatever else returns host tensors;
    - a copy from the host, as `torch.tensor(x, device=...)` makes;
    - a host tensor among the device's, unless it has no dims, is the user's or computed from theirs
      alone, and goes to the kernel by value.

    A multi-tensor operation (`_foreach_*`) and a collective are one operation: what a backend does
    inside of them is its own.

    Attributes:
        host_copies: where something was copied from the host, if that was allowed.
        product_dtypes: of all matrix products.
    """

    def __init__(self, *, given: Iterable[Tensor] = (), may_copy_from_host: bool = False) -> None:
        """Prepares to watch.

        Args:
            given: tensors of the user's on the host, such as a learning rate.
            may_copy_from_host: as when a checkpoint is loaded.
        """
        super().__init__()
        self._given = WeakTensorKeyDictionary()
        for tensor in given:
            self._given[tensor] = True
        self._may_copy_from_host = may_copy_from_host
        self._made: list[tuple[StorageWeakRef, str]] = []
        self.host_copies: list[str] = []
        self.product_dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Looks at one operation, runs it, and looks at what it returns."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs local operations, which come here in their turn.
        kwargs = kwargs or {}
        name = func._schema.name
        if name in QUESTIONS:
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        host = [t for t in tensors if t.is_cpu]
        on_device = len(host) < len(tensors)
        if on_device:
            self._check_arguments(name, func, args, host)
        if name in PRODUCTS:
            self.product_dtypes |= {t.dtype for t in tensors}
        results = func(*args, **kwargs)
        found = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
        if on_device and any(t.is_cpu for t in found):
            raise Fault(f"{func} copies to the host and waits, at {_place()}")
        if host and not on_device:
            if not all(t.is_cpu for t in found):
                self._note_host_copy(func)
            elif all(t in self._given for t in host):
                for tensor in found:
                    self._given[tensor] = True
        if not func.is_view:
            self._note_made(func, tensors, found)
        return results

    def _check_arguments(self, name: str, func: Any, args: Any, host: list[Tensor]) -> None:
        if name in READS:
            raise Fault(f"{func} reads a value on the host, at {_place()}")
        if name in INDEXED and any(t.dtype == torch.bool for t in tree_leaves(args[1])):
            raise Fault(f"{func} counts booleans and waits for the number, at {_place()}")
        if not host:
            return
        if name == "aten::copy_":
            if args[0].is_cpu:
                raise Fault(f"{func} copies to the host and waits, at {_place()}")
            self._note_host_copy(func)
            return
        for tensor in host:
            if tensor.ndim or tensor not in self._given or name not in BY_VALUE:
                raise Fault(
                    f"{func} takes a tensor of the host, {list(tensor.shape)}, among those of the "
                    f"device, at {_place()}"
                )

    def _note_host_copy(self, func: Any) -> None:
        if not self._may_copy_from_host:
            raise Fault(f"{func} copies a tensor of the host to the device, at {_place()}")
        self.host_copies.append(_place())

    def _note_made(self, func: Any, taken: list[Tensor], found: list[Tensor]) -> None:
        known = {t.untyped_storage()._cdata for t in taken}
        for tensor in found:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._made.append((StorageWeakRef(storage), f"{func}, at {_place()}"))

    def check_nothing_kept(self) -> None:
        """Fails if memory that was allocated under this watch is still held.

        Raises:
            Fault: it names the operation that allocated it.
        """
        if any(not storage.expired() for storage, _ in self._made):
            gc.collect()  # A cycle is freed, only later.
        kept = [made for storage, made in self._made if not storage.expired()]
        if kept:
            raise Fault(f"{len(kept)} new tensor(s) kept after the step: {kept[0]}")


def _place() -> str:
    """The innermost line of the library, or of a test, that runs."""
    frame = sys._getframe(1)
    while frame is not None:
        name = _ours(frame.f_code.co_filename)
        if name is not None:
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "no line of the library"


@cache
def _ours(filename: str) -> str | None:
    """A file's place in this repository; None for this file and what lies outside."""
    path = Path(filename)
    is_ours = any(path.is_relative_to(ROOT / folder) for folder in ("src", "tests"))
    return str(path.relative_to(ROOT)) if is_ours and path != Path(__file__) else None
