"""`normuon bench`: figures checked by hand, peers that are missing or fail, bad input, outputs."""

from __future__ import annotations

import io
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from normuon_lab.bench.contender import Contender, own_contenders
from normuon_lab.bench.figure import bench_figure
from normuon_lab.bench.matrices import MatrixClass, model_matrices, parse_shapes
from normuon_lab.bench.measure import Gradients, counted_flops, tracked_memory
from normuon_lab.bench.peers import PeerPaths, peer_contenders
from normuon_lab.bench.polar import (
    direction_error,
    polar_errors,
    polar_factor,
    polar_factor_by_gram,
)
from normuon_lab.bench.race import (
    SCHEMA_VERSION,
    Allowance,
    BenchRequest,
    Race,
    bench_contents,
    read_bench,
    run_bench,
    run_race,
)
from normuon_lab.bench.runner import TooSlowError
from normuon_lab.bench.text import print_bench
from normuon_lab.cli import main
from normuon_lab.errors import InputError
from normuon_lab.plot_style import save_figure
from tests.lab.conftest import run_command

CPU = torch.device("cpu")
SMALL = parse_shapes("2x16x24,40x16")
KEPT_FLOATS, SPARE_FLOATS = 500, 1000


class Scripted(Optimizer):
    """Steps along a function of the gradient, overwrites it, and allocates known amounts."""

    def __init__(self, params: list[nn.Parameter], direction: Callable[[Tensor], Tensor]) -> None:
        super().__init__(params, {"lr": 0.5})
        self.direction = direction
        self.kept = torch.zeros(KEPT_FLOATS)
        self.seen: list[float] = []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        spare = torch.zeros(SPARE_FLOATS)
        del spare
        for param in self.param_groups[0]["params"]:
            self.seen.append(param.grad.sum().item())
            self.state[param].setdefault("momentum", torch.zeros_like(param))
            param.sub_(self.direction(param.grad))
            param.grad.zero_()


def scripted(
    name: str = "scripted", direction: Callable[[Tensor], Tensor] = lambda grad: grad
) -> Contender:
    def build(params: list[nn.Parameter]) -> Optimizer:
        return Scripted(list(params), direction)

    return Contender(
        name=name,
        package="nowhere",
        build=build,
        ns_dtype="float32",
    )


def own(**options: tuple[str, ...]) -> tuple[Contender, ...]:
    given = {"dtypes": ("float32",), "coefficients": ("jordan",), **options}
    return own_contenders(**given, device=CPU)


def race_of(*contenders: Contender, rounds: int = 1, with_polar: bool = False) -> Race:
    return run_race(contenders, request_for(rounds=rounds, with_polar=with_polar))


def request_for(**options: object) -> BenchRequest:
    defaults = {"matrices": SMALL, "title": "small", "device": CPU, "paths": PeerPaths()}
    return BenchRequest(**{**defaults, **options})


def test_equal_shapes_are_one_class():
    assert parse_shapes("8x4, 2x8X4,3x5") == (MatrixClass(8, 4, 3), MatrixClass(3, 5, 1))


def test_a_model_s_matrices_are_counted_as_they_are_orthogonalised():
    """GPT-2 stores [in, out]; q, k and v stay one matrix, as in the paper."""
    found = {one.shape: one.count for one in model_matrices("gpt2-124m", num_layers=2)}
    assert found == {(2304, 768): 2, (768, 768): 2, (3072, 768): 2, (768, 3072): 2}


def test_every_eager_way_takes_the_flops_its_model_says():
    matrices = parse_shapes("2x48x80,600x520,520x1040")
    ours = [one for one in own(dtypes=("float32", "bfloat16")) if one.flops_per_matrix]
    assert len(ours) == 4
    for contender in ours:
        request = request_for(matrices=matrices, rounds=1, with_polar=False)
        values = bench_contents(request, run_race([contender], request))["contenders"][0]
        assert values["flops"] == values["flops_by_model"] > 0, contender.name


def test_compiled_products_are_counted_too():
    x = torch.ones(4, 6)
    compiled = torch.compile(lambda: x @ x.mT)
    assert counted_flops(compiled) == 2 * 4 * 4 * 6


def test_memory_between_and_during_steps_is_told_apart():
    """Scripted keeps 500 floats, and allocates 1000 more for a moment; its state counts apart."""
    (entry,) = race_of(scripted()).entries
    assert entry.state_elements == sum(one.numel for one in SMALL)
    assert entry.state_bytes == 4 * entry.state_elements
    assert entry.scratch_kept_bytes == 4 * KEPT_FLOATS
    assert entry.scratch_peak_bytes >= 4 * SPARE_FLOATS
    # Reading each gradient's sum allocates one number.
    assert entry.scratch_bytes <= 4 * (KEPT_FLOATS + SPARE_FLOATS) + 64


