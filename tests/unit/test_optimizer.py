"""NorMuon as a whole on one device: state, batching, scratch, groups, and what it never does."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from normuon import MatrixView, NorMuon
from normuon.state import follow_param_
from normuon.step.order import scratch_bytes

FLOAT32 = {"ns_dtype": torch.float32}


def with_grads(*shapes: tuple[int, ...], scale: float = 1.0) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape) * scale
    return params


def stepped(params: list[nn.Parameter], grads: list[list[Tensor]], **options) -> list[Tensor]:
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer = NorMuon(copies, lr=1e-2, **{**FLOAT32, **options})
    for step in grads:
        for param, grad in zip(copies, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [param.detach() for param in copies]


@pytest.mark.parametrize(
    ("algorithm", "per_matrix"),
    [("normuon", lambda m, n: m * (n + 1)), ("muon", lambda m, n: m * n)],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_state_is_exactly_m_n_plus_one_elements(algorithm, per_matrix, steps):
    """Counted from the live state, before and after steps: m(n+1) for NorMuon, mn for Muon."""
    views = [
        (MatrixView.linear(), (7, 5), 7, 5, 1),
        (MatrixView.transposed(), (5, 7), 7, 5, 1),
        (MatrixView.conv(), (8, 3, 5, 5), 8, 75, 1),
        (MatrixView.experts(), (4, 6, 9), 6, 9, 4),
        (MatrixView(heads=3), (12, 5), 4, 5, 3),
    ]
    groups = []
    for view, shape, *_ in views:
        param = nn.Parameter(torch.randn(shape))
        param.grad = torch.randn(shape)
        groups.append({"params": [param], "view": view, "algorithm": algorithm})
    optimizer = NorMuon(groups)
    for _ in range(steps):
        optimizer.step()
    for group, (_, _, m, n, matrices) in zip(optimizer.param_groups, views, strict=True):
        state = optimizer.state[group["params"][0]]
        assert sum(value.numel() for value in state.values()) == matrices * per_matrix(m, n)


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original", "spectral_unclamped"])
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_the_gradients_scale_changes_no_step(scale, adjust_lr_fn):
    """No additive epsilon in Newton-Schulz: 1e-20 and 1e+15 give the step of 1, to rounding."""
    params = with_grads((6, 9), (9, 6), (1, 5))
    grads = [[torch.randn(p.shape) for p in params] for _ in range(5)]
    scaled = [[g * scale for g in step] for step in grads]
    plain = stepped(params, grads, adjust_lr_fn=adjust_lr_fn)
    for actual, expected in zip(
        stepped(params, scaled, adjust_lr_fn=adjust_lr_fn), plain, strict=True
    ):
        # Rounding of the scaled gradients, 2^-24, through Newton-Schulz's gain of ~500.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lr", [1e-4, 3e-2])
def test_the_rms_of_a_step_is_a_fifth_of_the_learning_rate(lr):
    param = nn.Parameter(torch.randn(48, 16, dtype=torch.float64))
    param.grad = torch.randn(48, 16, dtype=torch.float64)
    before = param.detach().clone()
    NorMuon([param], lr=lr, weight_decay=0.0).step()
    rms = (param.detach() - before).square().mean().sqrt().item()
    assert rms == pytest.approx(0.2 * lr, rel=1e-9)


def test_equal_matrices_share_a_batch_and_get_the_step_they_would_get_alone():
    """Stacked or one by one, with any scratch bound: the same weights bit by bit."""
    params = with_grads((8, 8), (8, 8), (8, 12), (8, 8), (12, 8))
    grads = [[torch.randn(p.shape) for p in params] for _ in range(4)]
    together = stepped(params, grads)
    for bound in (1, 2 * scratch_bytes(8, 8, ns_dtype=torch.float32, param_dtype=torch.float32)):
        for a, b in zip(stepped(params, grads, max_scratch_bytes=bound), together, strict=True):
            assert torch.equal(a, b)
    for index, param in enumerate(params):
        (alone,) = stepped([param], [[step[index]] for step in grads])
        assert torch.equal(alone, together[index])


def test_experts_are_split_over_batches_when_scratch_is_short():
    experts = nn.Parameter(torch.randn(7, 6, 9))
    results = []
    for bound in (1, 4000, 2**28):
        param = nn.Parameter(experts.detach().clone())
        group = {"params": [param], "view": MatrixView.experts()}
        optimizer = NorMuon([group], max_scratch_bytes=bound, **FLOAT32)
        for seed in range(3):
            param.grad = torch.randn(7, 6, 9, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


class PeakMemory(TorchDispatchMode):
    """The most bytes of new storage alive at once while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {
            x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)
        }
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize("ns_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
@pytest.mark.parametrize("matrices_allowed", [1, 3])
def test_scratch_stays_within_its_bound(shape, ns_dtype, matrices_allowed):
    """Ten equal matrices never need more temporary memory than `max_scratch_bytes` allows."""
    params = with_grads(*[shape] * 10)
    needed = scratch_bytes(*shape, ns_dtype=ns_dtype, param_dtype=torch.float32)
    bound = matrices_allowed * needed
    optimizer = NorMuon(params, ns_dtype=ns_dtype, max_scratch_bytes=bound)
    with PeakMemory() as memory:
        optimizer.step()
    assert 0 < memory.peak <= bound + 64 * max(shape) * matrices_allowed  # per-neuron vectors


def test_gradients_are_never_written_to():
    for options in (
        {},
        {"nesterov": False},
        {"maximize": True},
        {"skip_nonfinite": True},
        {"momentum_dtype": torch.bfloat16},
        {"momentum": 0.0},
    ):
        params = with_grads((6, 9), (5, 5))
        before = [p.grad.clone() for p in params]
        versions = [p.grad._version for p in params]
        optimizer = NorMuon(params, **options)
        optimizer.step()
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
        assert [p.grad._version for p in params] == versions


def test_a_missing_gradient_leaves_parameter_and_state_alone():
    moved, still = with_grads((4, 4), (4, 4))
    still.grad = None
    before = still.detach().clone()
    optimizer = NorMuon([moved, still])
    optimizer.step()
    assert torch.equal(still, before)
    assert not any(value.any() for value in optimizer.state[still].values())
    assert optimizer.state[moved]["momentum_buffer"].any()


def test_options_are_read_at_every_step():
    """A schedule on any option works: what the group says now is what the step does."""
    params = with_grads((6, 4))
    optimizer = NorMuon(params, lr=1e-2, weight_decay=0.0, **FLOAT32)
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()
    assert torch.equal(params[0], before)
    optimizer.param_groups[0].update(lr=0.5, weight_decay=1.0, momentum=0.0, beta2=0.0)
    params[0].grad.zero_()
    optimizer.step()
    assert torch.equal(params[0], before * 0.5)


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_state_dtypes(param_dtype, momentum_dtype):
    param = nn.Parameter(torch.randn(4, 6).to(param_dtype))
    param.grad = torch.randn(4, 6).to(param_dtype)
    optimizer = NorMuon([param], momentum_dtype=momentum_dtype)
    optimizer.step()
    state = optimizer.state[param]
    assert state["momentum_buffer"].dtype == (momentum_dtype or param_dtype)
    wide = torch.float64 if param_dtype == torch.float64 else torch.float32
    assert state["second_momentum_buffer"].dtype == wide
    assert param.dtype == param_dtype
    assert param.isfinite().all()


def test_bfloat16_parameters_follow_their_float32_twins():
    """Steps are computed in float32 and rounded once: the paths stay within bfloat16's spacing."""
    start = torch.randn(32, 48)
    grads = [torch.randn(32, 48).bfloat16() for _ in range(10)]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        param = nn.Parameter(start.to(torch.bfloat16).to(dtype))
        optimizer = NorMuon([param], lr=1e-2, momentum_dtype=torch.float32, **FLOAT32)
        for grad in grads:
            param.grad = grad.to(dtype)
            optimizer.step()
        results.append(param.detach().float())
    # Ten roundings to 8 bits of values up to ~4: each at most 2^-7, and they do not all agree.
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=10 * 2**-7)


