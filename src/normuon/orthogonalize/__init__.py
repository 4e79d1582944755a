"""Orthogonalisation of a batch of matrices: coefficients, methods, and the choice among them."""

from normuon.orthogonalize.backend import (
    NS_DTYPES,
    ORTHOGONALIZERS,
    Orthogonalizer,
    is_faster_batched,
    multiplies_bfloat16_natively,
    orthogonalize,
    resolve_ns_dtype,
    transport_dtype,
)
from normuon.orthogonalize.coefficients import (
    COEFFICIENT_TABLES,
    CoefficientTable,
    resolve_coefficients,
)
from normuon.orthogonalize.newton_schulz import (
    newton_schulz,
    normalize_frobenius,
)

__all__ = [
    "COEFFICIENT_TABLES",
    "NS_DTYPES",
    "ORTHOGONALIZERS",
    "CoefficientTable",
    "Orthogonalizer",
    "is_faster_batched",
    "multiplies_bfloat16_natively",
    "newton_schulz",
    "normalize_frobenius",
    "orthogonalize",
    "resolve_coefficients",
    "resolve_ns_dtype",
    "transport_dtype",
]
