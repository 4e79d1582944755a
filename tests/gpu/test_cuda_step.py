"""What only a CUDA device can show: no host sync, capture into a graph, the installed kernels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import normuon
from normuon.orthogonalize import METHODS, newton_schulz, orthogonalize, resolve_coefficients
from normuon.orthogonalize.kernels import why_unavailable
from normuon_lab.bench.accuracy import hard_spectra
from tests.gpu.conftest import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

JORDAN = resolve_coefficients("jordan", 5)


def tiny_model() -> torch.nn.Sequential:
    """Wide, tall and square matrices, two equal ones, and what AdamW takes, on the device."""
    torch.manual_seed(0)
    shapes = [(32, 64), (64, 64), (64, 64), (64, 16)]
    layers = [torch.nn.Linear(n, m) for n, m in shapes]
    return torch.nn.Sequential(*layers, torch.nn.LayerNorm(16)).cuda()


def with_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    for param in model.parameters():
        grad = torch.randn(param.shape, device="cuda", generator=generator)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ns_dtype": torch.float32},
        {"ns_dtype": torch.float16},
        {"skip_nonfinite": True},
        {"cautious_weight_decay": True, "equilibrate": True},
        {"nesterov": False, "adjust_lr_fn": "original", "neuron_axis": "short"},
    ],
    ids=str,
)
def test_a_step_never_waits_for_the_device(options):
    model = tiny_model()
    optimizer = normuon.NorMuon(
        normuon.param_groups(model), lr=torch.tensor(1e-3, device="cuda"), **options
    )
    with_gradients(model, 0)
    optimizer.step()  # The first step makes what is made once.
    with_gradients(model, 1)
    with no_waiting():
        optimizer.step()


def test_a_captured_step_replays_as_the_eager_one():
    """With lr as a tensor that is changed between replays, as a schedule does."""
    eager, captured = tiny_model(), tiny_model()
    rates = [torch.tensor(1e-3, device="cuda") for _ in range(2)]
    # The package's kernels compile at first use; the graph is about the library's own step.
    pair = [
        normuon.NorMuon(normuon.param_groups(model), lr=rate, ns_backend="eager")
        for model, rate in zip((eager, captured), rates, strict=True)
    ]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for seed in range(3):
            for model, optimizer in zip((eager, captured), pair, strict=True):
                with_gradients(model, seed)
                optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    saved = [param.detach().clone() for param in captured.parameters()]
    state = {
        key: {name: value.clone() for name, value in entries.items()}
        for key, entries in pair[1].state.items()
    }
    with torch.cuda.graph(graph):
        pair[1].step()
    with torch.no_grad():
        for param, value in zip(captured.parameters(), saved, strict=True):
            param.copy_(value)
        for key, entries in pair[1].state.items():
            for name, value in entries.items():
                value.copy_(state[key][name])
    for seed in range(3, 6):
        for rate in rates:
            rate.fill_(1e-3 / seed)
        with_gradients(eager, seed)
        pair[0].step()
        with_gradients(captured, seed)
        graph.replay()
    for expected, actual in zip(eager.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_page_about_cuda_graphs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "cuda-graphs.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    names = {}
    exec(code, names)
    assert names["step"] == names["graph"].replay
    assert re.fullmatch(r"loss 0\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_spectrum_survives_on_the_device(method, dtype):
    for name, x in hard_spectra(96, 288).items():
        rounded = x.to(dtype)
        exact = newton_schulz(rounded.double()[None], JORDAN)[0]
        o = orthogonalize(
            rounded[None].cuda(), coefficients=JORDAN, dtype=dtype, orthogonalizer=method
        )[0]
        largest = float(torch.linalg.matrix_norm(o.double(), 2))
        assert largest <= 1.3, name
        error = float(torch.linalg.norm(o.double().cpu() - exact) / torch.linalg.norm(exact))
        assert error <= 50 * torch.finfo(dtype).eps ** 0.75, name


@pytest.mark.parametrize("shape", [(512, 512), (512, 2048), (2048, 512)])
def test_the_kernels_compute_the_same_polynomial(shape):
    device = torch.device("cuda")
    reason = why_unavailable(device, torch.bfloat16)
    if reason is not None:
        pytest.skip(f"gram-newton-schulz's kernels: {reason}")
    x = torch.randn(2, *shape, device=device)
    options = {"coefficients": JORDAN, "dtype": torch.bfloat16}
    by_kernels = orthogonalize(x, backend="kernels", **options)
    exact = newton_schulz((x / torch.linalg.norm(x, dim=(-2, -1), keepdim=True)).double(), JORDAN)
    relative = torch.linalg.norm(by_kernels.double() - exact) / torch.linalg.norm(exact)
    assert float(relative) <= 0.05


def test_the_device_gives_the_hosts_step():
    """float32 on both: the update agrees to the devices' different order of sums."""
    host, device = tiny_model().cpu(), tiny_model()
    for model in (host, device):
        optimizer = normuon.NorMuon(
            normuon.param_groups(model), lr=1e-3, ns_dtype=torch.float32, ns_backend="eager"
        )
        for seed in range(3):
            with_gradients(device, seed)
            for param, twin in zip(model.parameters(), device.parameters(), strict=True):
                param.grad = twin.grad.to(param.device)
            optimizer.step()
    for expected, actual in zip(host.parameters(), device.parameters(), strict=True):
        # Three steps of RMS 2e-4; TF32 is off by default.
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-6)
