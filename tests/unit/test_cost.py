"""FLOPs, bytes and seconds against hand-computed values."""

from __future__ import annotations

import pytest

from normuon.distributed.cost import CostModel, format_bytes, newton_schulz_flops


def test_newton_schulz_flops_by_hand():
    # One step on [2, 3]: X X^T 2*2*2*3 = 24, A A 2*2*2*2 = 16, B X 24.
    assert newton_schulz_flops(2, 3, num_steps=1) == 64
    assert newton_schulz_flops(768, 768) == 5 * 6 * 768**3


def test_newton_schulz_flops_do_not_depend_on_orientation():
    assert newton_schulz_flops(768, 3072) == newton_schulz_flops(3072, 768)


def test_the_orthogonalisers_own_flops_are_used():
    assert CostModel(flops=lambda m, n: m + n).matrix_flops(2, 3) == 5


def test_a_flop_function_that_gives_nothing_is_refused():
    with pytest.raises(ValueError, match=r"flops\(2, 3\) = 0"):
        CostModel(flops=lambda m, n: 0).matrix_flops(2, 3)


def test_scratch_is_two_iterates_and_four_small_squares():
    # [4, 8] in two bytes: 2 * 32 + 4 * 16 entries.
    assert CostModel().scratch_bytes(4, 8) == 256
    assert CostModel().scratch_bytes(8, 4, element_bytes=4) == 512
    # Of a long matrix the float32 copy that is normalised weighs more: (4 + 2) * 1 * 100.
    assert CostModel().scratch_bytes(1, 100) == 600


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
