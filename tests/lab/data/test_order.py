"""The order of an epoch: a permutation of its own, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_lab.data.sequences import EpochOrder


@settings(deadline=None)
@given(num_sequences=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_every_sequence_comes_once(num_sequences: int, seed: int, epoch: int) -> None:
    order = EpochOrder(num_sequences, seed=seed, epoch=epoch)
    assert sorted(order(np.arange(num_sequences)).tolist()) == list(range(num_sequences))


def test_any_position_can_be_asked_for_alone() -> None:
    order = EpochOrder(1000, seed=3, epoch=2)
    whole = order(np.arange(1000))
    assert [int(order(np.array([i]))[0]) for i in (0, 17, 999)] == whole[[0, 17, 999]].tolist()


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1), (1, 1)])
def test_seeds_and_epochs_have_orders_of_their_own(seed: int, epoch: int) -> None:
    positions = np.arange(4096)
    first = EpochOrder(4096, seed=0, epoch=0)(positions)
    other = EpochOrder(4096, seed=seed, epoch=epoch)(positions)
    # Of two random permutations one place in 4096 agrees on average, and ten almost never.
    assert (first == other).sum() < 10
    assert (first == positions).sum() < 10


def test_neighbours_are_scattered() -> None:
    """Distances between neighbours are those of a random permutation: a third of the length."""
    order = EpochOrder(100_000, seed=0, epoch=0)(np.arange(100_000))
    # The mean of 1e5 distances of standard deviation 0.236 n; 5 standard errors are 0.004 n.
    assert np.abs(np.diff(order)).mean() == pytest.approx(100_000 / 3, rel=0.012)


def test_the_order_never_changes() -> None:
    """A checkpoint of any age must go on in the order it began with."""
    assert EpochOrder(10, seed=0, epoch=0)(np.arange(10)).tolist() == [9, 6, 1, 4, 5, 3, 2, 7, 8, 0]
    large = EpochOrder(10**12, seed=7, epoch=3)(np.array([0, 1, 10**12 - 1]))
    assert large.tolist() == [306788012727, 963913546848, 615645384661]
