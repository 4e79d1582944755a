"""Orthogonalisation: the polynomial it computes, on every spectrum, dtype and batch size."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from normuon.orthogonalize import (
    multiplies_bfloat16_natively,
    newton_schulz,
    normalize_frobenius,
    orthogonalize,
    resolve_coefficients,
    resolve_ns_dtype,
)
from normuon.orthogonalize.flops import orthogonalize_flops
from tests.reference import orthogonalize_by_svd
from tests.spectra import spectrum_zoo

ZOO = spectrum_zoo()


@pytest.mark.parametrize("table", ["jordan", "polar_express", "you", "cans"])
@pytest.mark.parametrize("name", list(ZOO))
def test_it_is_the_polynomial_of_the_singular_values(name, table):
    """Newton-Schulz by products equals the polynomial applied through an SVD, to rounding."""
    coefficients = resolve_coefficients(table, 5)
    actual = orthogonalize(ZOO[name][None], coefficients=coefficients, dtype=torch.float64)
    expected = orthogonalize_by_svd(ZOO[name], coefficients)
    # 5 steps amplify a rounding of 2^-53 by at most 8.3 * 4.1 * 3.9 * 3.3 * 2.3 ~ 1000.
    torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(ZOO))
def test_lower_precision_keeps_singular_values_bounded(name, dtype):
    """No NaN, and no singular value above 1.3, whatever the spectrum: half precision included."""
    o = orthogonalize(
        ZOO[name].float()[None], coefficients=resolve_coefficients("jordan", 5), dtype=dtype
    )
    assert o.dtype == dtype
    assert torch.linalg.svdvals(o.double()).max() <= 1.3


def test_a_tall_matrix_gives_the_transpose_of_its_wide_twin():
    x = torch.randn(3, 40, 24, dtype=torch.float64)
    coefficients = resolve_coefficients("jordan", 5)
    tall = orthogonalize(x, coefficients=coefficients, dtype=torch.float64)
    wide = orthogonalize(x.mT, coefficients=coefficients, dtype=torch.float64)
    torch.testing.assert_close(tall, wide.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 16, 16), (4, 12, 40), (4, 40, 12), (3, 1, 9), (3, 9, 1)])
def test_a_batch_is_its_matrices_one_by_one(shape):
    """Bit by bit: the CPU's batched and single products round alike."""
    x = torch.randn(shape)
    coefficients = resolve_coefficients("jordan", 5)
    together = orthogonalize(x, coefficients=coefficients, dtype=torch.float32)
    for index in range(shape[0]):
        alone = orthogonalize(x[index : index + 1], coefficients=coefficients, dtype=torch.float32)
        assert torch.equal(together[index], alone[0])


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e15, 1e30, 1e38])
def test_the_scale_of_the_input_does_not_matter(scale):
    """No epsilon in the norm: 1e-38 and 1e38 give what 1 gives, to float32's rounding."""
    x = torch.randn(2, 8, 12).clamp(-3, 3)
    unit = normalize_frobenius(x, dtype=torch.float32)
    scaled = normalize_frobenius(x * torch.tensor(scale), dtype=torch.float32)
    # 1e-38 is below the smallest normal float32, where 2^-149 is the spacing: 1e-45 / 1e-38 = 1e-7.
    torch.testing.assert_close(scaled, unit, rtol=0, atol=1e-6)
    assert torch.linalg.vector_norm(scaled, dim=(-2, -1)).allclose(torch.ones(2), atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4), (4, 1)], ids=str)
