"""FLOPs and bytes as seconds, and the one decision that depends on them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Converts FLOPs and bytes to seconds.

    The rates need not be exact. They decide only whether a replicated matrix is computed once and
    sent, or computed by every replica, and they predict a step's time; ownership follows FLOPs.

    Args:
        flops_per_second: the orthogonaliser's achieved rate on one rank.
        bytes_per_second: what one rank sends to its own replica's ranks.
        replica_bytes_per_second: what one rank sends to other replicas' ranks (between nodes, in
            HSDP); None means the same rate.
        latency_seconds: fixed time of one message.
        node_bytes_per_second: what one rank sends within its node; None means `bytes_per_second`.
        node_latency_seconds: fixed time of one message within a node.
        ranks_per_node: how many ranks a node has; they are numbered one after another.

    Raises:
        ValueError: a rate is not positive, or the latency is negative.

    Example:
        >>> CostModel(flops_per_second=1e12).compute_seconds(3e7)
        3e-05
    """

    flops_per_second: float = 2e14
    bytes_per_second: float = 5e10
    replica_bytes_per_second: float | None = None
    latency_seconds: float = 2e-5
    node_bytes_per_second: float | None = None
    node_latency_seconds: float = 1e-5
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        rates = {
            "flops_per_second": self.flops_per_second,
            "bytes_per_second": self.bytes_per_second,
            "replica_bytes_per_second": self.bytes_per_second_between_replicas,
            "node_bytes_per_second": self.node_bytes_per_second or self.bytes_per_second,
        }
        for name, rate in rates.items():
            if not (rate > 0 and math.isfinite(rate)):
                raise ValueError(f"{name}={rate}: pass a positive, finite rate")
        for name in ("latency_seconds", "node_latency_seconds"):
            latency = getattr(self, name)
            if not (latency >= 0 and math.isfinite(latency)):
                raise ValueError(f"{name}={latency}: pass zero or more")
        if self.ranks_per_node < 1:
            raise ValueError(f"ranks_per_node={self.ranks_per_node}: pass one or more")

    @property
    def bytes_per_second_between_replicas(self) -> float:
        """What one rank sends to other replicas' ranks."""
        rate = self.replica_bytes_per_second
        return self.bytes_per_second if rate is None else rate

    def compute_seconds(self, flops: float) -> float:
        """Seconds that one rank takes for `flops`."""
        return flops / self.flops_per_second

    def send_seconds(self, num_bytes: float, *, num_messages: int = 1) -> float:
        """Seconds that one rank takes to send `num_bytes` within its replica."""
        return self.latency_seconds * num_messages + num_bytes / self.bytes_per_second

    def send_seconds_between_replicas(self, num_bytes: float) -> float:
        """Seconds that one rank takes to send `num_bytes` to another replica, in one message."""
        return self.latency_seconds + num_bytes / self.bytes_per_second_between_replicas

    def swap_seconds(self, num_bytes: float, *, num_swaps: int, num_ranks: int) -> float:
        """Seconds that a team of neighbours takes to exchange.

        Args:
            num_bytes: what each sends in all.
            num_swaps: how often.
            num_ranks: of the team; one that does not fit into a node exchanges between nodes.
        """
        rate, latency = self.bytes_per_second, self.latency_seconds
        if num_ranks <= self.ranks_per_node:
            rate, latency = self.node_bytes_per_second or rate, self.node_latency_seconds
        return num_swaps * latency + num_bytes / rate

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
