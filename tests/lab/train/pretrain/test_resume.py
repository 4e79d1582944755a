"""A run that is stopped or killed goes on as if nothing had happened, bit by bit."""

from __future__ import annotations

import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from normuon_lab.train.pretrain.checkpoint import find_checkpoints, newest_complete, verify
from normuon_lab.train.pretrain.metrics import read_metrics
from tests.lab.train.pretrain.conftest import words_for
from tests.lab.train.pretrain.kills import final_tensors, train_through_kills
from tests.lab.train.pretrain.processes import Job

Words = Callable[..., list[object]]


@pytest.fixture(scope="module")
def words(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Words:
    """`normuon train` on the small text; options by name."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda **options: words_for(text_file, cache, **options)


def wait_for_step(job: Job, out: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not any(row["step"] >= step for row in read_metrics(out / "metrics.jsonl")):
        assert job.is_alive(), job.wait(1).stderr
        assert time.monotonic() < deadline, "the run does not advance"
        time.sleep(0.005)


def wait_for_text(job: Job, file: Path, text: str) -> None:
    deadline = time.monotonic() + 240
    while not (file.exists() and text in file.read_text()):
        assert job.is_alive(), job.wait(1).stderr
        assert time.monotonic() < deadline, "the run says nothing"
        time.sleep(0.005)


def assert_same_end(first: Path, second: Path) -> None:
    expected, found = final_tensors(first), final_tensors(second)
    assert expected.keys() == found.keys()
    differing = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not differing
    # Momentum and moments are among what is compared, and the states of random generators.
    assert {name.partition(".")[0] for name in expected} == {"model", "optimizer", "trainer"}


@pytest.mark.parametrize(
    ("world_size", "num_kills", "options"),
    [
        (1, 2, {}),
        (2, 2, {}),
        (2, 1, {"momentum-dtype": "int8"}),
        pytest.param(1, 20, {}, marks=pytest.mark.slow),
        pytest.param(2, 20, {}, marks=pytest.mark.slow),
        pytest.param(2, 4, {"arm": "muon"}, marks=pytest.mark.slow),
        pytest.param(2, 4, {"arm": "adamw"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_ends_bitwise_as_one_that_is_not(
    tmp_path: Path, words: Words, world_size: int, num_kills: int, options: dict[str, str]
) -> None:
    """kill -9 of all ranks at random moments, half of them while a checkpoint is being written."""
    # Long enough that no attempt ends before its kill.
    run = words(**{"steps": 40 + 30 * num_kills, "save-every": 8, **options})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Job([*run, "--out", whole], tmp_path / "logs", world_size=world_size).wait().check()
    fell = train_through_kills(
        run, killed, tmp_path / "logs", world_size=world_size, num_kills=num_kills, seed=7
    )
    assert fell.total() == num_kills
    assert_same_end(whole, killed)
    losses = [
        [(row["step"], row["train_loss"]) for row in read_metrics(out / "metrics.jsonl")]
        for out in (whole, killed)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("world_size", "is_async"), [(1, True), (2, False)])
def test_sigterm_keeps_the_step_and_ends_well(
    tmp_path: Path, words: Words, world_size: int, is_async: bool
) -> None:
    run = words(**{"steps": 60, "arm": "adamw", "save-every": 40})
    if is_async:
        run.append("--async-checkpoint")
    out, whole = tmp_path / "out", tmp_path / "whole"
    job = Job([*run, "--out", out], tmp_path / "first", world_size=world_size)
    wait_for_step(job, out, 5)
    # A scheduler tells every process; torchrun may tell one of them first.
    job.send(signal.SIGTERM, ranks=[world_size - 1])
    outcome = job.wait(30).check()
    newest = newest_complete(out)
    assert newest is not None
    step = verify(newest).step
    assert 5 <= step < 60
    assert f"stopped by SIGTERM after step {step}" in outcome.stdout
    again = [*run, "--out", out, "--resume", "auto"]
    outcome = Job(again, tmp_path / "second", world_size=world_size).wait().check()
    assert f"continuing from step {step}" in outcome.stdout
    Job([*run, "--out", whole], tmp_path / "third", world_size=world_size).wait().check()
    assert_same_end(whole, out)
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl")]
    assert steps == list(range(1, 61))


def measured_updates(out: Path) -> list[dict[str, float]]:
    rows = read_metrics(out / "metrics.jsonl")
    names = {name for row in rows for name in row if name.startswith("diagnostics/")}
    return [{name: row[name] for name in names & row.keys()} for row in rows]


def test_a_resumed_run_measures_the_same_updates(tmp_path: Path, words: Words) -> None:
    """Restoring gives an optimizer new param groups, whose rate is the one that changes."""
    run = [
        *words(**{"steps": 8, "save-every": 4, "diagnose": "every=2"}),
        "--out",
        tmp_path / "out",
    ]
    Job(run, tmp_path / "first").wait().check()
    whole = measured_updates(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000008")
    Job([*run, "--resume", "auto"], tmp_path / "second").wait().check()
    assert measured_updates(tmp_path / "out") == whole
    assert [bool(row) for row in whole] == [False, True] * 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_ctrl_c_keeps_the_step_and_says_what_to_type(
    tmp_path: Path, words: Words, text_file: Path, world_size: int
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    run = words(**{"steps": 60, "arm": "adamw", "save-every": 40})
    job = Job([*run, "--out", out], tmp_path / "first", world_size=world_size)
    wait_for_step(job, out, 5)
    job.send(signal.SIGINT, ranks=range(world_size))
    outcome = job.wait(60, grace=30)
    assert set(outcome.codes) == {130}, outcome.stderr
    assert outcome.stderr[0] == (
        "\nstopping after this step, with a checkpoint; Ctrl-C again ends at once\n"
        "normuon: interrupted\n"
    )
    first, *_, stopped, command = outcome.stdout.splitlines()
    assert first.startswith("training llama-tiny (")
    assert f" parameters) on {text_file} (" in first
    assert first.endswith(f" tokens), into {out}")
    newest = newest_complete(out)
    assert newest is not None
    step = verify(newest).step
    assert 5 <= step < 60
    assert stopped == f"stopped by Ctrl-C after step {step}, which is saved; continue with:"
    program, typed = command.split(" train ")
    assert program == (
        "normuon" if world_size == 1 else "torchrun --nproc-per-node 2 -m normuon_lab"
    )
    again = ["train", *shlex.split(typed)]
    outcome = Job(again, tmp_path / "second", world_size=world_size).wait().check()
    assert f"continuing from step {step}" in outcome.stdout
    Job([*run, "--out", whole], tmp_path / "third", world_size=world_size).wait().check()
    assert_same_end(whole, out)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, words: Words, text_file: Path) -> None:
    """In the middle of a step of a minute, whose end the first one waits for."""
    text = tmp_path / "long.txt"
    text.write_text(text_file.read_text() * 16)  # Enough for a batch that takes so long.
    data = {"data.source": text, "data.cache": tmp_path / "cache"}
    batch = {"batch-size": 8192, "micro-batch-size": 1}
    run = words(**{"steps": 9, "arm": "adamw", **batch, **data})
    out = tmp_path / "out"
    job = Job([*run, "--out", out], tmp_path / "logs")
    # The line comes when the signal is watched for.
    wait_for_text(job, tmp_path / "logs" / "0.out", "training llama-tiny")
    job.send(signal.SIGINT, ranks=[0])
    wait_for_text(job, tmp_path / "logs" / "0.err", "Ctrl-C again ends at once")
    job.send(signal.SIGINT, ranks=[0])
    assert job.wait(30).codes == (-signal.SIGINT,)
    assert find_checkpoints(out) == []


def test_a_run_goes_on_where_its_data_has_moved(
    tmp_path: Path, words: Words, text_file: Path
) -> None:
    """The path was compared once, and a mount that had another name ended a run for good."""
    run = words(**{"steps": 8, "save-every": 4})
    whole = tmp_path / "whole"
    Job([*run, "--out", whole], tmp_path / "logs").wait().check()
    halved = without_checkpoint(whole, 8, tmp_path / "halved")
    moved = Path(shutil.copy(text_file, tmp_path / "of-another-name.txt"))
    again = words(
        **{"steps": 8, "save-every": 4, "data.source": moved, "data.cache": tmp_path / "cache"}
    )
    Job([*again, "--out", halved, "--resume", "auto"], tmp_path / "logs").wait().check()
    assert_same_end(whole, halved)


def without_checkpoint(run: Path, step: int, copy: Path) -> Path:
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{step:08d}")
    return copy


@pytest.mark.timeout(300)
def test_a_run_of_four_ranks_goes_on_on_fewer(tmp_path: Path, words: Words) -> None:
    """The losses after the change differ by the order of sums alone."""
    run = words(**{"steps": 20, "save-every": 10, "batch-size": 8})
    four = tmp_path / "four"
    Job([*run, "--out", four], tmp_path / "logs-4", world_size=4).wait().check()
    expected = [row["train_loss"] for row in read_metrics(four / "metrics.jsonl")]
    for world_size in (2, 1):
        copy = without_checkpoint(four, 20, tmp_path / f"on-{world_size}")
        again = [*run, "--out", copy, "--resume", "auto"]
        logs = tmp_path / f"logs-{world_size}"
        Job(again, logs, world_size=world_size).wait().check()
        rows = read_metrics(copy / "metrics.jsonl")
        found = [row["train_loss"] for row in rows]
        assert found[:10] == expected[:10]
        assert found[10:] == pytest.approx(expected[10:], rel=1e-5)
        description = verify(copy / "checkpoints" / "step-00000020")
        assert description.world_size == world_size


def test_the_newest_are_kept_and_those_of_round_steps(tmp_path: Path, words: Words) -> None:
    run = words(**{"steps": 25, "save-every": 3, "keep-last": 2, "keep-every": 6, "arm": "adamw"})
    Job([*run, "--out", tmp_path / "run"], tmp_path / "logs").wait().check()
    names = [path.name for path in find_checkpoints(tmp_path / "run")]
    assert names == [f"step-{step:08d}" for step in (6, 12, 18, 24, 25)]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_going_on_from_an_older_checkpoint_needs_the_newer_ones_away(
    tmp_path: Path, words: Words
) -> None:
    run = words(**{"steps": 6, "save-every": 3, "arm": "adamw"})
    out = tmp_path / "run"
    Job([*run, "--out", out], tmp_path / "logs").wait().check()
    older = out / "checkpoints" / "step-00000003"
    outcome = Job([*run, "--out", out, "--resume", older], tmp_path / "logs").wait()
    assert outcome.codes == (2,)
    assert "holds step-00000006, which is newer than" in outcome.stderr[0]
    # Into another folder it may go.
    other = tmp_path / "other"
    Job([*run, "--out", other, "--resume", older], tmp_path / "logs").wait().check()
    assert_same_end(out, other)
