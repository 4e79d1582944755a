"""Step time of row-sharded matrices on CPU ranks, beside other distributed Muons.

Every contender steps the same GPT-2 124M hidden matrices, row-sharded over Gloo ranks with one
thread each, and computes Newton-Schulz in float32 (whoever hard-codes bfloat16 is patched to, since
on most CPUs bfloat16 is emulated). Reports medians and ratios; passes or fails on nothing.

    python benchmarks/distributed.py --world-size 2 --layers 4 --dion PATH_TO_DION \
        --out benchmarks/results/distributed_2.json

Peers: muonium and muon-fsdp2 from PyPI where installed, microsoft/dion from a checkout.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import normuon
from normuon_lab.plan.figures import figures_of

GPT2_LAYER = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
Params = list[nn.Parameter]
JORDAN = (3.4445, -4.7750, 2.0315)


def plain_newton_schulz(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Five quintic steps in float32, for peers that take the iteration as an argument."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.float()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + epsilon)
    a, b, c = JORDAN
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def ours(params: Params, mesh: DeviceMesh, balance: str = "flops") -> torch.optim.Optimizer:
    return normuon.NorMuon(params, lr=1e-3, ns_dtype=torch.float32, balance=balance)


def ours_round_robin(params: Params, mesh: DeviceMesh) -> torch.optim.Optimizer:
    return ours(params, mesh, balance="paper")


def dion(params: Params, mesh: DeviceMesh) -> torch.optim.Optimizer:
    from dion import NorMuon

    return NorMuon(params, distributed_mesh=mesh, lr=1e-3, newton_schulz_func=plain_newton_schulz)


def muonium(params: Params, mesh: DeviceMesh) -> torch.optim.Optimizer:
    from muonium.optim import Muon
    from muonium.orthogonalize import orthogonalize

    # As released, these assert a CUDA device.
    orthogonalize.ns_loop_triton = orthogonalize.ns_loop
    orthogonalize.pe_loop_triton = orthogonalize.pe_loop
    group = {"params": params, "algorithm": "normuon"}
    return Muon([group], lr=1e-3, orthogonalization_strategy="newton_schulz")


def muon_fsdp2(params: Params, mesh: DeviceMesh) -> torch.optim.Optimizer:
    from muon_fsdp2 import Muon

    return Muon([{"params": params, "lr": 1e-3, "use_muon": True}])


def torch_muon(params: Params, mesh: DeviceMesh) -> torch.optim.Optimizer:
    """Every rank gathers every matrix and repeats the work."""
    return torch.optim.Muon(params, lr=1e-3)


CONTENDERS: dict[str, Callable[[Params, DeviceMesh], torch.optim.Optimizer]] = {
    "normuon": ours,
    "normuon balance=paper": ours_round_robin,
    "dion NorMuon": dion,
    "muonium NorMuon": muonium,
    "muon-fsdp2": muon_fsdp2,
    "torch.optim.Muon": torch_muon,
}


def run_rank(rank: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if arguments.dion:
        sys.path.insert(0, arguments.dion)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(arguments.port))
    dist.init_process_group("gloo", rank=rank, world_size=arguments.world_size)
    mesh = init_device_mesh("cpu", (arguments.world_size,))
    # Half precision is not what is compared here.
    torch.Tensor.bfloat16 = lambda tensor: tensor.to(torch.float32, copy=True)
    torch.manual_seed(0)
    shapes = list(GPT2_LAYER) * arguments.layers
    weights = [torch.randn(shape) * 0.02 for shape in shapes]
    grads = [distribute_tensor(torch.randn(shape), mesh, [Shard(0)]) for shape in shapes]
    built, failures = {}, {}
    for name, build in CONTENDERS.items():
        try:
            params = [nn.Parameter(distribute_tensor(w.clone(), mesh, [Shard(0)])) for w in weights]
            optimizer = build(params, mesh)
            for _ in range(2):  # State, plans and compilation are not steps.
                timed_step(optimizer, params, grads)
            built[name] = (optimizer, params)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(arguments.repeats):
        for name, (optimizer, params) in built.items():
            seconds[name].append(timed_step(optimizer, params, grads))
    if rank == 0:
        ours = built["normuon"][0]
        assert isinstance(ours, normuon.NorMuon)
        report(seconds, failures, counted(ours), arguments)
    dist.destroy_process_group()


def counted(optimizer: normuon.NorMuon) -> dict[str, float]:
    """What the plan counts, and the bytes of the message buffers that this rank really holds."""
    (step,) = optimizer._planned_steps()
    messages = [
        message
        for bucket in step.buckets
        for exchange in (bucket.gather, bucket.back)
        for message in (exchange.sent, exchange.received)
    ]
    storages = {m.bytes.untyped_storage().data_ptr(): m.bytes.untyped_storage() for m in messages}
    plan, figures = step.plan, figures_of(step.plan)
    return {
        "imbalance": plan.imbalance,
        "bytes_sent_total": figures.bytes_sent_total,
        "bytes_least_total": figures.bytes_least_total,
        "buckets": len(plan.buckets),
        "bucket_bytes": plan.bucket_bytes,
        "message_buffer_bytes": sum(storage.nbytes() for storage in storages.values()),
    }


def timed_step(optimizer: torch.optim.Optimizer, params: Params, grads: list) -> float:
    """Seconds until the slowest rank has stepped, from fresh gradients: some overwrite them."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    dist.barrier()
    started = time.perf_counter()
    optimizer.step()
    dist.barrier()
    return time.perf_counter() - started


