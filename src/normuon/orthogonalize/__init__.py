"""Orthogonalisation of a batch of matrices: coefficients, methods, and the choice among them."""

from normuon.orthogonalize.backend import (
    BACKENDS,
    Backend,
    Orthogonalizer,
    check_backend,
    flops_per_matrix,
    is_faster_batched,
    orthogonalize,
    resolve_backend,
)
from normuon.orthogonalize.coefficients import (
    COEFFICIENT_TABLES,
    CoefficientTable,
    Triple,
    resolve_coefficients,
)
from normuon.orthogonalize.flops import num_panels
from normuon.orthogonalize.iteration import effective_rank, gram_newton_schulz, newton_schulz
from normuon.orthogonalize.normalize import (
    equilibrate_,
    largest_magnitude,
    normalize_frobenius,
)
from normuon.orthogonalize.precision import (
    NS_DTYPES,
    multiplies_bfloat16_natively,
    resolve_ns_dtype,
    sums_dtype,
    transport_dtype,
)
from normuon.orthogonalize.segments import METHODS
from normuon.orthogonalize.workspace import Workspace

__all__ = [
    "BACKENDS",
    "COEFFICIENT_TABLES",
    "METHODS",
    "NS_DTYPES",
    "Backend",
    "CoefficientTable",
    "Orthogonalizer",
    "Triple",
    "Workspace",
    "check_backend",
    "effective_rank",
    "equilibrate_",
    "flops_per_matrix",
    "gram_newton_schulz",
    "is_faster_batched",
    "largest_magnitude",
    "multiplies_bfloat16_natively",
    "newton_schulz",
    "normalize_frobenius",
    "num_panels",
    "orthogonalize",
    "resolve_backend",
    "resolve_coefficients",
    "resolve_ns_dtype",
    "sums_dtype",
    "transport_dtype",
]
