"""What the parts of the suite of one GPU measure, in a dry run on a CPU, and who fails in them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.matrices import model_matrices, parse_shapes
from normuon_lab.bench.suite import sharded_step, step_table
from normuon_lab.bench.suite.decoder import Decoder, make_decoder
from normuon_lab.bench.suite.gpu_tests import counted
from normuon_lab.bench.suite.loss_race import local_text
from normuon_lab.bench.suite.options import (
    DRY,
    FULL,
    MODEL_SHAPES,
    PARTS,
    SuiteOptions,
)
from normuon_lab.bench.suite.part import PartContext
from normuon_lab.bench.suite.record import (
    json_path,
    read_record,
)
from normuon_lab.bench.suite.step_contenders import step_contenders
from normuon_lab.errors import InputError

CPU = torch.device("cpu")


def context_of(
    options: SuiteOptions, *, seconds: float = 60.0, found: Mapping[str, Any] | None = None
) -> PartContext:
    return PartContext(
        options=options,
        sizes=DRY,
        device=CPU,
        deadline=time.monotonic() + seconds,
        found={**{part: {} for part in PARTS}, **(found or {})},
        keep=lambda values: None,
        say=lambda text: None,
    )


def test_a_dry_run_runs_every_part(dry: tuple[dict[str, Any], Path]) -> None:
    record, out = dry
    assert record == read_record(json_path(out))
    assert record["kind"] == "normuon gpu suite"
    assert record["schema_version"] == 1
    assert record["dry_run"] is True
    assert list(record["parts"]) == list(PARTS)
    states = {name: part["status"] for name, part in record["parts"].items()}
    assert states == {**dict.fromkeys(PARTS, "done"), "tests": "not run"}
    assert record["parts"]["tests"]["reason"] == "left out by --no-tests"
    assert record["finished"] is not None


def test_the_step_table_has_everyone_who_runs_on_a_cpu(
    dry: tuple[dict[str, Any], Path],
) -> None:
    values = dry[0]["parts"]["step"]["values"]
    assert [model["title"] for model in values["models"]] == list(MODEL_SHAPES)
    for model in values["models"]:
        quick, slow = model["races"]
        assert [one["name"] for one in quick["contenders"]] == [
            *("NorMuon", "NorMuon, full products", "NorMuon unfused"),
            *("torch.optim.Muon", "AdamW fused"),
        ]
        assert set(quick["not_run"]) == {"NorMuon triton", "NorMuon captured"}
        assert slow["contenders"] == []
        assert "a checkout of" in slow["not_run"]["dion NorMuon"]
        normuon, *_, muon, adamw = quick["contenders"]
        assert quick["rounds"] == len(normuon["step_ms"]) == DRY.rounds[0]
        assert normuon["ratio_to_first"] == 1.0
        assert normuon["flops"] == normuon["flops_by_model"] > 0
        assert muon["flops"] > normuon["flops"]
        assert adamw["flops"] is None
        assert adamw["ns_dtype"] is None
        elements = model["elements"]
        # Two moments of each element, and a step count of each matrix.
        assert 8 * elements < adamw["state_bytes"] < 8 * elements + 100
        # Momentum, and a number of each neuron.
        assert 4 * elements < normuon["state_bytes"] < 8 * elements
        assert normuon["top_kernels"][0]["ms"] > 0


def test_rank_0_of_many_is_timed(dry: tuple[dict[str, Any], Path]) -> None:
    """Its state is its own rows': 1 of 16 and of 64 of the momentum, and vectors."""
    values = dry[0]["parts"]["sharded"]["values"]
    assert values["model"] == "llama-1.1b"
    assert [case["ranks"] for case in values["cases"]] == [16, 64]
    states = []
    for case in values["cases"]:
        (normuon,) = case["contenders"]
        assert normuon["name"] == "NorMuon"
        assert len(normuon["step_ms"]) == case["rounds"] == DRY.rounds[0]
        assert set(case["not_run"]) == {"NorMuon captured", "dion NorMuon"}
        states.append(normuon["state_bytes"])
    momentum = 4 * values["elements"]
    assert momentum / 16 < states[0] < momentum / 8
    assert momentum / 64 < states[1] < states[0]
    assert not torch.distributed.is_initialized()