def report(
    seconds: dict[str, list[float]],
    failures: dict[str, str],
    counts: dict[str, float],
    arguments: argparse.Namespace,
) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peers = {name: value for name, value in medians.items() if not name.startswith("normuon")}
    best = min(peers, key=lambda name: peers[name]) if peers else None
    print(f"{arguments.world_size} ranks, {arguments.layers} layers, {arguments.repeats} repeats")
    for name, value in sorted(medians.items(), key=lambda item: item[1]):
        # Repeat by repeat, because the machine's speed drifts.
        ratio = ""
        if best is not None:
            ratios = [a / b for a, b in zip(seconds[name], seconds[best], strict=True)]
            ratio = f"  {statistics.median(ratios):.3f} x {best}"
        print(f"  {name:24} {1e3 * value:8.0f} ms{ratio}")
    for name, message in failures.items():
        print(f"  {name:24} not run: {message}")
    print(f"  counted: {counts}")
    if arguments.out:
        content = {
            "command": "python benchmarks/distributed.py "
            f"--world-size {arguments.world_size} --layers {arguments.layers} "
            f"--repeats {arguments.repeats}" + (" --dion PATH" if arguments.dion else ""),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "threads_per_rank": 1,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "world_size": arguments.world_size,
            "shapes": [list(shape) for shape in GPT2_LAYER],
            "layers": arguments.layers,
            "newton_schulz_dtype": "float32",
            "step_ms": {
                name: [round(1e3 * v, 1) for v in values] for name, values in seconds.items()
            },
            "median_step_ms": {name: round(1e3 * value, 1) for name, value in medians.items()},
            "best_peer": best,
            "ratio_to_best_peer": {
                name: round(statistics.median(map(operator.truediv, values, seconds[best])), 3)
                for name, values in seconds.items()
            }
            if best
            else None,
            "counted": counts,
            "not_run": failures,
        }
        Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4, help="GPT-2 layers, of 12")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=29731)
    parser.add_argument("--dion", help="a checkout of github.com/microsoft/dion")
    parser.add_argument("--out", help="write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.dion and not Path(arguments.dion).is_dir():
        parser.error(f"--dion {arguments.dion}: no such folder")
    mp.spawn(run_rank, (arguments,), nprocs=arguments.world_size)


if __name__ == "__main__":
    main()
