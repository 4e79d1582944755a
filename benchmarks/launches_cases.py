"""The optimizer steps and the plan that `launches.py` measures; each function needs a new process.

What counts as a device operation is decided here, by `OperationCounter`.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from normuon import MatrixView, NorMuon, plan_for

OURS, DION, TORCH = "normuon", "dion NorMuon", "torch.optim.Muon"
ONE_PROCESS = "one process"

ACCELERATOR_WIDTH, SHARDED_WIDTH = 1024, 64
WARM_UP_STEPS = 3
HOST_ROUNDS = {16: 25, 64: 11}
"""By layers."""
MATRIX_ROUNDS, EXPERT_ROUNDS = 25, 7

VIEWS_BY_NAME = {"aten::_unsafe_view"}
CONSTANTS = {"aten::lift_fresh"}
ALLOCATIONS = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::empty_permuted"),
    *("aten::new_empty", "aten::new_empty_strided"),
}
WAITS = {"_c10d_functional::wait_tensor"}
HOST_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}
COLLECTIVES = {"c10d", "_c10d_functional"}

PLANNED_RANKS, MOE_LAYERS = 64, 58
EXPERT_SHAPES = {"gate": (256, 2048, 7168), "up": (256, 2048, 7168), "down": (256, 7168, 2048)}
MATRIX_SHAPES = {
    "q_a": (1536, 7168),
    "q_b": (24576, 1536),
    "kv_a": (576, 7168),
    "kv_b": (32768, 512),
    "o": (7168, 16384),
    "shared_gate": (2048, 7168),
    "shared_up": (2048, 7168),
    "shared_down": (7168, 2048),
}
"""Of DeepSeek-V3 (arXiv 2412.19437, section 4.2): latent attention and the shared expert."""


class OperationCounter(TorchDispatchMode):
    """Counts device operations by name.

    An operation counts if it returns or changes a tensor, communicates, or hands a tensor's value
    to the host (`item`). A multi-tensor one (`_foreach_*`) and a collective count once, however
    many tensors they take; a tensor made from a Python number (`scalar_tensor`, `lift_fresh`)
    counts too. Left out are:

    - views: what its schema declares to alias an argument without changing it (`view`, `slice`,
      `transpose`, `split`, `unbind`, `detach`, `alias` and so on), and `_unsafe_view`;
    - allocations without values: `empty`, `empty_like`, `empty_strided`, `empty_permuted`,
      `new_empty`, `new_empty_strided`;
    - `wait_tensor`, which waits for a collective that has been counted;
    - what touches no tensor's values: `prim.device`, `promote_types`, the profiler's marks.

    Operations on DTensors count as the local ones that they become.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Counts one operation and runs it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs local operations, which come here in their turn.
        if _counts(func):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _counts(func: Any) -> bool:
    name = func._schema.name
    if name in HOST_READS | CONSTANTS:
        return True
    if func.is_view or name in VIEWS_BY_NAME | ALLOCATIONS | WAITS:
        return False
    returns_tensors = any("Tensor" in str(result.type) for result in func._schema.returns)
    communicates = name.partition("::")[0] in COLLECTIVES
    return returns_tensors or communicates or func._schema.is_mutable


def layer_shapes(layers: int, width: int) -> list[tuple[int, int]]:
    """The matrices of Llama-like layers."""
    square, tall, wide = (width, width), (4 * width, width), (width, 4 * width)
    return [*[square] * 4, *[tall] * 2, wide] * layers


def build(
    name: str,
    params: Sequence[nn.Parameter],
    *,
    mesh: DeviceMesh | None = None,
    ns_dtype: torch.dtype | None = None,
    dion: str | None = None,
) -> Optimizer:
    """A contender with its options at their defaults.

    Args:
        name: `OURS`, `DION` or `TORCH`.
        params: with gradients.
        mesh: of DTensor parameters.
        ns_dtype: our Newton-Schulz's; None: what the library chooses.
        dion: a checkout of microsoft/dion.
    """
    if name == OURS:
        return NorMuon(params, lr=1e-3, ns_dtype=ns_dtype)
    if name == TORCH:
        return torch.optim.Muon(params, lr=1e-3)
    assert dion is not None
    # Its decorators run when it is imported, and then hand their functions back as they are.
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)
    sys.path.insert(0, dion)
    from dion import NorMuon as DionNorMuon

    return DionNorMuon(params, distributed_mesh=mesh, lr=1e-3)


