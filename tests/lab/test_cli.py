"""The `normuon` command as a user calls it: results, errors in one line, Ctrl-C and going on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.corpus import Corpus
from normuon_lab.train.runs.train import train_run
from tests.lab.conftest import RATES, TINY_STEPS, Outcome, command, run_command


def test_a_comparison_writes_results_metrics_and_report(
    tiny_comparison: tuple[Path, Outcome],
) -> None:
    out, outcome = tiny_comparison
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "complete"
    assert results["config"]["arms"] == ["adamw", "muon", "normuon"]
    assert {(run["arm"], run["seed"]) for run in results["runs"]} == {
        (arm, seed) for arm in ("adamw", "muon", "normuon") for seed in (0, 1)
    }
    for run in results["runs"]:
        assert run["eval_steps"] == [0, 2, 4, 6]
        assert len(run["train_losses"]) == TINY_STEPS
        assert run["final_loss"] == run["eval_losses"][-1]
        assert bool(run["updates"]) == (run["seed"] == 0)
    assert "NorMuon against Muon" in outcome.stdout
    events = list((out / "tensorboard").glob("*/events.*"))
    assert {path.parent.name for path in events} >= {"adamw-seed0", "normuon-seed1"}
    assert (out / "report.html").stat().st_size > 1_000_000
    assert not list(out.glob(".*"))


def test_a_finished_comparison_is_shown_again_and_not_run_again(
    tiny_comparison: tuple[Path, Outcome], tiny_options: list[str]
) -> None:
    out, first = tiny_comparison
    before = (out / "results.json").read_bytes()
    again = run_command("compare", *tiny_options, *RATES, "--seeds", 2, "--out", out)
    assert again.code == 0, again.stderr
    assert again.stdout.startswith(f"All 6 runs of this comparison are already in {out}, made")
    table = first.stdout[first.stdout.index("Final validation loss and steps") :]
    assert again.stdout.endswith(table)
    assert (out / "results.json").read_bytes() == before


def test_a_run_in_a_worker_equals_the_same_run_here(
    tiny_comparison: tuple[Path, Outcome], experiment: Experiment, corpus: Corpus
) -> None:
    results = json.loads((tiny_comparison[0] / "results.json").read_text())
    stored = next(r for r in results["runs"] if (r["arm"], r["seed"]) == ("normuon", 1))
    spec = RunSpec(arm="normuon", seed=1, learning_rate=stored["learning_rate"])
    record = train_run(spec, experiment, corpus)
    assert record.eval_losses == stored["eval_losses"]
    assert record.train_losses == stored["train_losses"]


def test_tensorboard_reads_the_losses_back(tiny_comparison: tuple[Path, Outcome]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = tiny_comparison
    results = json.loads((out / "results.json").read_text())
    run = results["runs"][0]
    events = EventAccumulator(str(out / "tensorboard" / f"{run['arm']}-seed{run['seed']}"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("loss/validation")]
    assert [step for step, _ in read] == run["eval_steps"]
    # TensorBoard stores float32: 2^-24 of a value below 8 is 5e-7.
    assert [value for _, value in read] == pytest.approx(run["eval_losses"], abs=1e-6)


@pytest.fixture(scope="module")
def bad_outcomes(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_options: list[str],
    tiny_comparison: tuple[Path, Outcome],
) -> dict[str, tuple[Outcome, Path]]:
    """All bad calls at once, two at a time: each pays for importing torch."""
    folder = tmp_path_factory.mktemp("bad")
    finished, _ = tiny_comparison
    empty, short, taken = folder / "empty.txt", folder / "short.txt", folder / "taken"
    empty.write_text(" \n")
    short.write_text("too short\n" * 5)
    taken.write_text("a file of the user's")
    base = ["compare", *tiny_options, *RATES, "--seeds", "2"]
    calls: dict[str, list[object]] = {
        "missing file": [*base, "--data", folder / "nowhere.txt"],
        "directory": [*base, "--data", folder],
        "empty text": [*base, "--data", empty],
        "short text": [*base, "--data", short],
        "zero steps": [*base, "--steps", 0],
        "negative steps": [*base, "--steps", -3],
        "no number": [*base, "--steps", "many"],
        "tiny vocabulary": [*base, "--tokenizer", "bpe", "--vocab-size", 4],
        "no seeds": [*base, "--seeds", 0],
        "unknown arm": [*base, "--arms", "adamw", "sgd"],
        "arm twice": [*base, "--arms", "adamw", "adamw", "--lr", "adamw=0.1"],
        "bad rate": [*base, "--lr", "adamw=fast"],
        "negative rate": [*base, "--lr", "adamw=-1", "muon=1", "normuon=1"],
        "rate of another arm": [*base, "--arms", "adamw", "--lr", "muon=0.1"],
        "unknown option": [*base, "--frobnicate"],
        "unknown command": ["frobnicate"],
        "out is a file": [*base, "--out", taken],
        "out has other files": [*base, "--out", folder],
        "out is taken": [*base, "--out", finished, "--steps", 8],
        "resume differs": [*base, "--out", finished, "--resume", "--steps", 7],
        "tune out exists": ["tune", *tiny_options, "--out", taken],
        "tune short grid": ["tune", *tiny_options, "--lrs", 0.1, 0.2, "--out", folder / "t"],
    }

    def call(item: tuple[str, list[object]]) -> tuple[str, tuple[Outcome, Path]]:
        name, words = item
        out = folder / name.replace(" ", "-")
        if "--out" not in words and words != ["frobnicate"]:
            words = [*words, "--out", out]
        return name, (run_command(*words), out)

    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with ThreadPoolExecutor(max_workers=2) as pool:
        outcomes = dict(pool.map(call, calls.items()))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert taken.read_text() == "a file of the user's"
    return outcomes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing file", "no such file"),
        ("directory", "is a directory"),
        ("empty text", "is empty"),
        ("short text", "the text is too short"),
        ("zero steps", "--steps must be at least 1, got 0"),
        ("negative steps", "--steps must be at least 1, got -3"),
        ("no number", "give an integer"),
        ("tiny vocabulary", "--vocab-size 4: a BPE has the 256 bytes and more, up to 65536 tokens"),
        ("no seeds", "--seeds must be at least 1, got 0"),
        ("unknown arm", "unknown arm 'sgd': choose from adamw, muon, normuon, "),
        ("arm twice", "the arm 'adamw' is named twice"),
        ("bad rate", "write ARM=VALUE"),
        ("negative rate", "must be a positive number"),
        ("rate of another arm", "muon is not among the arms"),
        ("unknown option", "--frobnicate is not an option of normuon compare"),
        ("unknown command", "frobnicate is not a word of normuon"),
        ("out is a file", "is a file; give a folder"),
        ("out has other files", "holds other files"),
        ("out is taken", "holds results made with --steps 6, not --steps 8"),
        ("resume differs", "holds results made with --steps 6, not --steps 7"),
        ("tune out exists", "exists already"),
        ("tune short grid", "at least three learning rates"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    bad_outcomes: dict[str, tuple[Outcome, Path]], name: str, message: str
) -> None:
    outcome, out = bad_outcomes[name]
    assert outcome.code == 2
    assert message in outcome.stderr
    assert outcome.stderr.startswith("normuon: error: ")
    assert outcome.stderr.count("\n") == 1
    assert not out.exists()


def test_help_is_quick_and_names_the_subcommands() -> None:
    started = time.monotonic()
    outcome = run_command("--help")
    assert outcome.code == 0
    assert "compare" in outcome.stdout
    assert "tune" in outcome.stdout
    # Without torch it takes 0.2 s; importing torch takes seconds. Generous for a busy machine.
    assert time.monotonic() - started < 5.0


@pytest.mark.timeout(200)
def test_ctrl_c_and_a_kill_keep_finished_runs_and_resume_does_the_rest(
    tmp_path: Path, tiny_options: list[str], tiny_comparison: tuple[Path, Outcome]
) -> None:
    out = tmp_path / "out"
    # Long enough that a run is going on when another has just finished.
    options = [*tiny_options, "--steps", "150", "--arms", "adamw", "muon", "--seeds", "2"]
    words = ["compare", *options, "--lr", "adamw=0.004", "muon=0.004", "--out", str(out)]

    interrupted = _start(words)
    _wait_for_finished_run(interrupted)
    # As a terminal does it: to the command and all its workers.
    os.killpg(interrupted.pid, signal.SIGINT)
    _, stderr = interrupted.communicate(timeout=30)
    assert interrupted.returncode == 130
    assert stderr.count("\n") == 1
    kept = json.loads((out / "results.json").read_text())
    assert kept["status"] == "partial"
    assert f"interrupted: {len(kept['runs'])} of 4 runs are kept in {out}" in stderr
    # As it was called, so that it can be typed as it stands.
    hint = stderr.strip().rpartition("; continue with: ")[2]
    assert shlex.split(hint)[1:] == [*words, "--resume"]
    assert shutil.which(shlex.split(hint)[0]) is not None
    first_runs = {(run["arm"], run["seed"]): run for run in kept["runs"]}
    assert 1 <= len(first_runs) < 4

    killed = _start([*words, "--resume"])
    _wait_for_finished_run(killed)
    killed.kill()
    killed.communicate(timeout=30)
    kept = json.loads((out / "results.json").read_text())
    assert len(kept["runs"]) > len(first_runs)

    resumed = run_command(*words, "--resume")
    assert resumed.code == 0, resumed.stderr
    done = json.loads((out / "results.json").read_text())
    assert done["status"] == "complete"
    assert len(done["runs"]) == 4
    # What was kept was not done again: even its times are the same.
    for run in done["runs"]:
        assert first_runs.get((run["arm"], run["seed"]), run) == run


@pytest.mark.timeout(120)
def test_tuned_rates_feed_a_comparison(tmp_path: Path, tiny_options: list[str]) -> None:
    tuned = tmp_path / "tuned.json"
    tuning = run_command(
        "tune",
        *tiny_options,
        *("--arms", "adamw", "--lrs", 0.001, 0.01, 100.0, "--seeds", 1, "--rounds", 0),
        *("--out", tuned),
    )
    assert tuning.code == 0, tuning.stderr
    written = json.loads(tuned.read_text())
    assert written["seeds"] == [1000]
    assert written["arms"]["adamw"]["learning_rate"] == 0.01
    assert written["command"].startswith("normuon tune")
    out = tmp_path / "out"
    comparison = run_command(
        "compare",
        *tiny_options,
        *("--arms", "adamw", "--seeds", 1, "--tuned", tuned, "--out", out),
    )
    assert comparison.code == 0, comparison.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["config"]["learning_rates"] == {"adamw": 0.01}
    assert "3 rates from 0.001 to 100, seeds 1000" in results["learning_rates"]["adamw"]["source"]
    assert "one seed" in (out / "report.html").read_text().lower()


def _start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A suite that runs in the background ignores SIGINT, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for_finished_run(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("["):
            return
    raise AssertionError(f"no run was finished: {process.communicate()[1]}")
