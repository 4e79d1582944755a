"""Seconds, and the decision that depends on them, against hand-computed values."""

from __future__ import annotations

import pytest

from normuon.distributed.cost import CostModel, format_bytes


def test_seconds_by_hand():
    model = CostModel(
        flops_per_second=1e3,
        bytes_per_second=100.0,
        replica_bytes_per_second=10.0,
        latency_seconds=0.5,
    )
    assert model.compute_seconds(2_000) == 2.0
    assert model.send_seconds(300) == 3.5
    assert model.send_seconds(300, num_messages=4) == 5.0
    assert model.send_seconds_between_replicas(300) == 30.5


def test_replicas_are_as_near_as_ranks_where_nothing_else_is_said():
    model = CostModel(bytes_per_second=100.0, latency_seconds=0.0)
    assert model.bytes_per_second_between_replicas == 100.0
    assert model.send_seconds_between_replicas(300) == 3.0


@pytest.mark.parametrize(
    "rates",
    [
        {"flops_per_second": 0.0},
        {"bytes_per_second": -1.0},
        {"replica_bytes_per_second": float("inf")},
        {"latency_seconds": -1.0},
    ],
)
def test_impossible_rates_are_refused_by_name(rates):
    with pytest.raises(ValueError, match=next(iter(rates))):
        CostModel(**rates)


class TestOncePerReplica:
    # 1 GFLOP takes 1 ms, 1 MB takes 1 ms.
    model = CostModel(flops_per_second=1e12, bytes_per_second=1e9, latency_seconds=0.0)

    def test_cheap_to_compute_is_computed_by_every_replica(self):
        per_replica, reason = self.model.once_per_replica(
            300_000_000, gather_bytes=0, return_bytes=1_200_000, num_replicas=4
        )
        assert per_replica
        assert reason == (
            "replicated 4 times: computing 0.3 GFLOP in every replica takes 0.3 ms, "
            "sending 1.2 MB takes 1.2 ms, so every replica computes"
        )

    def test_cheap_to_send_is_sent(self):
        per_replica, reason = self.model.once_per_replica(
            3_000_000_000, gather_bytes=0, return_bytes=1_200_000, num_replicas=4
        )
        assert not per_replica
        assert reason.endswith("so one rank sends")

    def test_gathering_again_counts_against_computing_again(self):
        decide = lambda gather: self.model.once_per_replica(  # noqa: E731
            1_000_000_000, gather_bytes=gather, return_bytes=1_200_000, num_replicas=2
        )
        assert decide(0)[0]
        assert not decide(1_200_000)[0]

    def test_a_slow_link_between_replicas_makes_each_compute(self):
        slow = CostModel(
            flops_per_second=1e12,
            bytes_per_second=1e9,
            replica_bytes_per_second=1e8,
            latency_seconds=0.0,
        )
        arguments = {"gather_bytes": 1_200_000, "return_bytes": 1_200_000, "num_replicas": 2}
        assert not self.model.once_per_replica(3_000_000_000, **arguments)[0]
        assert slow.once_per_replica(3_000_000_000, **arguments)[0]


def test_bytes_for_people():
    assert [format_bytes(n) for n in (999, 1000, 2.5e9)] == ["999 B", "1 kB", "2.5 GB"]