def test_memory_freed_before_the_end_is_not_net():
    with tracked_memory(CPU) as use:
        kept = torch.ones(100)
        spare = torch.ones(300)
        del spare
    assert (use.peak, use.net) == (1600, 4 * kept.numel())


def test_our_state_is_one_momentum_and_one_number_per_neuron():
    contents = bench_contents(request_for(), race_of(own()[0]))
    assert contents["contenders"][0]["state_elements"] == contents["normuon_state_elements"]
    assert contents["normuon_state_elements"] == 2 * 16 * 25 + 40 * 17


def test_every_step_gets_the_same_gradients_from_optimizers_that_overwrite_them():
    built: list[Scripted] = []

    def build(params: list[nn.Parameter]) -> Optimizer:
        built.append(Scripted(list(params), lambda grad: grad))
        return built[-1]

    race_of(replace(scripted(), build=build), rounds=2)
    (optimizer,) = built
    steps = torch.tensor(optimizer.seen).view(-1, 3)
    assert len(steps) == 4  # Counted, profiled, and two rounds.
    assert (steps == steps[0]).all()
    assert steps.abs().min() > 0


def test_handed_out_gradients_are_copies():
    value, param = torch.ones(2, 2), nn.Parameter(torch.zeros(2, 2))
    gradients = Gradients([value])
    gradients.hand_out([param])
    param.grad.zero_()
    gradients.hand_out([param])
    assert torch.equal(param.grad, value)
    assert value.sum() == 4


def test_who_fails_or_is_missing_is_named_and_the_others_run():
    def fail(grad: Tensor) -> Tensor:
        raise ZeroDivisionError("no step\nand more lines")

    absent = replace(scripted("absent"), missing="not installed: pip install absent")
    race = race_of(scripted("bad", fail), absent, scripted("good"))
    assert [entry.contender.name for entry in race.entries] == ["good"]
    assert race.not_run == {
        "bad": "ZeroDivisionError: no step",
        "absent": "not installed: pip install absent",
    }


def test_who_cannot_bear_the_counter_is_timed_all_the_same():
    failures = iter([ZeroDivisionError("a kernel of its own")])

    def shy(grad: Tensor) -> Tensor:
        for failure in failures:
            raise failure
        return grad

    (entry,) = race_of(scripted("shy", shy)).entries
    assert (entry.flops, entry.flops_note) == (
        0,
        "not counted: ZeroDivisionError: a kernel of its own",
    )
    assert len(entry.step_ms) == 1


def test_a_slow_peer_is_left_out_and_its_reason_names_the_option(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 1e-3 * next(ticks))

    def endless(grad: Tensor) -> Tensor:
        while True:
            grad = grad + 1.0

    request = request_for(rounds=1, peer_seconds=5.0, with_polar=False)
    race = run_race([scripted("endless", endless), scripted("good")], request)
    assert [entry.contender.name for entry in race.entries] == ["good"]
    assert race.not_run == {"endless": "slower than --peer-seconds 5: its first steps took longer"}


def test_our_own_contenders_have_no_limit():
    ours = replace(scripted("ours"), package="normuon")
    race = run_race([ours, scripted()], request_for(rounds=1, peer_seconds=1e-9))
    assert [entry.contender.name for entry in race.entries] == ["ours"]
    assert "scripted" in race.not_run


def test_a_peer_s_rounds_count_before_they_are_run():
    allowance = Allowance(10.0)
    allowance.check_rounds(7, 1.0)
    with pytest.raises(TooSlowError, match=r"^7 steps would take about 14 s more$"):
        allowance.check_rounds(7, 2.0)


def test_names_wrap_and_numbers_do_not_where_the_line_is_short():
    contents = bench_contents(request_for(), race_of(scripted("a name of many words " * 4)))
    console = Console(width=80, file=io.StringIO())
    print_bench(contents, console)
    shown = console.file.getvalue()
    assert "…" not in shown
    assert f"{contents['contenders'][0]['median_ms']:.4g}" in shown


def test_ratios_are_medians_over_rounds_not_ratios_of_medians():
    race = race_of(scripted("first"), scripted("second"))
    race.entries[0].step_ms[:] = [1000.0, 2000.0, 4000.0]
    race.entries[1].step_ms[:] = [3000.0, 4000.0, 4000.0]
    race.peaks["float32"][:] = [1e9, 1e9, 2e9]
    race.entries[1].flops = 10**9
    first, second = bench_contents(request_for(rounds=3), race)["contenders"]
    assert first["ratio_to_reference"] == 1.0
    assert first["flops"] == 0
    assert first["time_over_bound"] is None
    assert second["ratio_to_reference"] == 2.0  # of 3, 2 and 1
    assert second["median_ms"] == 4000.0
    assert second["quartiles_ms"] == [3500.0, 4000.0]
    assert second["time_over_bound"] == 4.0  # of 3, 4 and 8
    assert second["bound_ms"] == 1000.0