def _sharded_params(
    shapes: Sequence[tuple[int, ...]], mesh: DeviceMesh, dim: int = 0
) -> list[nn.Parameter]:
    """DTensor parameters with gradients, the same on every rank, as FSDP2 shards them."""
    torch.manual_seed(0)

    def random(shape: tuple[int, ...]) -> DTensor:
        whole = 0.02 * torch.randn(shape)
        return distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)

    params = [nn.Parameter(random(shape)) for shape in shapes]
    for param, shape in zip(params, shapes, strict=True):
        param.grad = random(shape)
    return params


def _pretended_mesh(world_size: int) -> DeviceMesh:
    """A mesh seen from its rank 0, whose collectives return at once and write nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    return init_device_mesh("cpu", (world_size,))


class _AcceleratorModule(backend_registration._DummyBackendModule):
    """What `torch.counted` needs beside its defaults."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Dtypes that autocast knows on this device."""
        return [torch.float16, torch.bfloat16]

    def synchronize(self) -> None:
        """Nothing runs."""


def count_steps(
    world_size: int, layers: int, names: Sequence[str], dion: str | None
) -> dict[str, dict[str, Any]]:
    """The device operations of one steady step of each contender.

    Args:
        world_size: ranks that only pretend to communicate, of which this is rank 0, with CPU
            tensors; 1 for one accelerator that is a name only, with fake tensors.
        layers: Llama-like layers.
        names: of contenders.
        dion: a checkout of microsoft/dion.

    Returns:
        `total` and counts `by_name` for each, or its `failure`: asking for the value of a fake
        tensor, as `item` does, raises a DataDependentOutputException.
    """
    torch.set_num_threads(1)
    if world_size > 1:
        mesh = _pretended_mesh(world_size)
    else:
        backend_registration._setup_privateuseone_for_python_backend(
            "counted", backend_module=_AcceleratorModule()
        )

    def counted(name: str) -> dict[str, Any]:
        if world_size > 1:
            params = _sharded_params(layer_shapes(layers, SHARDED_WIDTH), mesh)
            return _counted(build(name, params, mesh=mesh, ns_dtype=torch.bfloat16, dion=dion))
        with FakeTensorMode():
            shapes = layer_shapes(layers, ACCELERATOR_WIDTH)
            params = [nn.Parameter(torch.empty(shape, device="counted")) for shape in shapes]
            for param in params:
                param.grad = torch.empty_like(param)
            return _counted(build(name, params, dion=dion))

    found = {}
    for name in names:
        try:
            found[name] = counted(name)
        except Exception as error:
            found[name] = {"total": None, "failure": failure_words(error)}
    return found


def _counted(optimizer: Optimizer) -> dict[str, Any]:
    for _ in range(WARM_UP_STEPS):
        optimizer.step()
    with OperationCounter() as counter:
        optimizer.step()
    return {"total": counter.counts.total(), "by_name": dict(counter.counts.most_common())}


