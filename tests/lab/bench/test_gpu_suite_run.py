"""The suite of one GPU from first to last part: time, failures, kills, commands, what it needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from normuon_lab.bench.suite import run as run_module
from normuon_lab.bench.suite.__main__ import main, parser
from normuon_lab.bench.suite.options import (
    DRY,
    PARTS,
    SuiteOptions,
)
from normuon_lab.bench.suite.page import verdict
from normuon_lab.bench.suite.part import PartContext, run_part
from normuon_lab.bench.suite.record import (
    json_path,
    new_record,
    page_path,
    plain,
    read_record,
    write_record,
)
from normuon_lab.bench.suite.run import in_process, run_suite
from normuon_lab.cli import main as normuon_main
from tests.module_imports import imports_of

SUITE = [sys.executable, "-m", "normuon_lab.bench.suite"]
CPU = torch.device("cpu")


def test_a_part_that_fails_keeps_what_it_had_and_the_rest_goes_on(tmp_path: Path) -> None:
    def fails(context: PartContext) -> Mapping[str, Any]:
        context.keep({"name": "half", "loss": float("nan")})
        raise MemoryError("out of memory\nwith details")

    def start(part: str, options: SuiteOptions, device: torch.device, *_: float) -> None:
        run_part(
            part,
            options,
            device=device,
            budget_seconds=1.0,
            run=fails if part == "machine" else lambda context: {"name": part},
        )

    options = SuiteOptions(out=tmp_path, device="cpu")
    record = run_suite(options, start=start)
    machine = record["parts"]["machine"]
    assert machine["status"] == "failed"
    assert machine["reason"] == "MemoryError: out of memory"
    assert machine["values"] == {"name": "half", "loss": None}
    assert all(record["parts"][name]["status"] == "done" for name in [*PARTS][1:])
    assert run_module.exit_code(record) == 1
    assert "Machine failed." in verdict(record)


def test_parts_without_time_are_not_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_module, "DRY", replace(DRY, overtime_seconds=0.0))
    begun = []

    def start(part: str, options: SuiteOptions, device: torch.device, *times: float) -> None:
        begun.append((part, *times))
        time.sleep(0.6)
        run_part(part, options, device=device, budget_seconds=times[0], run=lambda context: {})

    options = SuiteOptions(out=tmp_path, device="cpu", seconds=2.5)
    record = run_suite(options, start=start)
    assert [part for part, *_ in begun] == ["machine"]
    assert record["parts"]["comparison"]["reason"] == "no time left"
    assert record["parts"]["comparison"]["status"] == "not run"


def test_what_a_part_leaves_over_goes_to_the_next(tmp_path: Path) -> None:
    budgets = {}

    def start(part: str, options: SuiteOptions, device: torch.device, *times: float) -> None:
        budgets[part] = times[0]
        run_part(part, options, device=device, budget_seconds=times[0], run=lambda context: {})

    run_suite(SuiteOptions(out=tmp_path, device="cpu", seconds=100.0), start=start)
    assert budgets["machine"] == pytest.approx(6.0, rel=0.05)
    assert budgets["comparison"] == pytest.approx(100.0, rel=0.05)


def wait_for(path: Path, condition: Any, *, seconds: float = 90.0) -> dict[str, Any]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.exists():
            record = json.loads(path.read_text())
            if condition(record):
                return record
        time.sleep(0.05)
    raise AssertionError(f"{path} did not get there: {path.read_text()[-2000:]}")


def test_a_run_that_is_killed_keeps_what_it_has(tmp_path: Path) -> None:
    """With kill -9, which leaves nobody time to tidy up; the part's own process leaves, too."""
    running = subprocess.Popen(
        [*SUITE, "--device", "cpu", "--seconds", "60", "--no-tests", "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for(
            json_path(tmp_path),
            lambda record: (
                record["parts"]["machine"]["status"] == "done"
                and record["parts"]["step"]["status"] == "running"
            ),
        )
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    time.sleep(1.0)
    text = json_path(tmp_path).read_text()
    record = read_record(json_path(tmp_path))
    assert record["finished"] is None
    assert record["parts"]["machine"]["values"]["copy_bytes_per_second"] > 0
    assert any("was ended before" in sentence for sentence in verdict(record))
    assert "copy" in page_path(tmp_path).read_text()
    time.sleep(1.0)
    assert json_path(tmp_path).read_text() == text, "its part went on without it"


def test_a_part_over_its_limit_is_ended(tmp_path: Path) -> None:
    options = SuiteOptions(out=tmp_path, device="cpu")
    write_record(new_record(options, device="cpu", dry_run=True), tmp_path)
    in_process("machine", options, CPU, 60.0, 0.3)
    part = read_record(json_path(tmp_path))["parts"]["machine"]
    assert part["status"] == "cut"
    assert "what it had found is kept" in part["reason"]


def test_the_command_without_tyro_runs_a_part_in_a_process(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--seconds", "60", "--parts", "machine", "--out", str(tmp_path)]
    assert main(arguments) == 0
    record = read_record(json_path(tmp_path))
    assert record["parts"]["machine"]["status"] == "done"
    assert record["parts"]["machine"]["values"]["threads"] == 1
    assert record["parts"]["step"]["reason"] == "not asked for"
    assert record["command"].startswith("python -m normuon_lab.bench.suite --device cpu")


def test_both_commands_take_the_same_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def record(options: SuiteOptions) -> dict[str, Any]:
        seen.append(replace(options, command=""))
        return {"parts": {}}

    monkeypatch.setattr(run_module, "run_suite", record)
    flags = ["--out", str(tmp_path), "--seconds", "5", "--no-tests", "--lr", "0.002"]
    flags += ["--only", "NorMuon*", "--parts", "step", "--tokens-per-step", "99", "--seed", "4"]
    assert main(flags) == 0
    assert normuon_main(["bench", "--suite", "gpu", *flags]) == 0
    assert seen[0] == seen[1]
    assert SuiteOptions(**json.loads(json.dumps(plain(asdict(seen[0]))))) == seen[0]
    assert SuiteOptions(**{**vars(parser().parse_args([])), "only": (), "parts": ()}) == (
        SuiteOptions()
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--parts", "nothing"], "known are machine"),
        (["--dion", "/nowhere"], "give a checkout"),
        (["--seconds", "0"], "more than 0"),
        *([(["--device", "cuda"], "no CUDA device")] if not torch.cuda.is_available() else []),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert normuon_main(["bench", "--suite", "gpu", *flags, "--out", str(tmp_path)]) == 2


def test_it_needs_torch_and_the_standard_library_only() -> None:
    """What the suite itself imports; jinja2 makes the page, where it is."""
    folder = Path(run_module.__file__).parent
    for path in folder.glob("*.py"):
        roots = {name.split(".")[0] for name in imports_of(path)}
        allowed = {*sys.stdlib_module_names, "torch", "normuon", "normuon_lab"}
        if path.name == "page.py":
            allowed.add("jinja2")
        assert roots <= allowed, f"{path.name} imports {sorted(roots - allowed)}"
    modules = [f"normuon_lab.bench.suite.{path.stem}" for path in folder.glob("[a-z]*.py")]
    modules.remove("normuon_lab.bench.suite.page")
    code = (
        "import importlib, sys\n"
        "for name in ('tyro', 'rich', 'jinja2', 'matplotlib', 'transformers', 'plotly'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {modules}: importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_jinja2_there_is_the_json_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "normuon_lab.bench.suite.page")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    page_path(tmp_path).write_text("of another run")

    def start(part: str, options: SuiteOptions, device: torch.device, *_: float) -> None:
        run_part(part, options, device=device, budget_seconds=1.0, run=lambda context: {})

    run_suite(SuiteOptions(out=tmp_path, device="cpu"), start=start)
    assert not page_path(tmp_path).exists()
    assert "jinja2 is not installed" in capsys.readouterr().out


def test_the_page_needs_no_plotly(dry: tuple[dict[str, Any], Path]) -> None:
    """torch brings jinja2 and nothing else of what other pages need."""
    code = (
        "import sys\n"
        "for name in ('tyro', 'rich', 'matplotlib', 'transformers', 'plotly'):\n"
        "    sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from normuon_lab.bench.suite import record\n"
        "out = Path(sys.argv[1])\n"
        "record.page_path(out).unlink()\n"
        "record.write_record(record.read_record(record.json_path(out)), out)\n"
        "assert '</html>' in record.page_path(out).read_text()"
    )
    subprocess.run([sys.executable, "-c", code, str(dry[1])], check=True, timeout=120)