def test_bfloat16_weights_are_rounded_once_a_step():
    """Decay and step are added in float32: one by one bfloat16 would round both away."""
    param = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    param.grad = torch.ones(1, 1, dtype=torch.bfloat16)
    # A step of 0.2 lr = 0.0015 and a decay of lr wd = 0.0015; half of the spacing is 0.00195.
    NorMuon([param], lr=0.0075, weight_decay=0.2).step()
    assert param.item() == 1 - 2**-8


def test_state_follows_a_parameter_that_is_moved():
    """A model moved after the optimizer was built trains on, as it does with torch's own."""
    (param,) = with_grads((4, 6))
    optimizer = NorMuon([param])
    state = dict(optimizer.state[param])
    follow_param_(state, torch.empty(4, 6, device="meta"), optimizer.param_groups[0])
    assert {value.device.type for value in state.values()} == {"meta"}


def test_empty_parameters_are_left_alone():
    empty = nn.Parameter(torch.zeros(0, 5))
    empty.grad = torch.zeros(0, 5)
    (other,) = with_grads((3, 3))
    before = other.detach().clone()
    NorMuon([empty, other]).step()
    assert empty.shape == (0, 5)
    assert not torch.equal(other, before)


class NoHostSync(TorchDispatchMode):
    """Raises on whatever would make the host wait for the device: .item(), bool(), nonzero()."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip_nonfinite": True},
        {"adjust_lr_fn": "original", "cautious_weight_decay": True, "neuron_axis": "short"},
        {"lr": torch.tensor(1e-3), "equilibrate": True},
        {"maximize": True, "momentum_dtype": torch.bfloat16},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_a_step_never_waits_for_the_device(options):
    matrices, (bias,) = with_grads((6, 4), (4, 6)), with_grads((5,))
    adamw = {"params": [bias], "algorithm": "adamw", "weight_decay": 0.0}
    muon = {"params": with_grads((6, 4)), "algorithm": "muon"}
    optimizer = NorMuon([{"params": matrices}, muon, adamw], **options)
    optimizer.step()
    before = [param.detach().clone() for param in matrices]
    with NoHostSync():
        optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(matrices, before, strict=True))


def test_waiting_for_the_device_would_be_noticed():
    """The check above can fail: reading a value inside the mode is an error."""
    with NoHostSync(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(1).item()


def test_zero_gradients_stop_a_step_in_the_end():
    """A momentum decays to denormal numbers, where 5% less is the same number: it would go on."""
    torch.manual_seed(0)
    (param,) = with_grads((8, 8))
    optimizer = NorMuon([param], lr=1e-3, weight_decay=0.0)
    optimizer.step()
    momentum = optimizer.state[param]["momentum_buffer"]
    momentum.mul_(1e-38 / momentum.abs().amax())
    param.grad = torch.zeros_like(param)
    for _ in range(20):
        optimizer.step()
    before = param.detach().clone()
    optimizer.step()
    assert momentum.count_nonzero() > 0
    assert torch.equal(param, before)