@pytest.mark.parametrize("shape", [(20, 20), (12, 30), (30, 12)], ids=str)
def test_both_routes_to_the_polar_factor_agree(shape):
    """They differ by the condition number's square times 1e-16; 20 x 20 normal has below 1e3."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    polar = polar_factor(g)
    torch.testing.assert_close(polar_factor_by_gram(g), polar, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        torch.linalg.svdvals(polar), torch.ones(min(shape)).double(), rtol=0, atol=1e-12
    )


def test_direction_error_ignores_scale_and_sees_sign():
    g = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
    assert direction_error(1e-3 * g, g) < 1e-6
    assert direction_error(-g, g) == pytest.approx(2.0)


def test_an_exact_orthogonaliser_has_no_polar_error():
    g = torch.randn(12, 30, generator=torch.Generator().manual_seed(3))
    exact = scripted(direction=lambda grad: 7 * polar_factor(grad).float())
    assert polar_errors(exact, g, polar_factor(g))["direction_error"] < 1e-6
    raw = polar_errors(scripted(), g, polar_factor(g))["direction_error"]
    assert raw > 0.1


def test_our_polar_errors_follow_from_the_polynomial():
    """On U V^T scaled, every singular value is the same, so the direction is exact and the
    orthogonaliser's error is how far the polynomial's value is from 1."""
    g = polar_factor(torch.randn(8, 8, generator=torch.Generator().manual_seed(4))).float()
    contender = own()[0]
    errors = polar_errors(contender, g, polar_factor(g))
    value = 1 / math.sqrt(8)
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    assert errors["direction_error"] < 1e-5
    assert errors["orthogonalizer_error"] == pytest.approx(abs(value - 1), abs=1e-5)


def test_ways_that_cannot_run_here_are_described_all_the_same():
    ours = own(dtypes=("float32", "bfloat16", "float32"), coefficients=("jordan", "polar_express"))
    names = [one.name for one in ours]
    assert len(set(names)) == len(names) == 12 + 3
    assert names[0] == "NorMuon auto float32"
    assert names[-1] == "NorMuon auto bfloat16 polar_express"
    kernels = [one for one in ours if "kernels" in one.name]
    assert [one.missing for one in kernels] == ["they run on CUDA devices, not on cpu"] * 3
    triton = [one.missing for one in ours if "triton" in one.name]
    assert triton == ["Triton kernels run on CUDA devices, not on cpu"] * 3


def test_every_peer_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    peers = peer_contenders(ns_dtype="float32", device=CPU, paths=PeerPaths())
    missing = {peer.package: peer.missing for peer in peers}
    assert missing.pop("torch") is None
    assert set(missing) == {
        *("optimuon", "pytorch_optimizer", "heavyball", "muonium", "muon-fsdp2"),
        *("dion", "authors"),
    }
    for package, reason in missing.items():
        assert package in reason or "github.com/" in reason
        assert reason.startswith(("not installed: pip install ", "give --"))


def test_a_file_of_the_authors_runs_in_float32(tmp_path):
    """Their file steps in the dtype that its Newton-Schulz returns, which lerp_ must accept."""
    file = tmp_path / "normuon.py"
    file.write_text(
        "import torch\n"
        "def zeropower_via_newtonschulz5(G, steps=5):\n"
        "    return G.bfloat16() / G.norm()\n"
        "class SingleDeviceNorMuon(torch.optim.SGD):\n"
        "    def step(self):\n"
        "        for p in self.param_groups[0]['params']:\n"
        "            update = zeropower_via_newtonschulz5(p.grad, steps=5)\n"
        "            p.data.lerp_(update, 0.1)\n"
    )
    paths = PeerPaths(authors=file)
    (authors,) = (
        peer
        for peer in peer_contenders(ns_dtype="float32", device=CPU, paths=paths)
        if peer.package == "authors"
    )
    race = race_of(authors, with_polar=True)
    assert not race.not_run
    assert race.entries[0].polar[16, 24]["direction_error"] > 0.1


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """The command as a user calls it."""
    out = tmp_path_factory.mktemp("bench") / "new" / "out"
    only = ("NorMuon auto float32", "NorMuon auto float32 kernels", "torch.optim*")
    outcome = run_command(
        *("bench", "--shapes", "2x16x24,40x16", "--device", "cpu", "--threads", "1"),
        *("--repeats", "3", "--dtype", "float32", "--only", *only, "--out", out),
    )
    assert outcome.code == 0, outcome.stderr
    return outcome, out


def test_the_command_prints_a_table_that_fits_and_names_who_is_missing(called):
    outcome, out = called
    lines = outcome.stdout.splitlines()
    assert "given matrices: 2 of 16 x 24, 1 of 40 x 16" in lines
    rows = [line.split() for line in lines if line.startswith((" NorMuon", " torch.optim"))]
    assert [len(row) for row in rows] == [3 + 5, 1 + 5, 3 + 6, 1 + 6]  # Bytes are two words.
    assert all(len(line) <= 80 for line in lines if line.startswith(" "))
    assert "1,480 elements of state where m (n + 1) is 1,480" in outcome.stdout
    assert any(line.startswith("Not run: NorMuon auto float32 kernels:") for line in lines)
    assert f"Written: {out / 'bench.json'}" in lines
    assert not outcome.stderr.strip()


def test_the_command_writes_json_and_figures(called):
    _, out = called
    contents = read_bench(out / "bench.json")
    assert contents["reference"] == contents["contenders"][0]["name"] == "NorMuon auto float32"
    assert contents["command"].startswith("normuon bench --shapes")
    assert contents["machine"]["threads_per_worker"] == 1
    for values in contents["contenders"]:
        assert len(values["step_ms"]) == contents["rounds"] == 3
        assert values["min_ms"] <= values["median_ms"]
        assert 0 < values["profile"]["products_share"] < 1
        assert [(one["rows"], one["cols"]) for one in values["polar"]] == [(16, 24), (40, 16)]
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (out / "bench.svg").read_text()


def test_the_figure_shows_every_contender_and_is_the_same_bytes_again(called, tmp_path):
    contents = json.loads((called[1] / "bench.json").read_text())
    figure = bench_figure(contents)
    times, errors = figure.axes
    names = [values["name"] for values in contents["contenders"]]
    assert [label.get_text() for label in times.get_yticklabels()] == names
    assert [bar.get_width() for bar in times.patches] == [
        values["median_ms"] for values in contents["contenders"]
    ]
    assert len(errors.collections[0].get_offsets()) == len(names)
    for number in range(2):
        save_figure(bench_figure(contents), tmp_path / f"{number}.svg")
    assert (tmp_path / "0.svg").read_bytes() == (tmp_path / "1.svg").read_bytes()


def test_polar_factors_can_be_left_out():
    request = request_for(
        with_polar=False, with_peers=False, dtypes=("float32",), only=("NorMuon auto float32",)
    )
    contents = run_bench(request)
    eager = contents["contenders"][0]
    assert eager["polar"] == []
    assert len(bench_figure(contents).axes) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give either --model or --shapes"),
        ("--model gpt2-124m --shapes 2x2", "give either --model or --shapes"),
        ("--shapes 4x", "--shapes '4x': write ROWSxCOLS or COUNTxROWSxCOLS"),
        ("--shapes 1x2x3x4", "--shapes '1x2x3x4': write ROWSxCOLS"),
        ("--shapes 0x8", "sides are at least 1"),
        ("--shapes 8x99999999", "sides at most 65,536"),
        ("--shapes 8x8 --layers 2", "--layers is for --model"),
        ("--shapes 8x8 --repeats 0", "--repeats 0: give 1 to 1000"),
        ("--shapes 8x8 --threads 0", "--threads 0: give at least 1"),
        ("--shapes 8x8 --peer-seconds 0", "--peer-seconds 0: give more than 0"),
        ("--shapes 8x8 --dion /nowhere", "--dion /nowhere: it has no dion/__init__.py"),
        ("--shapes 8x8 --authors /nowhere", "--authors /nowhere: give the file normuon.py"),
        ("--model no-such", "no-such is neither a preset"),
        ("--model gpt2-124m --layers 13", "--layers 13: gpt2-124m has 12"),
        ("--shapes 8x8 --out /dev/null/x", "--out /dev/null/x: /dev/null is a file, not a folder"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert main(["bench", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_name_that_matches_nobody_is_an_error(capsys, tmp_path):
    words = ["--shapes", "8x8", "--only", "nobody", "--out", str(tmp_path)]
    assert main(["bench", *words]) == 2
    assert "--only nobody: no name matches; known: NorMuon auto" in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"kind": "something else", "schema_version": 1}')
    with pytest.raises(InputError, match="was not written by"):
        read_bench(path)
    assert SCHEMA_VERSION == 1
