"""What statistics say of a step, against the weights before and after it and against SVDs."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from normuon import MatrixView, NorMuon
from normuon.orthogonalize import effective_rank
from normuon.step.figures import DEAD, spread, square_sums

LR = 1e-2
SHAPES = [(24, 10), (10, 24), (12, 12)]


def params_of(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params, step, scale=1.0):
    for number, param in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + number)
        param.grad = scale * torch.randn(param.shape, generator=generator).to(param.dtype)


def stepped(params, optimizer, steps=2, **how):
    """The statistics of the last of some steps, and the weights before it."""
    for step in range(steps):
        set_gradients(params, step, **how)
        before = [param.detach().clone() for param in params]
        if step == steps - 1:
            optimizer.record_statistics()
        optimizer.step()
    return optimizer.statistics(), before


def rms(x):
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adjust_lr_fn": "original", "nesterov": False},
        {"neuron_axis": "short"},
        {"equilibrate": True, "maximize": True},
        {"skip_nonfinite": True},
        {"orthogonalizer": lambda x: x * 3},
        {"ns_dtype": torch.bfloat16},
        {"lr": torch.tensor([LR])},
    ],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.parametrize("algorithm", ["normuon", "muon", "adamw"])
def test_the_update_is_what_the_weights_moved_by(algorithm, options):
    """Weights are near 1 and updates 1e-3 of them, so that float32 hides 1e-4 of an update."""
    params = params_of()
    given = {"lr": LR, "weight_decay": 0.0, **options}
    optimizer = NorMuon([{"params": params, "algorithm": algorithm}], **given)
    statistics, before = stepped(params, optimizer)
    changes = [old - new.detach() for old, new in zip(before, params, strict=True)]
    for figures, change, param in zip(statistics.matrices.values(), changes, params, strict=True):
        assert float(figures["update_rms"]) == pytest.approx(rms(change), rel=2e-4)
        assert float(figures["weight_rms"]) == pytest.approx(rms(param.detach()), rel=1e-6)
        ratio = rms(change) / rms(param.detach())
        assert float(figures["update_to_weight"]) == pytest.approx(ratio, rel=2e-4)
        if algorithm != "adamw":
            norms = change.double().norm(dim=1)
            expected = float(norms.std(correction=0) / norms.mean())
            # Of a spread near 0, float32's rounding of the weights is the larger part.
            assert float(figures["update_row_spread"]) == pytest.approx(
                expected, rel=1e-3, abs=1e-4
            )
    (group,) = statistics.groups.values()
    every = torch.cat([change.flatten() for change in changes])
    assert float(group["update_rms"]) == pytest.approx(rms(every), rel=2e-4)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("orthogonalizer", ["newton_schulz", "gram", lambda x: x])
@pytest.mark.parametrize(("ns_dtype", "rel"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_momentum_figures_are_those_of_its_singular_values_and_rows(
    nesterov, orthogonalizer, ns_dtype, rel
):
    params = params_of([(24, 10), (10, 24), (130, 200)])
    given = {"nesterov": nesterov, "orthogonalizer": orthogonalizer, "ns_dtype": ns_dtype}
    optimizer = NorMuon(params, lr=LR, **given)
    statistics, _ = stepped(params, optimizer)
    for figures, param in zip(statistics.matrices.values(), params, strict=True):
        momentum = optimizer.state[param]["momentum_buffer"].double()
        if nesterov:
            momentum = 0.95 * momentum + 0.05 * param.grad.double()
        values = torch.linalg.svdvals(momentum)
        rank = float(values.square().sum().square() / values.pow(4).sum())
        norms = momentum.norm(dim=1)
        # Of Newton-Schulz's own Gram matrix: in float32 1e-7 an entry, which add up at random.
        assert float(figures["effective_rank"]) == pytest.approx(rank, rel=rel)
        share = rank / min(param.shape)
        assert float(figures["effective_rank_share"]) == pytest.approx(share, rel=rel)
        norm = float(momentum.norm())
        assert float(figures["momentum_norm"]) == pytest.approx(norm, rel=rel / 10)
        expected = float(norms.std(correction=0) / norms.mean())
        assert float(figures["momentum_row_spread"]) == pytest.approx(expected, rel=rel)
        assert float(figures["dead_rows"]) == 0


def test_effective_rank_of_known_spectra():
    """k equal singular values give k; the formula with any others, and zeros none."""
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    for values, expected in {
        (1, 1, 1, 0, 0, 0, 0, 0): 3.0,
        (2, 1, 0, 0, 0, 0, 0, 0): 25 / 17,
        (1, 1e-6, 0, 0, 0, 0, 0, 0): 1.0,
        (0,) * 8: 0.0,
    }.items():
        x = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.mT
        assert float(effective_rank(x @ x.mT)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_momentum_of_any_scale_is_measured(scale):
    """No square under- or overflows, and only the norm depends on the scale."""
    params, reference = params_of(), params_of()
    optimizer, one = (NorMuon(p, lr=LR, ns_dtype=torch.float32) for p in (params, reference))
    figures = stepped(params, optimizer, scale=scale)[0].to_dict()
    expected = stepped(reference, one)[0].to_dict()
    for name, value in figures.items():
        wanted = expected[name] * (scale if name.endswith("momentum_norm") else 1.0)
        # The scale is no power of two, so gradients and all after them round otherwise.
        assert value == pytest.approx(wanted, rel=1e-4), name


def test_rows_without_gradients_are_dead_and_those_that_fade_become_it():
    torch.manual_seed(0)
    (param,) = params_of([(6, 4)])
    optimizer = NorMuon([param], lr=LR, nesterov=False)
    param.grad = torch.randn(6, 4)
    param.grad[2] = 0.0
    optimizer.step()
    fading = math.ceil(math.log(DEAD) / math.log(0.95))
    seen = []
    for _ in range(fading + 1):
        param.grad = torch.randn(6, 4)
        param.grad[2:4] = 0.0
        optimizer.record_statistics()
        optimizer.step()
        seen.append(int(optimizer.statistics().to_dict()["group0.normuon/dead_rows"]))
    assert seen[0] == 1
    assert seen[-1] == 2
    assert seen == sorted(seen)
    # It began shorter than the longest of rows whose momentum adds up.
    assert fading / 2 < seen.index(2) <= fading


def test_a_zero_matrix_has_no_rank_and_no_update():
    (param,) = params_of([(6, 4)])
    optimizer = NorMuon([param], lr=LR)
    param.grad = torch.zeros_like(param)
    optimizer.record_statistics()
    optimizer.step()
    figures = optimizer.statistics().to_dict()
    names = ("update_rms", "momentum_norm", "effective_rank", "momentum_row_spread")
    assert [figures[f"group0.normuon/{name}"] for name in names] == [0.0] * 4


def test_a_diverged_matrix_shows():
    params = params_of()
    optimizer = NorMuon(params, lr=LR)
    set_gradients(params, 0)
    params[1].grad[0, 0] = float("nan")
    optimizer.record_statistics()
    optimizer.step()
    figures = optimizer.statistics().to_dict(per_matrix=True)
    assert math.isnan(figures["group0.normuon/update_rms"])
    assert not math.isnan(figures["group 0 parameter 0/update_rms"])


@pytest.mark.parametrize("algorithm", ["normuon", "adamw"])
def test_what_is_not_stepped_does_not_count(algorithm):
    """A gradient that is missing, and one that is skipped and counted."""
    params = params_of([*SHAPES, (5, 7)])
    group = {"params": params, "algorithm": algorithm}
    optimizer = NorMuon([group], lr=LR, skip_nonfinite=True)
    set_gradients(params, 0)
    params[0].grad = None
    params[1].grad[0, 0] = float("inf")
    optimizer.record_statistics()
    optimizer.step()
    figures = optimizer.statistics().to_dict(per_matrix=True)
    names = {name.split("/")[0] for name in figures if not name.endswith("skipped_steps")}
    assert names == {f"group0.{algorithm}", "group 0 parameter 2", "group 0 parameter 3"}
    assert figures[f"group0.{algorithm}/skipped_steps"] == 1
    assert figures["group 0 parameter 1/skipped_steps"] == 1
    both = torch.cat([param.detach().flatten() for param in params[2:]])
    assert figures[f"group0.{algorithm}/weight_rms"] == pytest.approx(rms(both), rel=1e-6)


def test_matrices_of_a_view_have_their_numbers():
    (experts, fused) = params_of([(3, 6, 4), (12, 5)])
    groups = [
        {"params": [("experts", experts)], "view": MatrixView.experts()},
        {"params": [("qkv", fused)], "view": MatrixView(blocks=(8, 4), heads=(2, 1))},
    ]
    optimizer = NorMuon(groups, lr=LR)
    statistics, _ = stepped([experts, fused], optimizer)
    assert [*statistics.matrices] == [
        *(f"experts[{number}]" for number in range(3)),
        *(f"qkv[{number}]" for number in range(3)),
    ]
    for number in range(3):
        figure = statistics.matrices[f"experts[{number}]"]["weight_rms"]
        assert float(figure) == pytest.approx(rms(experts[number].detach()), rel=1e-6)
    rows = [fused[:4], fused[4:8], fused[8:]]
    for number, part in enumerate(rows):
        figure = statistics.matrices[f"qkv[{number}]"]["weight_rms"]
        assert float(figure) == pytest.approx(rms(part.detach()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    params = params_of(dtype=dtype)
    optimizer = NorMuon(params, lr=LR, kahan_sum=True)
    figures = stepped(params, optimizer)[0].to_dict()
    assert figures["group0.normuon/update_rms"] == pytest.approx(0.2 * LR, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"ns_dtype": torch.bfloat16}])
def test_measuring_changes_no_bit_of_a_step(options):
    def trained(every):
        params = params_of([*SHAPES, (600, 520)])
        groups = [{"params": params[1:], **options}, {"params": params[:1], "algorithm": "adamw"}]
        optimizer = NorMuon(groups, lr=LR)
        optimizer.record_statistics(every)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        return [*params, *(t for p in params for t in optimizer.state[p].values())]

    for plain, measured in zip(trained(0), trained(1), strict=True):
        assert torch.equal(plain, measured)


def test_which_steps_are_measured():
    params = params_of()
    optimizer = NorMuon(params, lr=LR)
    with pytest.raises(RuntimeError, match=r"no step has been measured: call optimizer.record_st"):
        optimizer.statistics()
    measured = []

    def step(times):
        for _ in range(times):
            set_gradients(params, 0)
            optimizer.step()
            measured.append(optimizer.statistics().step)

    optimizer.record_statistics()
    step(2)
    optimizer.record_statistics(every=3)
    step(4)
    optimizer.record_statistics()  # Beside every third.
    step(2)
    optimizer.record_statistics(every=0)
    step(2)
    assert measured == [1, 1, 3, 3, 3, 6, 7, 7, 7, 7]
    for wrong in (-1, 2.5, True, "2"):
        with pytest.raises(ValueError, match=r"must be a whole number of steps: 1 for every step"):
            optimizer.record_statistics(every=wrong)


def test_statistics_are_of_their_own_step_when_others_follow():
    params = params_of()
    optimizer = NorMuon(params, lr=LR)
    optimizer.record_statistics(every=1)
    first, _ = stepped(params, optimizer, steps=1)
    before = first.to_dict()
    stepped(params, optimizer, scale=3.0)
    assert first.to_dict() == before
    assert optimizer.statistics().to_dict() != before


def test_added_and_loaded_parameters_are_measured():
    params = params_of()
    optimizer = NorMuon(params[:1], lr=LR)
    optimizer.record_statistics(every=1)
    stepped(params, optimizer)
    optimizer.add_param_group({"params": params[1:]})
    statistics, _ = stepped(params, optimizer)
    assert len(statistics.matrices) == len(params)
    optimizer.load_state_dict(optimizer.state_dict())
    statistics, _ = stepped(params, optimizer)
    assert len(statistics.matrices) == len(params)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
)
def test_a_copied_optimizer_measures_its_own_steps(copied):
    params = params_of()
    optimizer = NorMuon(params, lr=LR)
    optimizer.record_statistics(every=1)
    stepped(params, optimizer)
    other = copied(optimizer)
    with pytest.raises(RuntimeError, match="no step has been measured"):
        other.statistics()
    statistics, _ = stepped(other.param_groups[0]["params"], other)
    assert statistics.step == 2


def test_sums_of_squares_agree_with_float64():
    tensors = [torch.randn(5, 300), torch.randn(40), torch.randn(()), torch.randn(3, 4, 5, 6)]
    tensors += [torch.randn(30, 50)[:, 5:9], torch.empty(0, 4)]
    sums = square_sums(tensors, torch.float64)
    for found, tensor in zip(sums, tensors, strict=True):
        assert float(found) == pytest.approx(float(tensor.double().square().sum()), rel=1e-6)


def test_spread_is_of_each_row_alone():
    norms = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 0.0]])
    assert spread(norms).tolist() == [0.5, 0.0, 0.0]


def test_a_compiled_step_is_measured():
    params, others = params_of(), params_of()
    compiled, eager = NorMuon(params, lr=torch.tensor(LR)), NorMuon(others, lr=torch.tensor(LR))
    step = torch.compile(compiled.step, backend="eager")
    compiled.record_statistics(every=1)
    eager.record_statistics(every=1)
    for number in range(3):
        set_gradients(params, number)
        set_gradients(others, number)
        step()
        eager.step()
    expected = eager.statistics().to_dict()
    assert compiled.statistics().to_dict() == pytest.approx(expected, rel=1e-5)


def test_a_group_that_has_had_no_gradient_yet_is_there():
    """As on ranks that share parameters, where its rows are summed with the others."""
    params = [nn.Parameter(torch.eye(4)) for _ in range(2)]
    optimizer = NorMuon([{"params": [("first", params[0])]}, {"params": [("second", params[1])]}])
    optimizer.record_statistics()
    params[0].grad = torch.eye(4)
    optimizer.step()
    figures = optimizer.statistics().to_dict(per_matrix=True)
    idle = {key: value for key, value in figures.items() if key.startswith(("group1", "second"))}
    assert idle == {"group1.normuon/skipped_steps": 0.0, "second/skipped_steps": 0.0}


def test_short_axis_of_float64_in_a_narrower_newton_schulz_is_measured():
    """Its factors are float64 and O is bfloat16: their product is wider than O."""
    param = nn.Parameter(torch.zeros(3, 8, dtype=torch.float64))
    optimizer = NorMuon(
        [param], lr=0.1, weight_decay=0.0, neuron_axis="short", ns_dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    param.grad = torch.randn(3, 8, dtype=torch.float64)
    optimizer.record_statistics()
    optimizer.step()
    measured = optimizer.statistics().to_dict()["group0.normuon/update_rms"]
    # Sums of 24 squares in float64 of the very numbers that are subtracted.
    assert measured == pytest.approx(float(param.detach().square().mean().sqrt()), rel=1e-6)
