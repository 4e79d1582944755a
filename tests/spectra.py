"""The spectrum zoo: gradients whose singular values, scales and shapes break careless code."""

from __future__ import annotations

import torch
from torch import Tensor


def with_spectrum(m: int, n: int, singular_values: Tensor, generator: torch.Generator) -> Tensor:
    """A float64 ``m x n`` matrix with these singular values and random singular vectors."""
    rank = min(m, n)
    u, _ = torch.linalg.qr(torch.randn(m, rank, dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64, generator=generator))
    return u @ torch.diag(singular_values.double()) @ v.T


def spectrum_zoo(m: int = 24, n: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Float64 matrices by name; ``one_row`` and ``one_column`` have their own shapes."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(m, n)
    decay = torch.arange(1, rank + 1, dtype=torch.float64)
    deficient = torch.zeros(rank, dtype=torch.float64)
    deficient[: rank // 3] = torch.linspace(1, 2, rank // 3, dtype=torch.float64)
    plain = torch.randn(m, n, dtype=torch.float64, generator=generator)
    return {
        "gaussian": plain,
        "flat": with_spectrum(m, n, torch.ones(rank), generator),
        "power_law": with_spectrum(m, n, decay**-2.0, generator),
        "rank_deficient": with_spectrum(m, n, deficient, generator),
        "zero": torch.zeros(m, n, dtype=torch.float64),
        "tiny_1e-30": plain * 1e-30,
        "huge_1e30": plain * 1e30,
        "rows_over_three_decades": plain * torch.logspace(0, -3, m, dtype=torch.float64)[:, None],
        "tall": torch.randn(n, m, dtype=torch.float64, generator=generator),
        "one_row": torch.randn(1, n, dtype=torch.float64, generator=generator),
        "one_column": torch.randn(m, 1, dtype=torch.float64, generator=generator),
    }
