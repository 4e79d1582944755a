"""Diagnostics: true numbers, the same on any number of ranks, and a trajectory left alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.optim import Optimizer

from normuon import MatrixView, NorMuon, param_groups
from normuon_lab.train.arms.options import ArmOptions
from normuon_lab.train.arms.registry import PRETRAINING_ARMS
from normuon_lab.train.matrix_figures import MAX_CONDITION_NUMBER, matrix_figures
from normuon_lab.train.pretrain.diagnostics import MatrixDiagnostics
from tests.distributed.ranks import Ranks
from tests.spectra import spectrum_zoo

LR = 0.005
FIGURES = ("condition", "effective_rank", "row_norm_cv")


def expected_figures(x: Tensor) -> dict[str, float]:
    """By the definitions, from singular values."""
    x = x.double()
    values = torch.linalg.svdvals(x)
    shares = values.square() / values.square().sum()
    shares = shares[shares > 0]
    norms = x.norm(dim=1)
    return {
        "condition": float(values[0] / values[-1]),
        "effective_rank": math.exp(-float((shares * shares.log()).sum())),
        "row_norm_cv": float(norms.std(correction=0) / norms.mean()),
    }


@pytest.mark.parametrize("name", sorted(spectrum_zoo().keys() - {"zero", "rank_deficient"}))
def test_figures_are_those_of_the_definitions(name: str) -> None:
    x = spectrum_zoo()[name]
    figures = matrix_figures(x[None])
    assert figures is not None
    # Scaled by hand: singular values do not mind 1e-30, their squares do.
    for figure, value in expected_figures(x / x.abs().max()).items():
        # The Gram matrix squares the condition number, here below 1e4: 1e8 * 2^-53 = 1e-8.
        assert getattr(figures, figure) == pytest.approx(value, rel=1e-7, abs=1e-12), figure


def test_figures_of_known_matrices() -> None:
    orthogonal = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    figures = matrix_figures(orthogonal[None, :4])
    assert figures is not None
    assert figures.condition == pytest.approx(1.0, rel=1e-12)
    assert figures.effective_rank == pytest.approx(4.0, rel=1e-12)
    assert figures.row_norm_cv == pytest.approx(0.0, abs=1e-12)
    rank_one = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.ones(5))
    figures = matrix_figures(rank_one[None])
    assert figures is not None
    assert figures.condition == pytest.approx(MAX_CONDITION_NUMBER)
    assert figures.effective_rank == pytest.approx(1.0, abs=1e-9)
    assert figures.row_norm_cv == pytest.approx(math.sqrt(2 / 3) / 2)


def test_zero_and_broken_matrices_have_no_figures() -> None:
    assert matrix_figures(torch.zeros(2, 3, 4)) is None
    assert matrix_figures(torch.full((1, 3, 4), torch.nan)) is None
    mixed = torch.stack([torch.zeros(3, 3), torch.eye(3), torch.full((3, 3), torch.inf)])
    figures = matrix_figures(mixed)
    assert figures is not None
    assert figures.effective_rank == pytest.approx(3.0)


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Embedding(11, 8),
        nn.Linear(8, 12, bias=False),
        nn.Tanh(),
        nn.Linear(12, 6),
        nn.Tanh(),
        nn.Linear(6, 10),
    )


def take_gradient(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(11, (16,), generator=generator)
    model(tokens).square().sum().backward()


def train(
    model: nn.Module, optimizers: list[Optimizer], *, steps: int, every: int | None, **options: Any
) -> tuple[list[dict[str, float] | None], MatrixDiagnostics | None]:
    diagnostics = MatrixDiagnostics(model, optimizers[0], every=every, **options) if every else None
    found = []
    for step in range(steps):
        take_gradient(model, step)
        if diagnostics:
            diagnostics.before_step(step)
        for optimizer in optimizers:
            optimizer.step()
        found.append(diagnostics.after_step(step) if diagnostics else None)
        for optimizer in optimizers:
            optimizer.zero_grad()
    return found, diagnostics


@pytest.mark.parametrize("arm", PRETRAINING_ARMS)
def test_the_trajectory_is_untouched_bit_by_bit(arm: str) -> None:
    weights = []
    for every in (None, 1):
        model = make_model()
        train(model, PRETRAINING_ARMS[arm].build(model, LR), steps=5, every=every)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    state = torch.get_rng_state()
    train(model, PRETRAINING_ARMS[arm].build(model, LR), steps=2, every=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arm", [*PRETRAINING_ARMS, "normuon in 8 bits"])
def test_momentum_and_update_are_what_the_optimizer_has_and_does(arm: str) -> None:
    model = make_model()
    options = ArmOptions(normuon=(("momentum_dtype", "int8"),) if "bits" in arm else ())
    optimizers = PRETRAINING_ARMS[arm.partition(" ")[0]].build(model, LR, options)
    train(model, optimizers, steps=3, every=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    diagnostics = MatrixDiagnostics(model, optimizers[0], every=4)
    take_gradient(model, 3)
    diagnostics.before_step(3)
    optimizers[0].step()
    found = diagnostics.after_step(3)
    assert found is not None
    names = [n for n, p in model.named_parameters() if n in ("1.weight", "3.weight")]
    decay = optimizers[0].param_groups[0]["weight_decay"]
    for name in names:
        param = dict(model.named_parameters())[name]
        update = before[name].double() * (1 - LR * decay) - param.detach().double()
        state = optimizers[0].state[param]
        if "bits" in arm:
            # These matrices have one block a row.
            assert state["momentum_absmax"].shape[1] == 1
            momentum = state["momentum_codes"] * (state["momentum_absmax"] / 127)
        else:
            momentum = state["exp_avg" if arm == "adamw" else "momentum_buffer"]
        for kind, x in (("momentum", momentum), ("update", update)):
            for figure, value in expected_figures(x).items():
                # The update is kept in float32, to 6e-8 of its entries; the smallest singular
                # value carries that error times the condition number, here below 300.
                assert found[f"diagnostics/{name}/{kind}_{figure}"] == pytest.approx(
                    value, rel=1e-4, abs=1e-6
                )
        ratio = float(update.norm() / param.detach().norm())
        assert found[f"diagnostics/{name}/update_to_weight_rms"] == pytest.approx(ratio, rel=1e-5)
    assert {name.split("/")[1] for name in found} >= set(names)
    assert not any("0.weight" in name or "bias" in name for name in found)
    assert diagnostics.last_seconds > 0


def test_normuon_evens_out_its_rows() -> None:
    model = make_model()
    found, _ = train(model, PRETRAINING_ARMS["normuon"].build(model, LR), steps=4, every=1)
    last = found[-1]
    assert last is not None
    assert (
        last["diagnostics/1.weight/update_row_norm_cv"]
        < 0.5 * (last["diagnostics/1.weight/momentum_row_norm_cv"])
    )


def test_it_measures_every_nth_step_only() -> None:
    model = make_model()
    found, _ = train(model, PRETRAINING_ARMS["normuon"].build(model, LR), steps=7, every=3)
    assert [figures is not None for figures in found] == [False, False, True] * 2 + [False]


def test_blocks_of_a_fused_parameter_are_measured_apart() -> None:
    model = nn.Linear(4, 9, bias=False)
    groups = param_groups(model, overrides={"weight": MatrixView.fused(6, 3)})
    optimizer = NorMuon(groups, lr=LR)
    diagnostics = MatrixDiagnostics(model, optimizer, every=1)
    model(torch.randn(5, 4)).square().sum().backward()
    diagnostics.before_step(0)
    optimizer.step()
    found = diagnostics.after_step(0)
    assert found is not None
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    for block, rows in enumerate((slice(0, 6), slice(6, 9))):
        value = expected_figures(momentum[rows])["effective_rank"]
        name = f"diagnostics/weight[{block}]/momentum_effective_rank"
        assert found[name] == pytest.approx(value, rel=1e-6)


def test_a_bound_on_the_cost_measures_matrices_in_turn() -> None:
    model = make_model()
    found, diagnostics = train(
        model, PRETRAINING_ARMS["normuon"].build(model, LR), steps=5, every=1, max_flops=1.0
    )
    assert diagnostics is not None
    assert [len(one) for one in diagnostics.rounds] == [1] * len(diagnostics.rounds)
    measured = [{name.split("/")[1] for name in figures or ()} for figures in found]
    names = [matrix.name for one in diagnostics.rounds for matrix in one]
    assert names[:2] == ["1.weight", "3.weight"]
    assert measured == [{names[i % len(names)]} for i in range(5)]


def test_a_step_without_update_has_no_figures_of_it() -> None:
    model = make_model()
    optimizer = NorMuon(param_groups(model), lr=0.0)
    found, _ = train(model, [optimizer], steps=1, every=1)
    assert found[0] is not None
    assert found[0]["diagnostics/1.weight/update_to_weight_rms"] == 0.0
    assert "diagnostics/1.weight/momentum_condition" in found[0]
    assert "diagnostics/1.weight/update_condition" not in found[0]


def measured_on_ranks(
    rank: int, world_size: int, *, arm: str, mesh_shape: tuple[int, ...], names: tuple[str, ...]
) -> tuple[list[dict[str, float] | None], list[list[int]]]:
    model = make_model()
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    if "tp" in names:
        plan = {"1": ColwiseParallel(), "3": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        mesh = mesh["shard"]
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = PRETRAINING_ARMS[arm].build(model, LR)
    found, diagnostics = train(model, optimizers, steps=3, every=1)
    assert diagnostics is not None
    return found, [[matrix.owner for matrix in one] for one in diagnostics.rounds]


@pytest.mark.parametrize(
    ("arm", "mesh_shape", "names"),
    [
        ("normuon", (2,), ("shard",)),
        ("adamw", (2,), ("shard",)),
        ("normuon", (2, 2), ("replicate", "shard")),
        ("normuon", (2, 2), ("shard", "tp")),
    ],
)
def test_ranks_share_the_work_and_find_the_same(
    ranks: Ranks, arm: str, mesh_shape: tuple[int, ...], names: tuple[str, ...]
) -> None:
    world_size = math.prod(mesh_shape)
    results = ranks.run(measured_on_ranks, world_size, arm=arm, mesh_shape=mesh_shape, names=names)
    model = make_model()
    alone, _ = train(model, PRETRAINING_ARMS[arm].build(model, LR), steps=3, every=1)
    for found, owners in results:
        assert found == results[0][0]
        assert len(set(owners[0])) == min(len(owners[0]), world_size)
        for figures, expected in zip(found, alone, strict=True):
            assert figures is not None
            assert expected is not None
            assert figures.keys() == expected.keys()
            for name, value in expected.items():
                # Gradients are averaged over ranks that saw the same: equal up to a rounding of
                # float32, which the condition number multiplies. NorMuon's rows have equal norms,
                # so that their spread is nothing but the rounding of float32 weights, some 1e-6.
                rounding = 1e-5 if name.endswith("update_row_norm_cv") else 1e-6
                assert figures[name] == pytest.approx(value, rel=1e-3, abs=rounding), name