def test_only_chooses_who_is_sharded(tmp_path: Path) -> None:
    options = SuiteOptions(out=tmp_path, device="cpu", only=("dion*",), dion=None)
    with sharded_step.first_of(4, CPU) as mesh:
        names = [one.name for one in sharded_step.contenders(mesh, context_of(options))]
    assert names == ["NorMuon", "dion NorMuon"]


def test_the_other_parts_say_what_they_should(dry: tuple[dict[str, Any], Path]) -> None:
    parts = {name: part["values"] for name, part in dry[0]["parts"].items()}
    assert parts["machine"]["copy_bytes_per_second"] > 1e6
    assert {one["dtype"] for one in parts["machine"]["matmul"]} == {
        *("bfloat16", "float16", "float32")
    }
    names = [one["name"] for one in parts["accuracy"]["contenders"]]
    assert names == [
        *("NorMuon auto bfloat16", "NorMuon auto float16", "NorMuon auto float32"),
        "torch.optim.Muon",
    ]
    for one in parts["accuracy"]["contenders"]:
        assert all(0.1 < error["direction_error"] < 0.25 for error in one["errors"])
    training = parts["training"]
    assert training["tokens_per_step"] == DRY.tokens_per_step
    assert training["overhead_percent"] == pytest.approx(100 * (training["ratio"] - 1))
    adamw, normuon = parts["comparison"]["arms"]
    assert [one["name"] for one in (adamw, normuon)] == ["AdamW", "NorMuon"]
    for arm in (adamw, normuon):
        assert arm["curve"][-1]["step"] == parts["comparison"]["steps"]
        assert arm["held_out_loss"] < arm["curve"][0]["held_out_loss"]


@pytest.mark.parametrize("model", MODEL_SHAPES)
def test_the_shapes_are_those_of_the_presets(model: str) -> None:
    preset, layers = (model, None) if model != "llama3-8b-layer" else ("llama3-8b", 1)
    assert parse_shapes(MODEL_SHAPES[model]) == model_matrices(preset, num_layers=layers)


def test_the_trained_model_has_gpt2s_size() -> None:
    with torch.device("meta"):
        model = Decoder(FULL.training)
    assert sum(param.numel() for param in model.parameters()) == 124_392_960


def test_contenders_begin_with_the_same_weights() -> None:
    one, two = (make_decoder(DRY.training, seed=3, device=CPU) for _ in range(2))
    assert all(map(torch.equal, one.parameters(), two.parameters()))


class Broken(torch.optim.SGD):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        raise RuntimeError("no kernel image\nand a long story")


