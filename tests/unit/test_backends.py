"""Which backend runs an orthogonalisation: eager, compiled once for many shapes, or kernels."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from normuon import NorMuon
from normuon.orthogonalize import backend as backend_module
from normuon.orthogonalize import (
    gram_newton_schulz,
    kernels,
    newton_schulz,
    orthogonalize,
    resolve_backend,
    resolve_coefficients,
)
from normuon.orthogonalize.compiled import compiled_iterate

JORDAN = resolve_coefficients("jordan", 5)
CPU = torch.device("cpu")
NINE_SHAPES = [(8, 8), (16, 16), (8, 24), (24, 8), (12, 20), (20, 12), (6, 40), (40, 6), (32, 32)]


def test_compiled_equals_eager_without_a_recompile_storm():
    """Nine shapes in batches of one to five are a few programs, not nine, and none falls back."""
    compiled_iterate.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    options = {"coefficients": JORDAN, "dtype": torch.float32}
    for batch in (1, 2, 5, 3):
        for shape in NINE_SHAPES:
            x = torch.randn(batch, *shape)
            compiled = orthogonalize(x, backend="compile", **options)
            # The same products, added up in another order by other kernels: 485 x some 2^-24.
            torch.testing.assert_close(compiled, orthogonalize(x, **options), rtol=0, atol=2e-4)
    # Wide or tall or square, alone or in a batch, in one segment or five: at most a dozen.
    assert 1 <= counters["stats"]["unique_graphs"] <= 12
    assert not counters["graph_break"]
    first = counters["stats"]["unique_graphs"]
    for batch in (4, 7):
        for m, n in NINE_SHAPES:
            orthogonalize(torch.randn(batch, m + 2, n + 2), backend="compile", **options)
    assert counters["stats"]["unique_graphs"] == first


def test_an_optimizer_steps_by_the_compiled_backend():
    def trained(ns_backend):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(8, 24)) for _ in range(3)]
        optimizer = NorMuon(params, ns_backend=ns_backend, ns_dtype=torch.float32)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        return params

    for eager, compiled in zip(trained("eager"), trained("compile"), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


def test_kernels_are_refused_by_name_where_they_cannot_run():
    with pytest.raises(ValueError, match="they run on CUDA devices, not on cpu; 'auto' takes what"):
        resolve_backend("kernels", device=CPU, dtype=torch.bfloat16)


def test_kernels_that_are_not_installed_name_the_extra(monkeypatch):
    monkeypatch.setattr(backend_module, "is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'normuon\[gpu\]'"):
        NorMuon([torch.nn.Parameter(torch.zeros(2, 3))], ns_backend="kernels")


def test_kernels_that_cannot_be_imported_say_why(monkeypatch):
    """As where a package that they need is missing."""
    monkeypatch.setattr(kernels, "is_installed", lambda: True)
    monkeypatch.setattr(kernels, "KERNEL_MODULE", "no_such_module")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels.why_not_importable.cache_clear()
    reason = kernels.why_unavailable(torch.device("cuda", 0), torch.bfloat16)
    kernels.why_not_importable.cache_clear()
    assert "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'" in reason


@pytest.mark.parametrize(
    ("capability", "dtype", "installed", "reason"),
    [
        ((9, 0), torch.bfloat16, True, None),
        ((10, 0), torch.float16, True, None),
        ((8, 0), torch.bfloat16, True, "they need Hopper or Blackwell"),
        ((9, 0), torch.float32, True, "they compute in float16, not in float32"),
        ((9, 0), torch.bfloat16, False, "is not installed"),
    ],
)
def test_where_the_package_runs(monkeypatch, capability, dtype, installed, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "is_installed", lambda: installed)
    monkeypatch.setattr(kernels, "why_not_importable", lambda: None)
    found = kernels.why_unavailable(torch.device("cuda", 0), dtype)
    assert (found is None) if reason is None else (reason in found)


@pytest.mark.parametrize(
    ("capability", "dtype", "chosen"),
    [
        ((9, 0), torch.bfloat16, "triton"),
        ((10, 0), torch.float16, "triton"),
        ((8, 0), torch.bfloat16, "eager"),
        ((9, 0), torch.float32, "eager"),
    ],
)
def test_auto_takes_the_symmetric_products_where_they_were_measured(
    monkeypatch, caplog, capability, dtype, chosen
):
    """On an imagined device: the choice, and that it is logged once."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backend_module._auto_backend.cache_clear()
    device = torch.device("cuda", 0)
    with caplog.at_level(logging.INFO, logger="normuon"):
        found = {resolve_backend("auto", device=device, dtype=dtype) for _ in range(3)}
    backend_module._auto_backend.cache_clear()
    assert found == {chosen}
    assert len(caplog.records) == 1


def test_triton_is_refused_by_name_where_it_cannot_run():
    with pytest.raises(ValueError, match="ns_backend='triton': Triton kernels run on CUDA"):
        resolve_backend("triton", device=CPU, dtype=torch.bfloat16)


def test_the_kernels_are_given_our_coefficients_and_restarts(monkeypatch):
    """The package's interface, with our own iteration behind it."""
    made = []

    def gram(ns_coefficients, gram_newton_schulz_reset_iterations, compile_kwargs):
        made.append((gram_newton_schulz_reset_iterations, compile_kwargs))
        return lambda x: gram_newton_schulz(x, tuple(map(tuple, ns_coefficients)))

    def standard(ns_coefficients, compile_kwargs):
        made.append(("plain", compile_kwargs))
        return lambda x: newton_schulz(x, tuple(map(tuple, ns_coefficients)))

    package = SimpleNamespace(GramNewtonSchulz=gram, StandardNewtonSchulz=standard)
    monkeypatch.setitem(sys.modules, kernels.PACKAGE, package)
    monkeypatch.setattr(backend_module, "resolve_backend", lambda *_, **__: "kernels")
    kernels.kernel_orthogonalizer.cache_clear()
    options = {"coefficients": JORDAN, "dtype": torch.bfloat16}
    wide, square = torch.randn(2, 8, 40), torch.randn(2, 8, 8)
    by_kernels = [orthogonalize(x, **options) for x in (wide, square, wide)]
    kernels.kernel_orthogonalizer.cache_clear()
    assert made == [([3], {"fullgraph": True}), ("plain", {"fullgraph": True})]
    monkeypatch.undo()
    for x, o in zip((wide, square, wide), by_kernels, strict=True):
        torch.testing.assert_close(o, orthogonalize(x, **options), rtol=0, atol=0.05)
