"""A team that divides a matrix finds what one rank finds, by products that are counted."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from normuon import NorMuon
from normuon.distributed.slabs import Slab, Team, even_cuts, strip_elements, strips_of
from normuon.options import MatrixOptions
from normuon.orthogonalize import Workspace
from normuon.step.matrix_tasks import split_of
from normuon.step.normalizer import DividedNormalizer
from normuon.step.order import orthogonalize_
from normuon.step.slabs import Member, update_slab

SHAPES = [(64, 24), (24, 64), (40, 40), (13, 7), (7, 13), (3, 50)]
TEAMS = [Team(2, True), Team(3, True), Team(8, True), Team(2, False), Team(5, False)]


def options_of_group(**options):
    group = {"params": [torch.nn.Parameter(torch.zeros(2, 2))], **options}
    return NorMuon([group]).param_groups[0]


def swap_all(swaps):
    """Delivers what members send one another; returns the bytes that each has sent."""
    sent = [0] * len(swaps)
    for sender, swap in enumerate(swaps):
        for receiver, tensors in enumerate(swap.send):
            places = swaps[receiver].receive[sender]
            assert [t.shape for t in tensors] == [t.shape for t in places]
            for tensor, place in zip(tensors, places, strict=True):
                place.copy_(tensor.clone())
                sent[sender] += tensor.numel() * tensor.element_size()
    return sent


def run(programs):
    """Runs the members' programs side by side; their results, and bytes sent by swap and member."""
    results, sent = [None] * len(programs), []
    while True:
        swaps = []
        for number, program in enumerate(programs):
            try:
                swaps.append(next(program))
            except StopIteration as end:
                results[number] = end.value
        if not swaps:
            return results, sent
        assert len(swaps) == len(programs), "all yield equally often"
        sent.append(swap_all(swaps))


def divided(x, v, team, group, dtype):
    """O, v and scale as a team finds them, and what it sent."""
    options = MatrixOptions.from_group(group)
    split = split_of(tuple(x.shape), options, dims=(0, 1), ns_dtype=dtype, device_type="cpu")
    dim = 0 if split.cuts_rows else 1
    cuts = even_cuts(x.shape[dim], team.size)
    programs = []
    for number, (start, stop) in enumerate(cuts):
        name, state = "second_momentum_buffer", {}
        if v is not None:
            state[name] = v[None, start:stop] if split.cuts_rows else v[None]
        programs.append(
            update_slab(
                x.narrow(dim, start, stop - start),
                state,
                slab=Slab(team, number, tuple(range(team.size)), *x.shape),
                split=split,
                options=options,
                ns_dtype=dtype,
            )
        )
    results, sent = run(programs)
    o = torch.cat([result[0] for result in results], dim)
    vs = [result[1].get("second_momentum_buffer") for result in results]
    if v is None:
        return o, None, None, sent, split
    if split.cuts_rows:
        found = torch.cat(vs, 1)[0]
    else:
        assert all(torch.equal(other, vs[0]) for other in vs)
        found = vs[0][0]
    scales = [result[2]["scale"] for result in results]
    for scale in scales:
        torch.testing.assert_close(scale, scales[0], rtol=0, atol=0, equal_nan=True)
    return o, found, scales[0], sent, split


def whole(x, v, group, dtype):
    options = MatrixOptions.from_group(group)
    state = {} if v is None else {"second_momentum_buffer": v[None]}
    update = orthogonalize_(
        x[None].clone(), state, options=options, ns_dtype=dtype, workspace=Workspace()
    )
    return update.o_BMN[0], update.state, update.summary


