"""Which gradients exist and are finite, agreed in one small all-reduce."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from normuon.distributed.agreement import check_agreement
from normuon.distributed.dtensor import place_among_copies
from normuon.step.adamw import is_finite
from normuon.step.order import GRADIENT, NONFINITE, finite_pieces
from normuon.step.pieces import PieceBatch
from normuon.step.shared_params import SharedMatrix, SharedParams, SharedVector
from normuon.step.staging import Loan, Staging


def reading_is_free(device: torch.device) -> bool:
    """Whether the host may look at values without waiting for a device."""
    return device.type == "cpu"


class GradientFlags:
    """One number per matrix and per `adamw` parameter: the maximum over replicas and shards.

    0: no gradient anywhere; 1: some rank has one; 2: some rank's is not finite, where the group
    skips those. A shard or replica without a gradient counts as zero if others have one.

    Every rank issues the same all-reduce at every step, whatever it holds. On a CPU, where reading
    is free, two mistakes are found with it: copies of which some have a gradient and some have
    none, and options that have become different between ranks.
    """

    def __init__(self, shared: SharedParams, num_matrices: Sequence[int], staging: Staging) -> None:
        """Numbers the flags.

        Args:
            shared: the parameters.
            num_matrices: of each parameter of matrices.
            staging: to where ranks exchange. Its memory is used from one agreement to the next.
        """
        self._shared = shared
        self._params: list[SharedMatrix | SharedVector] = [*shared.matrices, *shared.vectors]
        self._num_flags = [*num_matrices, *(1 for _ in shared.vectors)]
        self._first: list[int] = []
        size = 0
        for number in self._num_flags:
            self._first.append(size)
            size += number
        self._numbers = {id(matrix.owner): n for n, matrix in enumerate(shared.matrices)}
        self._size = size
        self._is_host = reading_is_free(shared.compute_device)
        # On a CPU, for each shard that has copies, one flag that a copy has a gradient and one that
        # a copy lacks it; then two for the options.
        self._copies: dict[int, int] = {}
        self._param_of_shard: list[int] = []
        for number, param in enumerate(self._params if self._is_host else ()):
            place = place_among_copies(param.tensor)
            if place is not None:
                num_shards, own = place
                self._copies[number] = size + 2 * (len(self._param_of_shard) + own)
                self._param_of_shard += [number] * num_shards
        device = shared.device
        total = size + 2 * len(self._param_of_shard) + 2 * self._is_host
        self._staging = staging
        self._flags = torch.zeros(total, device=device)
        self._agreed = self._flags
        self._coming: Loan | None = None
        self._said = torch.zeros(total, device=device)
        self._present: tuple[bool, ...] | None = None
        self._options = ""

    def index_of(self, batch: PieceBatch) -> Tensor:
        """``[K]``: the flags of a batch's matrices, which this rank stores pieces of."""
        found = []
        for owner, index in batch.places():
            number = self._numbers[id(owner)]
            found.append(self._first[number] + index)
        return torch.tensor(found, device=self._shared.device)

    def index_of_tasks(self, tasks: Sequence[tuple[SharedMatrix, int]]) -> Tensor:
        """The flags of matrices, each given by its parameter and its place there, for owners."""
        found = [self._first[self._numbers[id(m.owner)]] + index for m, index in tasks]
        return torch.tensor(found, device=self._shared.compute_device)

    def agree_(self, batches: Sequence[tuple[PieceBatch, Tensor]]) -> None:
        """Takes the maximum over all ranks; nothing has moved yet.

        Args:
            batches: all pieces that this rank stores, with the flags of their matrices.

        Raises:
            ValueError: on a CPU: copies that disagree, or ranks whose options have become
                different; on every rank.
        """
        self._say_presence()
        if self._coming is not None:  # Nobody asked.
            self._coming.give_back()
            self._coming = None
        self._flags.copy_(self._said)
        for batch, index in batches:
            grads = [run.owner.grad for run in batch.runs]
            if batch.first.group["skip_nonfinite"] and any(grad is not None for grad in grads):
                said = torch.where(finite_pieces(batch), 0.0, NONFINITE)
                self._flags.scatter_reduce_(0, index, said, "amax")
        for number, vector in enumerate(self._shared.vectors):
            if vector.group["skip_nonfinite"] and vector.grad is not None:
                at = self.of_vector(number)
                at.copy_(torch.where(is_finite(vector.grad), at, NONFINITE))
        if self._is_host:
            self._say_options()
        self._agreed = self._sent()
        dist.all_reduce(self._agreed, op=dist.ReduceOp.MAX, group=self._shared.group)
        if self._staging.is_needed:
            self._coming = self._staging.lend("flags home", [(len(self._flags), torch.float32)])
            self._coming.down_(0, self._agreed)
        if self._is_host:
            self._check_what_ranks_said()

    def _sent(self) -> Tensor:
        """What this rank says, where ranks exchange."""
        if not self._staging.is_needed:
            return self._flags
        loan = self._staging.lend("flags up", [(len(self._flags), torch.float32)])
        loan.parts[0].copy_(self._flags)
        sent = loan.up(0)
        loan.give_back()
        return sent

    def _here(self) -> Tensor:
        """What ranks have agreed on, where the parameters are."""
        if self._coming is not None:
            self._coming.wait()
            self._flags.copy_(self._coming.parts[0])
            self._coming.give_back()
            self._coming = None
        return self._flags

    def _say_presence(self) -> None:
        present = tuple(param.local_grad is not None for param in self._params)
        if present == self._present:
            return
        said = [0.0] * len(self._said)
        for number, has_grad in enumerate(present):
            if has_grad:  # Of all its matrices, as in one process: experts of other ranks too.
                first, count = self._first[number], self._num_flags[number]
                said[first : first + count] = [GRADIENT] * count
            if number in self._copies:
                said[self._copies[number] + (not has_grad)] = 1.0
        # Pinned, or the copy would wait for all that the device still has to do.
        values = torch.tensor(said, device="cpu", pin_memory=self._said.is_cuda)
        self._said.copy_(values, non_blocking=True)
        self._present = present

    def _say_options(self) -> None:
        """A number for the options, and its negative: their maxima add up to 0 if all are equal."""
        text = "\n".join(self._shared.option_lines())
        if text != self._options:
            digest = hashlib.sha256(text.encode()).digest()
            number = float(int.from_bytes(digest[:2], "big"))  # Exact in float32.
            self._said[-2:] = torch.tensor([number, -number], device="cpu")
            self._options = text
        self._flags[-2:] = self._said[-2:]

    def _check_what_ranks_said(self) -> None:
        flags = self._here()
        if flags[-2:].sum() != 0:
            lines = self._shared.option_lines()
            check_agreement(self._shared.group, lines, device=self._shared.compute_device)
        pairs = flags[self._size : -2].view(-1, 2)
        if pairs.amin(1).any() if len(pairs) else False:
            wrong = {
                self._params[number].label
                for number, pair in zip(self._param_of_shard, pairs, strict=True)
                if pair.all()
            }
            raise ValueError(
                f"{', '.join(sorted(wrong))}: some replicas have a gradient and others have none; "
                "replicas must hold equal gradients, as under DDP and HSDP"
            )

    def moves(self, index: Tensor) -> Tensor:
        """Booleans: which of some matrices are stepped, where the parameters are."""
        return self._here()[index] == GRADIENT

    def moves_at_owner(self, index: Tensor) -> Tensor:
        """The same where matrices are orthogonalised; ``index`` is from `index_of_tasks`."""
        return self._agreed[index] == GRADIENT

    def skips(self, number: int) -> Tensor:
        """Booleans: which matrices of a parameter are skipped, their gradient not being finite."""
        return self._of_matrices(number) == NONFINITE

    def steps(self, number: int) -> Tensor:
        """Booleans: which matrices of a parameter are stepped."""
        return self._of_matrices(number) == GRADIENT

    def _of_matrices(self, number: int) -> Tensor:
        first = self._first[number]
        return self._here()[first : first + self._num_flags[number]]

    def of_vector(self, number: int) -> Tensor:
        """The flag of an `adamw` parameter."""
        return self._here()[self._first[len(self._shared.matrices) + number]]

    def moves_of_vectors(self) -> Tensor:
        """Booleans: which of the `adamw` parameters are stepped, where the parameters are."""
        count = len(self._shared.vectors)
        return self._here()[self._size - count : self._size] == GRADIENT
