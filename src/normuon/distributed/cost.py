"""What a matrix costs: FLOPs to orthogonalise it, bytes to send it, bytes of scratch, seconds.

Leaves the decisions to `ownership` and `plan`; the FLOP count itself is the orthogonaliser's to
give, as a function of rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
"""Size of one element of each dtype that may travel."""

SCALAR_BYTES = 4
"""Each has-gradient flag and each step scale travels as one float32."""


def newton_schulz_flops(m: int, n: int, *, num_steps: int = 5) -> int:
    """FLOPs of plain Newton-Schulz on one [m, n] matrix (paper, eq. 5).

    With s = min(m, n) and l = max(m, n), each step takes X X^T (2 s^2 l), A A (2 s^3) and B X
    (2 s^2 l): num_steps (4 s^2 l + 2 s^3) in all.

    Args:
        m: rows.
        n: columns.
        num_steps: Newton-Schulz steps.

    Returns:
        The FLOPs, a multiply-add counted as two.

    Example:
        >>> newton_schulz_flops(2, 3)
        320
    """
    short, long = min(m, n), max(m, n)
    return num_steps * (4 * short * short * long + 2 * short**3)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Converts matrices to FLOPs, bytes and seconds.

    The rates need not be exact. They decide only whether a replicated matrix is computed once and
    sent, or computed by every replica, and they predict a step's time; ownership follows FLOPs.

    Args:
        flops: FLOPs to orthogonalise an [m, n] matrix; must return a positive integer.
        flops_per_second: the orthogonaliser's achieved rate on one rank.
        bytes_per_second: what one rank sends to its own replica's ranks.
        replica_bytes_per_second: what one rank sends to other replicas' ranks (between nodes, in
            HSDP); None means the same rate.
        latency_seconds: fixed time of one message.

    Raises:
        ValueError: a rate is not positive, or the latency is negative.

    Example:
        >>> model = CostModel(flops_per_second=1e12, bytes_per_second=1e9, latency_seconds=0.0)
        >>> model.compute_seconds(model.matrix_flops(100, 100))
        3e-05
    """

    flops: Callable[[int, int], int] = newton_schulz_flops
    flops_per_second: float = 2e14
    bytes_per_second: float = 5e10
    replica_bytes_per_second: float | None = None
    latency_seconds: float = 2e-5

    def __post_init__(self) -> None:
        rates = {
            "flops_per_second": self.flops_per_second,
            "bytes_per_second": self.bytes_per_second,
            "replica_bytes_per_second": self.bytes_per_second_between_replicas,
        }
        for name, rate in rates.items():
            if not (rate > 0 and math.isfinite(rate)):
                raise ValueError(f"{name}={rate}: pass a positive, finite rate")
        if not (self.latency_seconds >= 0 and math.isfinite(self.latency_seconds)):
            raise ValueError(f"latency_seconds={self.latency_seconds}: pass zero or more")

    @property
    def bytes_per_second_between_replicas(self) -> float:
        """What one rank sends to other replicas' ranks."""
        rate = self.replica_bytes_per_second
        return self.bytes_per_second if rate is None else rate

    def matrix_flops(self, m: int, n: int) -> int:
        """FLOPs to orthogonalise one [m, n] matrix.

        Raises:
            ValueError: the given FLOP function returned something that is not a positive number.
        """
        flops = int(self.flops(m, n))
        if flops <= 0:
            raise ValueError(f"flops({m}, {n}) = {flops}: pass a function that returns at least 1")
        return flops

    def compute_seconds(self, flops: float) -> float:
        """Seconds that one rank takes for `flops`."""
        return flops / self.flops_per_second

    def send_seconds(self, num_bytes: float, *, num_messages: int = 1) -> float:
        """Seconds that one rank takes to send `num_bytes` within its replica."""
        return self.latency_seconds * num_messages + num_bytes / self.bytes_per_second

    def send_seconds_between_replicas(self, num_bytes: float) -> float:
        """Seconds that one rank takes to send `num_bytes` to another replica, in one message."""
        return self.latency_seconds + num_bytes / self.bytes_per_second_between_replicas

    def pipeline_seconds(self, stages: Sequence[tuple[int, int, int]]) -> float:
        """Seconds of a sequence of exchanges, each overlapped with its neighbours' compute.

        gather_0 + sum_k max(compute_k, gather_{k+1} + return_{k-1}) + return_last.

        Args:
            stages: for each, the busiest rank's bytes to gather, FLOPs, and bytes to return.

        Example:
            >>> model = CostModel(flops_per_second=1.0, bytes_per_second=1.0, latency_seconds=0.0)
            >>> model.pipeline_seconds([(2, 5, 3), (4, 6, 1)])
            14.0
        """
        gathers = [self.send_seconds(gathered) * (gathered > 0) for gathered, _, _ in stages]
        returns = [self.send_seconds(returned) * (returned > 0) for _, _, returned in stages]
        total = sum(gathers[:1]) + sum(returns[-1:])
        for k, (_, flops, _) in enumerate(stages):
            exchanges = sum(gathers[k + 1 : k + 2]) + (returns[k - 1] if k else 0.0)
            total += max(self.compute_seconds(flops), exchanges)
        return total

    def scratch_bytes(
        self, m: int, n: int, *, num_matrices: int = 1, element_bytes: int = 2
    ) -> int:
        """Bytes the orthogonaliser needs beside its input, for a batch of [m, n] matrices.

        The input is normalised in float32 or wider; then there are two iterates of [m, n] and the
        four [s, s] matrices R, Z, Q and T, s = min(m, n).

        Example:
            >>> CostModel().scratch_bytes(4, 8, num_matrices=3)
            768
        """
        elements, short = m * n, min(m, n)
        normalizing = (max(4, element_bytes) + element_bytes) * elements
        iterating = element_bytes * (2 * elements + 4 * short * short)
        return num_matrices * max(normalizing, iterating)

    def once_per_replica(
        self, flops: int, *, gather_bytes: int, return_bytes: int, num_replicas: int
    ) -> tuple[bool, str]:
        """Whether every replica should orthogonalise its own copy, and why in words.

        Let c be the time to compute, g to gather within a replica and b to send the result to
        another. Of N matrices on R replicas each replica computes N/R when they are split and N
        when they are not, so splitting saves N (1 - 1/R) (c + g), and costs N (1 - 1/R) b to
        receive the others' results: split exactly when c + g > b.

        Args:
            flops: of the matrix.
            gather_bytes: what gathering within a replica sends; 0 when a rank holds the matrix.
            return_bytes: the result, as sent to one other replica.
            num_replicas: R.

        Returns:
            True for once per replica, and a sentence for the plan.
        """
        compute = self.compute_seconds(flops)
        gather = gather_bytes / self.bytes_per_second
        send = self.send_seconds_between_replicas(return_bytes)
        per_replica = compute + gather <= send
        gathering = f" and gathering {format_bytes(gather_bytes)}" if gather_bytes else ""
        reason = (
            f"replicated {num_replicas} times: computing {flops / 1e9:.3g} GFLOP{gathering} "
            f"in every replica takes {1e3 * (compute + gather):.3g} ms, sending "
            f"{format_bytes(return_bytes)} takes {1e3 * send:.3g} ms, so "
        )
        return per_replica, reason + ("every replica computes" if per_replica else "one rank sends")


def format_bytes(num_bytes: float) -> str:
    """A byte count for people, in powers of ten.

    Example:
        >>> format_bytes(1_234_567)
        '1.23 MB'
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"