def matrix(shape, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("team", TEAMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original", "spectral_unclamped"])
def test_a_team_finds_what_one_rank_finds(shape, team, adjust_lr_fn):
    if max(shape) < team.size:
        pytest.skip("more members than slabs")
    x, v = matrix(shape, torch.float64), torch.rand(shape[0], dtype=torch.float64) + 0.1
    group = options_of_group(adjust_lr_fn=adjust_lr_fn)
    o, found, scale, _, _ = divided(x, v, team, group, torch.float64)
    expected, state, summary = whole(x, v, group, torch.float64)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found, state["second_momentum_buffer"][0], rtol=1e-9, atol=0)
    torch.testing.assert_close(scale, summary["scale"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30, float("nan")])
def test_any_scale_is_borne(scale):
    x, team = matrix((24, 16), scale=scale), Team(2, True)
    o, _, _, _, _ = divided(x, torch.ones(24), team, options_of_group(), torch.float32)
    expected, _, _ = whole(x, torch.ones(24), options_of_group(), torch.float32)
    torch.testing.assert_close(o, expected, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_one_large_slab_beside_a_small_one_is_no_less_exact():
    x = matrix((24, 16), torch.float64)
    x[:12] *= 1e-200
    o, _, _, _, _ = divided(
        x, torch.ones(24, dtype=torch.float64), Team(2, True), options_of_group(), torch.float64
    )
    expected, _, _ = whole(
        x, torch.ones(24, dtype=torch.float64), options_of_group(), torch.float64
    )
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 32), (48, 48)], ids=str)
def test_a_team_rounds_no_worse_than_one_rank(shape, dtype):
    """The error against float64, over several matrices, is at most 1.5 of one rank's.

    Where both go by Gram matrices: one rank takes plain Newton-Schulz for square ones, whose error
    is half as large.
    """
    group, errors = options_of_group(algorithm="muon", orthogonalizer="gram"), [0.0, 0.0]
    for seed in range(4):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        exact, _, _ = whole(x.double(), None, group, torch.float64)
        o, _, _, _, _ = divided(x, None, Team(4, True), group, dtype)
        alone, _, _ = whole(x, None, group, dtype)
        errors[0] += float((o.double() - exact).square().sum())
        errors[1] += float((alone.double() - exact).square().sum())
    assert errors[0] ** 0.5 <= 1.5 * errors[1] ** 0.5


PANELS = (530, 514)  # Large enough for a CPU's symmetric products to be cut into panels.


@pytest.mark.parametrize(
    ("shape", "team"),
    [(PANELS, TEAMS[0]), (PANELS, TEAMS[3])]
    + [(shape, team) for shape in [(64, 24), (24, 64), (40, 40)] for team in TEAMS],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operations_and_bytes_are_as_planned(shape, team, dtype):
    x, group = matrix(shape, dtype), options_of_group()
    counted = FlopCounterMode(display=False)
    with counted:
        *_, sent, split = divided(x, torch.ones(shape[0], dtype=dtype), team, group, dtype)
    lengths = [stop - start for start, stop in even_cuts(max(shape), team.size)]
    planned = [split.flops(team, n, length) for n, length in enumerate(lengths)]
    assert counted.get_total_flops() == sum(planned)
    assert len(sent) == split.num_swaps(team)
    by_member = [sum(swap[n] for swap in sent[1:-1]) for n in range(team.size)]
    assert by_member == [split.swapped_bytes(team, n) for n in range(team.size)]


@pytest.mark.parametrize("size", [1, 5, 16, 33])
@pytest.mark.parametrize("team_size", [1, 2, 3, 8])
def test_strips_cover_the_lower_half_once(size, team_size):
    covered = torch.zeros(size, size, dtype=torch.int)
    for member in range(team_size):
        for start, stop in strips_of(size, team_size, member):
            covered[start:stop, :stop] += 1
    assert (covered.tril() == torch.ones(size, size).tril()).all()
    assert covered.max() == 1
    elements = [strip_elements(size, team_size, member) for member in range(team_size)]
    assert sum(elements) == covered.sum()
    if size % (4 * team_size) == 0:
        assert len(set(elements)) == 1


def test_the_rules_of_the_library_can_be_divided():
    for algorithm in ("normuon", "muon"):
        options = MatrixOptions.from_group(options_of_group(algorithm=algorithm))
        assert isinstance(options.normalizer, DividedNormalizer)


@pytest.mark.parametrize("broken", ["a slab left out", "no exchange", "v from one slab"])
def test_what_a_team_must_not_leave_out_changes_the_result(broken, monkeypatch):
    """The checks above would see it: each fault moves the result far beyond rounding."""
    x, v = matrix((16, 24), torch.float64), torch.ones(16, dtype=torch.float64)
    expected, state, _ = whole(x, v, options_of_group(), torch.float64)
    if broken == "v from one slab":

        def first_only(self, tensor):
            parts = yield from Member.gathered(self, tensor)
            return parts[0]

        monkeypatch.setattr(Member, "summed", first_only)
    else:
        original = Member.sum_squares_

        def without(self, part_SS):
            if broken == "no exchange":
                yield from self._share([part_SS])
                return
            if self.number == 1:
                part_SS.zero_()
            yield from original(self, part_SS)

        monkeypatch.setattr(Member, "sum_squares_", without)
        if broken == "no exchange":
            monkeypatch.setattr("normuon.step.slabs.Member.sum_squares_", without)
    o, found, _, _, _ = divided(x, v, Team(2, True), options_of_group(), torch.float64)
    wrong = [
        float((o - expected).abs().max()),
        float((found - state["second_momentum_buffer"][0]).abs().max()),
    ]
    assert max(wrong) > 1e-3