def test_equilibration_evens_rows_and_columns(shape):
    """Of an outer product of scales, whatever they are, the square root is left."""
    m, n = shape
    rows, columns = torch.logspace(-6, 6, m), torch.logspace(3, -3, n)
    scales = rows[:, None] * columns
    signs = torch.sign(torch.randn(m, n))
    even = normalize_frobenius((scales * signs)[None], dtype=torch.float32, equilibrate=True)
    expected = signs * scales.sqrt() / torch.linalg.vector_norm(scales.sqrt())
    torch.testing.assert_close(even[0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_equilibration_keeps_zeros_and_takes_any_scale(scale):
    x = torch.randn(2, 6, 7)
    x[0, 2], x[0, :, 3], x[1] = 0.0, 0.0, 0.0
    even = normalize_frobenius(x * scale, dtype=torch.float32, equilibrate=True)
    assert torch.equal(even == 0, x == 0)
    assert even.isfinite().all()
    torch.testing.assert_close(torch.linalg.vector_norm(even[0]), torch.tensor(1.0))


def test_zero_stays_zero_beside_matrices_that_are_not():
    x = torch.stack([torch.zeros(4, 6), torch.randn(4, 6)])
    o = orthogonalize(x, coefficients=resolve_coefficients("jordan", 5), dtype=torch.float32)
    assert torch.equal(o[0], torch.zeros(4, 6))
    assert o[1].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_entry_spoils_its_own_matrix_only(bad):
    x = torch.randn(2, 4, 6)
    x[0, 1, 2] = bad
    o = orthogonalize(x, coefficients=resolve_coefficients("jordan", 5), dtype=torch.float32)
    assert not o[0].isfinite().any()
    assert o[1].isfinite().all()


def test_the_input_is_not_written_to():
    x = torch.randn(2, 6, 4)
    before = x.clone()
    orthogonalize(x, coefficients=resolve_coefficients("you", 5), dtype=torch.float32)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("m", "n"), [(16, 16), (16, 48), (48, 16)])
def test_the_flop_model_is_the_flop_count(m, n):
    x = torch.randn(3, m, n)
    with FlopCounterMode(display=False) as counter:
        newton_schulz(x, resolve_coefficients("jordan", 5))
    assert counter.get_total_flops() == 3 * orthogonalize_flops(m, n, segments=[1] * 5)


def test_a_callable_orthogonaliser_gets_unit_matrices_and_keeps_its_buffer():
    seen = []

    def polar(x_BMN):
        seen.append(torch.linalg.vector_norm(x_BMN, dim=(-2, -1)))
        u, _, vh = torch.linalg.svd(x_BMN, full_matrices=False)
        seen.append(u @ vh)
        return seen[-1]

    o = orthogonalize(
        torch.randn(2, 4, 6) * 1e12, coefficients=(), dtype=torch.float32, orthogonalizer=polar
    )
    torch.testing.assert_close(seen[0], torch.ones(2), rtol=0, atol=1e-6)
    o.mul_(2)
    torch.testing.assert_close(seen[1] * 2, o)


def test_a_callable_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"returned shape \[2, 6, 4\] for an input of \[2, 4, 6\]"):
        orthogonalize(
            torch.randn(2, 4, 6),
            coefficients=(),
            dtype=torch.float32,
            orthogonalizer=lambda x: x.mT,
        )


def test_the_dtype_follows_the_parameter_and_the_hardware():
    cpu = torch.device("cpu")
    native = torch.bfloat16 if multiplies_bfloat16_natively("cpu") else torch.float32
    assert resolve_ns_dtype(None, param_dtype=torch.float32, device=cpu) == native
    assert resolve_ns_dtype(None, param_dtype=torch.float64, device=cpu) == torch.float64
    assert resolve_ns_dtype(torch.float32, param_dtype=torch.float64, device=cpu) == torch.float32
    cuda = torch.device("cuda")
    assert resolve_ns_dtype(None, param_dtype=torch.float32, device=cuda) == torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_a_cpu_multiplies_bfloat16_natively_with_amx_or_avx512_bf16(
    monkeypatch, capabilities, native
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    multiplies_bfloat16_natively.cache_clear()
    try:
        assert multiplies_bfloat16_natively("cpu") is native
    finally:
        multiplies_bfloat16_natively.cache_clear()


@pytest.mark.parametrize(("amx", "avx512", "native"), [(0, 0, False), (1, 0, True), (0, 1, True)])
def test_older_torch_is_asked_in_its_own_way(monkeypatch, amx, avx512, native):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    multiplies_bfloat16_natively.cache_clear()
    try:
        assert multiplies_bfloat16_natively("cpu") is native
    finally:
        multiplies_bfloat16_natively.cache_clear()
