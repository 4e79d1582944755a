"""The order in which buckets gather, compute and return, so that messages hide behind the work.

Knows no mathematics and no tensors: everything it does is a callback with a bucket's index.
"""

from __future__ import annotations

from typing import Protocol

NUM_SLOTS = 2
"""Messages of one direction in flight at once: buffers are reused by every second bucket."""


class BucketStages(Protocol):
    """What happens to one bucket, in this order."""

    def start_gather(self, bucket: int) -> None:
        """Packs this rank's pieces and starts sending them to the owners."""

    def finish_gather(self, bucket: int) -> None:
        """Waits until the owned matrices have arrived."""

    def compute(self, bucket: int) -> None:
        """Orthogonalises the owned matrices and packs what goes back."""

    def start_return(self, bucket: int) -> None:
        """Starts sending the results to the ranks that store the parameters."""

    def finish_return(self, bucket: int) -> None:
        """Waits for this rank's results."""

    def apply(self, bucket: int) -> None:
        """Steps this rank's shards."""


def run_pipeline(stages: BucketStages, num_buckets: int) -> None:
    """Runs all buckets: while k computes, k + 1 gathers and k - 1 returns.

    Every rank issues the same messages in the same order. With two slots a direction, the gather of
    k + 2 may start once k has computed, and the return of k + 2 once that of k has been applied.

    Example:
        >>> class Recorder:
        ...     def __getattr__(self, stage):
        ...         return lambda bucket: print(stage, bucket)
        >>> run_pipeline(Recorder(), 2)
        start_gather 0
        start_gather 1
        finish_gather 0
        compute 0
        start_return 0
        finish_gather 1
        compute 1
        start_return 1
        finish_return 0
        apply 0
        finish_return 1
        apply 1
    """
    if num_buckets:
        stages.start_gather(0)
    for bucket in range(num_buckets):
        if bucket + 1 < num_buckets:
            stages.start_gather(bucket + 1)
        stages.finish_gather(bucket)
        stages.compute(bucket)
        stages.start_return(bucket)
        if bucket:
            stages.finish_return(bucket - 1)
            stages.apply(bucket - 1)
    if num_buckets:
        stages.finish_return(num_buckets - 1)
        stages.apply(num_buckets - 1)
