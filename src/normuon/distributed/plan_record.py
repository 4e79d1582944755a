"""What a plan records: the matrices, their owners, the buckets, and what it all adds up to.

Holds figures only. `plan` fills it and derives routes from it, `plan_report` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from normuon.distributed.assignment import Balance
from normuon.distributed.cost import CostModel
from normuon.distributed.task import MatrixTask


@dataclass(frozen=True, slots=True)
class Bucket:
    """Matrices that are exchanged together, and what the busiest rank does for them.

    Args:
        tasks: indices into the plan's tasks, in the order in which messages are packed.
        flops: FLOPs of the busiest owner.
        gather_bytes: what the busiest rank sends or receives on the way to owners.
        return_bytes: what the busiest rank sends or receives on the way back.
        scratch_bytes: whole matrices and orthogonaliser's scratch on the fullest owner.
        wire_dtype: dtype of the matrices on the wire.
        neuron_dtype: dtype of v on the wire.
    """

    tasks: tuple[int, ...]
    flops: int
    gather_bytes: int
    return_bytes: int
    scratch_bytes: int
    wire_dtype: str
    neuron_dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """Owners, buckets and figures of one step; `plan.Plan` adds routes and texts.

    Args:
        tasks: the matrices; everything else refers to them by index.
        world_size: ranks of the group.
        balance: how owners were chosen.
        bucket_bytes: the bound on a rank's packed gather bytes in one bucket, or twice the bucket's
            largest matrix where that is more.
        cost_model: what costs were taken to be.
        owners: for each matrix its owner, or one owner per full replica in replica order.
        reasons: for each matrix, why.
        buckets: the ordered exchanges.
        flops_by_matrix: to orthogonalise each matrix once.
        flops_by_rank: what each rank orthogonalises.
        makespan_bound: FLOPs below which no assignment brings the busiest rank.
        packing_bound: a tighter such bound.
        bytes_sent_by_rank: on the wire, there and back.
        bytes_received_by_rank: on the wire, there and back.
        bytes_least_total: what any scheme with these owners must send: each stored region that is
            not on its owner, there and back, without v, flags and scales.
        plan_seconds: what planning took; no part of a plan's identity.
    """

    tasks: tuple[MatrixTask, ...]
    world_size: int
    balance: Balance
    bucket_bytes: int
    cost_model: CostModel
    owners: tuple[tuple[int, ...], ...]
    reasons: tuple[str, ...]
    buckets: tuple[Bucket, ...]
    flops_by_matrix: tuple[int, ...]
    flops_by_rank: tuple[int, ...]
    makespan_bound: int
    packing_bound: int
    bytes_sent_by_rank: tuple[int, ...]
    bytes_received_by_rank: tuple[int, ...]
    bytes_least_total: int
    plan_seconds: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        planned = sorted(index for bucket in self.buckets for index in bucket.tasks)
        assert planned == list(range(len(self.tasks))), "every matrix is in exactly one bucket"
        assert len(self.owners) == len(self.reasons) == len(self.tasks)

    @property
    def bytes_sent_total(self) -> int:
        """Bytes that all ranks together send in one step."""
        return sum(self.bytes_sent_by_rank)

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest rank over `makespan_bound`; 1.0 cannot be beaten."""
        return max(self.flops_by_rank) / self.makespan_bound if self.tasks else 1.0

    @property
    def packing_imbalance(self) -> float:
        """FLOPs of the busiest rank over `packing_bound`."""
        return max(self.flops_by_rank) / self.packing_bound if self.tasks else 1.0

    @property
    def scratch_bytes_max(self) -> int:
        """Whole matrices and orthogonaliser's scratch of one bucket on the fullest owner."""
        return max((bucket.scratch_bytes for bucket in self.buckets), default=0)

    @property
    def predicted_step_seconds(self) -> float:
        """Seconds of one step, gathers and returns overlapped with the neighbours' compute."""
        return self.cost_model.pipeline_seconds(
            [(bucket.gather_bytes, bucket.flops, bucket.return_bytes) for bucket in self.buckets]
        )

    def owner(self, task: int) -> int | None:
        """The matrix's only owner, or None when every replica computes it."""
        return self.owners[task][0] if len(self.owners[task]) == 1 else None
