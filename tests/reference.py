"""The oracle: NorMuon in float64 as one plain loop, written from the paper's Algorithm 1.

Nothing here comes from the library: matrices one at a time, no batching, no in-place updates, the
polynomial applied to singular values through an SVD, so that no matrix product is shared either.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


def orthogonalize_by_svd(matrix: Tensor, coefficients: tuple = JORDAN) -> Tensor:
    """NS(M): the odd polynomial of eq. 5 applied to the singular values of M / ||M||_F."""
    largest = matrix.abs().max()
    if largest == 0:
        return torch.zeros_like(matrix)
    scaled = matrix / largest  # 1e-30 squared would underflow even in float64's products
    u, s, vh = torch.linalg.svd(scaled / torch.linalg.norm(scaled), full_matrices=False)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def equilibrate(matrix: Tensor) -> Tensor:
    """diag(r)^-1/2 M diag(c)^-1/2, r and c the norms of M's rows and columns."""
    r, c = torch.linalg.norm(matrix, dim=1), torch.linalg.norm(matrix, dim=0)
    return (
        torch.diag(torch.where(r > 0, r, 1) ** -0.5)
        @ matrix
        @ torch.diag(torch.where(c > 0, c, 1) ** -0.5)
    )


@dataclass
class ReferenceNorMuon:
    """One matrix, m x n, and its state; every number in float64."""

    weight: Tensor
    lr: float = 1e-2
    weight_decay: float = 0.1
    beta1: float = 0.95
    beta2: float = 0.95
    nesterov: bool = True
    eps: float = 1e-8
    scaling: str = "match_rms_adamw"
    columns_are_neurons: bool = False
    coefficients: tuple = JORDAN
    equilibrated: bool = False
    momentum: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight = self.weight.double().clone()
        m, n = self.weight.shape
        self.momentum = torch.zeros(m, n, dtype=torch.float64)
        self.v = torch.zeros(n if self.columns_are_neurons else m, dtype=torch.float64)

    def step(self, grad: Tensor) -> None:
        m, n = self.weight.shape
        grad = grad.double()
        self.momentum = self.beta1 * self.momentum + (1 - self.beta1) * grad  # line 2
        direction = self.momentum
        if self.nesterov:
            direction = self.beta1 * self.momentum + (1 - self.beta1) * grad
        if self.equilibrated:
            direction = equilibrate(direction)
        o = orthogonalize_by_svd(direction, self.coefficients)  # line 3
        inputs = 0 if self.columns_are_neurons else 1
        self.v = self.beta2 * self.v + (1 - self.beta2) * (o * o).mean(inputs)  # line 4
        o_hat = o / (self.v.sqrt() + self.eps).unsqueeze(inputs)  # line 5
        norm = torch.linalg.norm(o_hat)
        if norm == 0:
            size = 0.0
        elif self.scaling == "match_rms_adamw":
            size = 0.2 * self.lr * (m * n) ** 0.5 / norm  # line 6
        else:  # "original" is the authors' released code
            ratio = m / n if self.scaling == "spectral_unclamped" else max(1, m / n)
            size = self.lr * torch.linalg.norm(o) / norm * ratio**0.5
        self.weight = self.weight - self.lr * self.weight_decay * self.weight - size * o_hat


def relative_to_distance_moved(actual: Tensor, expected: Tensor, start: Tensor) -> float:
    """``||actual - expected|| / ||expected - start||``, in float64."""
    moved = torch.linalg.norm(expected.double() - start.double())
    error = torch.linalg.norm(actual.double() - expected.double())
    return float(error / moved) if moved > 0 else float(error)
