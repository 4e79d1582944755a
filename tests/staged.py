"""Steps on the CPU as if the host and the computing device were apart: every copy is made.

torch tells "cpu:0" from "cpu", and both are the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor

from normuon.step.staging import Loan, Sizes, Staging, cut

POISON = 0xFF
"""In every byte it is NaN in all floating-point dtypes, and a flag that is not 0 or 1."""


class LateLoan(Loan):
    """What comes down arrives when it is waited for, and not before."""

    def __init__(self, staging: Staging, name: str, parts: list[Tensor]) -> None:
        super().__init__(staging, name, parts)
        self._late: list[tuple[Tensor, Tensor]] = []

    def down_(self, number: int, tensor: Tensor) -> None:
        """Notes what will arrive."""
        part = self.parts[number]
        assert part.dtype == tensor.dtype, "nothing is converted on the way"
        self._late.append((part, tensor.reshape(-1).clone()))

    def wait(self) -> None:
        """It arrives."""
        for part, tensor in self._late:
            part.copy_(tensor)
        self._late = []


class ApartStaging(Staging):
    """One that spoils memory that is not lent.

    Attributes:
        made: all that were made since `steps_are_staged`.
        lent: names of memory that has not been given back.
        num_loans: how often memory was lent.
    """

    made: ClassVar[list[ApartStaging]] = []

    def __init__(self, host: torch.device, device: torch.device) -> None:
        super().__init__(host, device)
        assert self.is_needed
        self.lent: set[str] = set()
        self.num_loans = 0
        self.made.append(self)

    def lend(self, name: str, sizes: Sizes) -> Loan:
        """Spoilt memory, which nobody else has."""
        assert name not in self.lent, f"{name} is lent twice"
        super().lend(name, sizes)
        memory = self._memory[name].fill_(POISON)
        self.lent.add(name)
        self.num_loans += 1
        return LateLoan(self, name, cut(memory, sizes))

    def take_back(self, name: str, parts: list[Tensor]) -> None:
        """Spoils it."""
        self.lent.remove(name)
        self._memory[name].fill_(POISON)


@contextmanager
def steps_are_staged(kind: type[ApartStaging] = ApartStaging) -> Iterator[list[ApartStaging]]:
    """Steps of optimizers built in here take all matrices to another device and back."""
    kind.made = []

    def apart(label: str, param: Tensor, group: object) -> torch.device:
        return torch.device("cpu", 0)

    with (
        mock.patch("normuon.step.staging.Staging", kind),
        mock.patch("normuon.step.local.compute_device_of", apart),
        mock.patch("normuon.step.shared_params.compute_device_of", apart),
    ):
        yield kind.made
    for one in kind.made:
        assert not one.lent - {"flags home"}, f"{one.lent} is still lent"
