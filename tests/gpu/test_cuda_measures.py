"""8-bit momentum, statistics and QK-clip on a CUDA device: as on the host, with no early read."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from normuon import MatrixView, NorMuon
from normuon.integrations.qk_clip import QKClip
from normuon.momentum_forms import whole_momentum
from tests.gpu.conftest import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(64, 300), (64, 300), (300, 64), (96, 96), (3, 48, 64), (64,)]
STEPS = 4


def params_and_optimizer(device, **options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    groups = [
        {"params": params[:4]},
        {"params": params[4:5], "view": MatrixView.experts()},
        {"params": params[5:], "algorithm": "adamw"},
    ]
    options = {"ns_dtype": torch.float32, "ns_backend": "eager", **options}
    return params, NorMuon(groups, lr=1e-3, **options)


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(1 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device)


def trained(device, *, every=0, **options):
    params, optimizer = params_and_optimizer(device, **options)
    optimizer.record_statistics(every)
    for step in range(STEPS):
        set_gradients(params, step)
        optimizer.step()
    return params, optimizer


def errors_of_8_bits(device, **options):
    """Norms of what 8-bit momentum changes: of the momentum, and of the weights' way, relative."""
    start = params_and_optimizer("cpu")[0]
    exact, in_float32 = trained(device, **options)
    coded, in_8_bits = trained(device, momentum_dtype=torch.int8, **options)
    found = []
    for before, one, other in zip(start[:-1], exact[:-1], coded[:-1], strict=True):
        view = MatrixView.experts() if one.ndim == 3 else None
        assert any(value.dtype == torch.int8 for value in in_8_bits.state[other].values())
        momentum = whole_momentum(in_float32.state[one], one, view)
        off = whole_momentum(in_8_bits.state[other], other, view) - momentum
        way = one.detach() - before.to(device).detach()
        found.append(
            [float(off.norm() / momentum.norm()), float((other - one).detach().norm() / way.norm())]
        )
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_8_bit_momentum_errs_as_on_the_host(fused):
    """Codes are rounded by a hash of a value's bits, so no code is equal where last bits are not.

    Each is one sample of an error that is averaged over thousands of entries.
    """
    there = errors_of_8_bits("cuda", fused=fused)
    for mine, theirs in zip(there, errors_of_8_bits("cpu"), strict=True):
        assert mine == pytest.approx(theirs, rel=0.25)
        assert mine[0] < 0.02


@pytest.mark.parametrize("fused", [False, True])
def test_statistics_are_the_hosts(fused):
    figures, expected = (
        trained(device, every=1, **options)[1].statistics().to_dict(per_matrix=True)
        for device, options in (("cuda", {"fused": fused}), ("cpu", {}))
    )
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-3, abs=1e-7), name


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}], ids=str)
def test_measuring_changes_no_bit_of_a_step(options):
    plain, measured = (trained("cuda", every=every, **options)[0] for every in (0, 1))
    assert all(map(torch.equal, plain, measured))


@pytest.mark.parametrize(
    "options",
    [{"momentum_dtype": torch.int8}, {"momentum_dtype": torch.int8, "skip_nonfinite": True}, {}],
    ids=str,
)
def test_neither_waits_for_the_device(options):
    params, optimizer = params_and_optimizer("cuda", **options)
    optimizer.record_statistics(1)
    set_gradients(params, 0)
    optimizer.step()
    set_gradients(params, 1)
    with no_waiting():
        optimizer.step()
        optimizer.statistics()


def test_a_captured_step_with_8_bit_momentum_replays_as_the_eager_one():
    options = {"momentum_dtype": torch.int8}
    (eager, plain), (captured, recorded) = (
        params_and_optimizer("cuda", **options) for _ in range(2)
    )
    held = [torch.empty_like(param) for param in captured]

    def take(step):
        set_gradients(eager, step)
        plain.step()
        for param, grad, source in zip(captured, held, eager, strict=True):
            param.grad = grad.copy_(source.grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            take(step)
            recorded.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    take(3)
    with torch.cuda.graph(graph):
        recorded.step()
    graph.replay()
    for step in range(4, 6):
        take(step)
        graph.replay()
    for expected, actual in zip(eager, captured, strict=True):
        torch.testing.assert_close(actual, expected)
        for name, value in plain.state[expected].items():
            one_code = 1 if value.dtype == torch.int8 else 0
            torch.testing.assert_close(
                recorded.state[actual][name].float(), value.float(), rtol=1e-5, atol=one_code + 1e-6
            )


def test_qk_clip_scales_as_on_the_host():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    models = [transformers.LlamaForCausalLM(config).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].cuda()
    tokens = torch.arange(32)[None] % 64
    clips = [QKClip(model, tau=1e-3) for model in models]
    for _ in range(2):
        for model in models:
            with torch.no_grad():
                model(input_ids=tokens.to(model.device))
        clips[0].step()
        # The first step sends the device where heads lie, once.
        with no_waiting() if clips[1].max_logits else nullcontext():
            clips[1].step()
        host, device = (clip.max_logits for clip in clips)
        assert host.keys() == device.keys()
        for name, logits in host.items():
            torch.testing.assert_close(device[name].cpu(), logits, rtol=1e-4, atol=1e-6)
    for expected, actual in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-6)
