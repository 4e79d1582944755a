"""In which order an epoch takes its sequences: a permutation that needs no memory.

A Feistel network on the sequence numbers, so that any position of any epoch can be asked for at
once, by any rank, for any number of sequences. Made of integer arithmetic alone: the order is the
same on every machine and under every version of numpy, so that a resumed run never changes it.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = 6


class EpochOrder:
    """The order of one epoch, a permutation of ``range(num_sequences)``.

    Args:
        num_sequences: sequences in the epoch, at least 1.
        seed: of the run.
        epoch: counted from 0.

    Example:
        >>> order = EpochOrder(5, seed=0, epoch=0)
        >>> sorted(order(np.arange(5)).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, num_sequences: int, *, seed: int, epoch: int) -> None:
        assert num_sequences >= 1
        self._num_sequences = num_sequences
        # Both halves are equally wide, so the network permutes at most 4 times as many numbers.
        self._half_bits = np.uint64(max(1, ((num_sequences - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.shake_128(f"{seed},{epoch}".encode()).digest(8 * _ROUNDS)
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The sequences at these positions of the epoch."""
        values = self._permute(positions.astype(np.uint64))
        # Numbers beyond the end walk on along their cycle until they come back inside it.
        while True:
            outside = values >= np.uint64(self._num_sequences)
            if not outside.any():
                return values.astype(np.int64)
            values[outside] = self._permute(values[outside])

    def _permute(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half_bits) | right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