class Poisonous(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            param.fill_(float("nan"))


class PoisonousAndBroken(Poisonous):
    steps = 0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("no second step")


def test_a_contender_that_fails_is_recorded_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that leaves NaN behind poisons nobody, though all step the same weights."""
    first = step_contenders(CPU, dion=None)[0]

    def build(kind: type[torch.optim.Optimizer], params: list[nn.Parameter]) -> Any:
        return kind(params, lr=0.1)  # type: ignore[call-arg]

    others = [
        Contender(name=name, build=lambda params, kind=kind: build(kind, params), ns_dtype=None)
        for name, kind in (
            ("broken", Broken),
            ("poison", Poisonous),
            ("both", PoisonousAndBroken),
            ("sound", torch.optim.SGD),
        )
    ]
    monkeypatch.setattr(step_table, "step_contenders", lambda *a, **k: (first, *others))
    options = SuiteOptions(out=tmp_path, device="cpu", models=("gpt2-124m", "no such model"))
    model, unknown = step_table.run(context_of(options))["models"]
    (race,) = model["races"]
    assert [one["name"] for one in race["contenders"]] == ["NorMuon", "sound"]
    assert race["not_run"] == {
        "broken": "RuntimeError: no kernel image",
        "poison": "its step made weights that are not finite",
        "both": "RuntimeError: no second step",
    }
    assert "no such model" in unknown["error"]
    assert unknown["races"] == []


def test_who_compiles_is_not_begun_without_time(tmp_path: Path) -> None:
    first, *_ = step_contenders(CPU, dion=None)
    slow = replace(first, name="slow", compiles=True)
    options = SuiteOptions(out=tmp_path, device="cpu")
    matrices = parse_shapes("8x4")
    short = context_of(options, seconds=DRY.compile_seconds / 2)
    *_, found = step_table.race((first, slow), matrices, short, {})
    assert found["not_run"] == {"slow": "no time left"}
    # It is known to be quick from another model.
    *_, known = step_table.race((first, slow), matrices, short, {"slow": 0.1})
    assert [one["name"] for one in known["contenders"]] == ["NorMuon", "slow"]


def test_who_compiles_forever_costs_nobody_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was timed is written down before anything is compiled that may never end."""
    first = step_contenders(CPU, dion=None)[0]
    kept: list[Mapping[str, Any]] = []
    seen: list[list[str]] = []

    def never_ends(_: Any) -> Any:
        race = kept[-1]["models"][0]["races"][-1]
        assert all(len(one["step_ms"]) == race["rounds"] for one in race["contenders"])
        seen.append([one["name"] for one in race["contenders"]])
        raise RuntimeError("ended from outside")

    quick = replace(first, name="quick", compiles=True)
    slow = replace(first, name="slow", compiles=True, build=never_ends)
    monkeypatch.setattr(step_table, "step_contenders", lambda *a, **k: (first, quick, slow))
    options = SuiteOptions(out=tmp_path, device="cpu", models=("gpt2-124m", "llama-1.1b"))
    context = replace(context_of(options), keep=lambda values: kept.append(deepcopy(values)))
    models = step_table.run(context)["models"]
    assert seen == [["NorMuon", "quick"]] * 2
    assert len(kept[0]["models"][1]["races"]) == 0, "the race of another model is not touched"
    for model in models:
        (race,) = model["races"]
        assert [one["name"] for one in race["contenders"]] == ["NorMuon", "quick"]
        assert race["not_run"] == {"slow": "RuntimeError: ended from outside"}


def test_only_keeps_the_first_and_says_whom_it_knows() -> None:
    names = [one.name for one in step_contenders(CPU, dion=None, only=("torch*",))]
    assert names == ["NorMuon", "torch.optim.Muon"]
    with pytest.raises(InputError, match="known: NorMuon, NorMuon, full products"):
        step_contenders(CPU, dion=None, only=("nobody",))


def test_pytests_output_is_counted_even_without_its_end() -> None:
    text = """
tests/gpu/test_a.py::test_one[{'ns_dtype': torch.float32}] PASSED       [ 20%]
tests/gpu/test_a.py::test_two FAILED                                    [ 40%]
tests/gpu/test_a.py::test_three SKIPPED (needs a CUDA device)           [ 60%]
tests/gpu/test_a.py::test_four ERROR                                    [ 80%]
FAILED tests/gpu/test_a.py::test_two - AssertionError: 1 != 2
SKIPPED [3] tests/gpu/test_a.py:107: needs a CUDA device
"""
    found = counted(text)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert found["failures"] == [
        {"name": "tests/gpu/test_a.py::test_two", "reason": "AssertionError: 1 != 2"},
        {"name": "tests/gpu/test_a.py::test_four", "reason": ""},
    ]
    assert found["skips"] == [{"count": 3, "reason": "needs a CUDA device"}]


def test_held_out_text_is_of_other_files(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.py").write_bytes(bytes([65 + number]) * 10)
    text = local_text(10_000, tmp_path)
    assert text.files == (18, 2)
    assert not set(text.train.tolist()) - {10} & set(text.held_out.tolist())
    with pytest.raises(RuntimeError, match="fewer than 10"):
        local_text(10_000, tmp_path / "nowhere")