def time_host(
    world_size: int, layers: int, names: Sequence[str], dion: str | None
) -> dict[str, list[float]]:
    """Milliseconds of each contender's steps on rank 0 of ranks that only pretend, by rounds.

    Newton-Schulz runs in float32, because many processors emulate bfloat16; a peer that asks for
    bfloat16 gets float32.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # Messages hold whatever was in their buffers.
    torch.Tensor.bfloat16 = lambda tensor: tensor.to(torch.float32, copy=True)
    mesh = _pretended_mesh(world_size)
    shapes = layer_shapes(layers, SHARDED_WIDTH)
    options: dict[str, Any] = {"mesh": mesh, "ns_dtype": torch.float32, "dion": dion}
    built = {name: build(name, _sharded_params(shapes, mesh), **options) for name in names}
    return _timed_rounds(built, HOST_ROUNDS[layers], before=lambda: None)


def time_rank(rank: int, store: str, experts: bool) -> dict[str, list[float]]:
    """Milliseconds on one of 2 Gloo ranks: of sharded steps, and of stepping everything alone.

    Args:
        rank: 0 or 1.
        store: a path where the ranks find each other.
        experts: 24 parameters of 256 experts instead of 200 matrices.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timeout = timedelta(minutes=2)
    file_store = dist.FileStore(store, 2)
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=2, timeout=timeout)
    mesh = init_device_mesh("cpu", (2,))
    shapes: list[tuple[int, ...]] = [(256, 16, 16)] * 24 if experts else [(32, 32)] * 200
    dims = {"by expert": 0, "within experts": 1} if experts else {"by rows": 0}
    params = {name: _sharded_params(shapes, mesh, dim) for name, dim in dims.items()}
    params[ONE_PROCESS] = [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    for param in params[ONE_PROCESS]:
        param.grad = 0.02 * torch.randn(param.shape)
    view = {"view": MatrixView.experts()} if experts else {}
    built = {
        name: NorMuon([{"params": found, **view}], lr=1e-3, ns_dtype=torch.float32)
        for name, found in params.items()
    }
    rounds = EXPERT_ROUNDS if experts else MATRIX_ROUNDS
    found = _timed_rounds(built, rounds, before=dist.barrier)
    dist.destroy_process_group()
    return found


def _timed_rounds(
    built: Mapping[str, Optimizer], rounds: int, *, before: Callable[[], Any]
) -> dict[str, list[float]]:
    """Milliseconds of every optimizer's step once a round, every second round in reverse order."""
    for optimizer in built.values():
        for _ in range(WARM_UP_STEPS):
            optimizer.step()
    found: dict[str, list[float]] = {name: [] for name in built}
    for number in range(rounds):
        names = list(built)
        for name in names if number % 2 else reversed(names):
            before()
            started = time.perf_counter()
            built[name].step()
            found[name].append(1e3 * (time.perf_counter() - started))
    return found


def plan_experts(traced: bool) -> dict[str, Any]:
    """Plans DeepSeek-V3's MoE layers, their experts sharded on dim 1, all else on dim 0.

    Args:
        traced: also trace the memory that planning allocates, which makes it slower.

    Returns:
        `num_matrices`, `seconds`, the plan's `imbalance`, and `peak_bytes` if traced.
    """
    torch.set_num_threads(1)
    groups: list[dict[str, Any]] = [
        {"params": _meta_params(EXPERT_SHAPES), "view": MatrixView.experts()},
        {"params": _meta_params(MATRIX_SHAPES)},
    ]
    if traced:
        tracemalloc.start()
    started = time.perf_counter()
    plan = plan_for(
        groups,
        mesh_shape=(PLANNED_RANKS,),
        placements=_placement,
    )
    seconds = time.perf_counter() - started
    peak = {"peak_bytes": tracemalloc.get_traced_memory()[1]} if traced else {}
    params = [param for group in groups for _, param in group["params"]]
    num_matrices = sum(param.shape[0] if param.ndim == 3 else 1 for param in params)
    imbalance = plan.imbalance
    return {"num_matrices": num_matrices, "seconds": seconds, "imbalance": imbalance, **peak}


def _placement(_: str, param: Tensor) -> list[tuple[Literal["shard"], int]]:
    return [("shard", 1 if param.ndim == 3 else 0)]


def _meta_params(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, Tensor]]:
    return [
        (f"layers.{layer}.{name}", nn.Parameter(torch.empty(shape, device="meta")))
        for layer in range(MOE_LAYERS)
        for name, shape in shapes.items()
    ]


def failure_words(error: Exception) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:160]}"
