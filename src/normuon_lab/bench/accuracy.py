"""How accurate each way to orthogonalise is: singular values out, and error against float64.

Every figure is relative to the polynomial itself, evaluated by plain Newton-Schulz in float64 on
the input as the dtype holds it. The polynomial's own distance from the polar factor depends on the
coefficient table: see its range of output singular values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normuon import NorMuon
from normuon.orthogonalize import METHODS, Triple, newton_schulz, orthogonalize
from normuon.orthogonalize.segments import gram_segments, plain_segments

HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def hard_spectra(m: int, n: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Float64 ``m x n`` matrices of Frobenius norm 1 with spectra that momentum may have, by name.

    Besides a Gaussian: all singular values equal; decaying log-linearly to 1e-2, 1e-4 and 1e-6 of
    the largest; half of them zero; and one large over a floor of 1e-3.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = min(m, n)
    normal = torch.randn(m, n, dtype=torch.float64, generator=generator)
    u, _, vh = torch.linalg.svd(normal, full_matrices=False)
    values = {
        "flat": torch.ones(rank),
        "decay to 1e-2": torch.logspace(0, -2, rank),
        "decay to 1e-4": torch.logspace(0, -4, rank),
        "decay to 1e-6": torch.logspace(0, -6, rank),
        "half the rank": (torch.arange(rank) < rank // 2).float(),
        "one over 1e-3": torch.where(torch.arange(rank) == 0, 1.0, 1e-3),
    }
    matrices = {"gaussian": normal, **{k: u * v.double() @ vh for k, v in values.items()}}
    return {name: x / torch.linalg.norm(x) for name, x in matrices.items()}


def image_of_interval(coefficients: Sequence[Triple]) -> tuple[float, float]:
    """The smallest and largest output singular value for inputs in ``[1e-3, 1]``, in float64."""
    s = torch.logspace(-3, 0, 100_001, dtype=torch.float64)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return float(s.min()), float(s.max())


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One matrix, dtype and method.

    Attributes:
        spectrum: name in `hard_spectra`.
        dtype: computed in.
        method: of `normuon.orthogonalize.METHODS`.
        segments: steps per segment.
        error: spectral norm of the difference from the float64 polynomial.
        relative_error: its Frobenius norm over the polynomial's.
        largest_singular_value: of what came out.
    """

    spectrum: str
    dtype: str
    method: str
    segments: tuple[int, ...]
    error: float
    relative_error: float
    largest_singular_value: float


def accuracy_of_methods(
    coefficients: tuple[Triple, ...], *, m: int = 192, n: int = 576
) -> Iterator[Accuracy]:
    """Every method in every dtype of `HALF_AND_SINGLE` on every hard spectrum."""
    for spectrum, x in hard_spectra(m, n).items():
        for dtype in HALF_AND_SINGLE:
            rounded = x.to(dtype)
            exact = newton_schulz(rounded.double()[None], coefficients)[0]
            for method in METHODS:
                o = orthogonalize(
                    rounded[None], coefficients=coefficients, dtype=dtype, orthogonalizer=method
                )[0].double()
                plain = method == "newton_schulz"
                segments = (
                    plain_segments(coefficients) if plain else gram_segments(coefficients, dtype)
                )
                yield Accuracy(
                    spectrum=spectrum,
                    dtype=str(dtype).removeprefix("torch."),
                    method=method,
                    segments=segments,
                    error=float(torch.linalg.matrix_norm(o - exact, 2)),
                    relative_error=float(torch.linalg.norm(o - exact) / torch.linalg.norm(exact)),
                    largest_singular_value=float(torch.linalg.matrix_norm(o, 2)),
                )


def error_of_updates(
    dtype: torch.dtype, method: str, *, m: int = 192, n: int = 576, steps: int = 10
) -> dict[str, float]:
    """The whole NorMuon update: its error over the distance moved, by spectrum.

    ``steps`` steps of float32 weights on gradients of each spectrum, against the same in float64
    throughout with the plain iteration. Each step's gradients have other singular vectors.
    """
    gradients = [hard_spectra(m, n, seed=seed) for seed in range(steps)]
    errors = {}
    for spectrum in gradients[0]:
        moved = []
        for weight_dtype, ns_dtype, orthogonalizer in (
            (torch.float64, torch.float64, "newton_schulz"),
            (torch.float32, dtype, method),
        ):
            param = torch.nn.Parameter(torch.zeros(m, n, dtype=weight_dtype))
            optimizer = NorMuon(
                [param], lr=1e-3, weight_decay=0.0, ns_dtype=ns_dtype, orthogonalizer=orthogonalizer
            )
            for gradient in gradients:
                param.grad = gradient[spectrum].to(weight_dtype)
                optimizer.step()
            moved.append(param.detach().double())
        exact, actual = moved
        errors[spectrum] = float(torch.linalg.norm(actual - exact) / torch.linalg.norm(exact))
    return errors
