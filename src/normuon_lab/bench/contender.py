"""What a contender is: how its optimizer is built, what it computes, and why it may be missing.

NorMuon's own are listed in `own.py`, other packages' in `peers.py`; both only describe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

Builder = Callable[[Sequence[nn.Parameter]], Optimizer]
"""Makes an optimizer of plain matrices ``[out, in]``."""

OWN = "normuon"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One optimizer in a benchmark.

    Attributes:
        name: unique, for people.
        package: the distribution it comes from.
        build: makes the optimizer whose steps are timed.
        build_unscaled: makes its twin without neuron scaling, Muon, whose first step from zero
            weights is proportional to what the orthogonaliser returned.
        method: how the polynomial is evaluated: "newton_schulz", "gram", or "auto" for either by
            shape.
        coefficients: a table's name, in `normuon`'s words.
        ns_steps: Newton-Schulz steps.
        ns_dtype: dtype of Newton-Schulz, as torch names it without its prefix.
        compiles: whether its steps go through torch.compile.
        missing: why it cannot run here, and what would help; None where it can.
        note: where it runs otherwise than as released.
        orthogonalize: its orthogonaliser alone, ``[B, m, n] -> [B, m, n]``, where that has no
            scale of its own; None where it is not called apart.
        flops_per_matrix: FLOPs that its own model counts for m x n; None without one.
    """

    name: str
    package: str
    build: Builder
    build_unscaled: Builder
    method: str
    coefficients: str
    ns_steps: int
    ns_dtype: str
    compiles: bool = False
    missing: str | None = None
    note: str | None = None
    orthogonalize: Callable[[Tensor], Tensor] | None = None
    flops_per_matrix: Callable[[int, int], int] | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is one of NorMuon's ways, and not a peer."""
        return self.package == OWN
