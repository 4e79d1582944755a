"""What can go wrong with a run: one clear line, an exit code, and nothing good overwritten."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from normuon_lab.train.pretrain.checkpoint import find_checkpoints, verify
from normuon_lab.train.pretrain.metrics import read_metrics
from tests.lab.data.conftest import write_shard
from tests.lab.train.pretrain.conftest import words_for
from tests.lab.train.pretrain.processes import Job, Outcome


@pytest.fixture(scope="module")
def run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """A run of eight steps with checkpoints after four and eight, and its words without --out."""
    folder = tmp_path_factory.mktemp("run")
    words = words_for(text_file, folder / "cache", **{"steps": 8, "save-every": 4, "arm": "adamw"})
    Job([*words, "--out", folder / "run"], folder / "logs").wait().check()
    return words, folder / "run"


def copied(run: Path, folder: Path) -> Path:
    """The run as it was after four steps."""
    copy = Path(shutil.copytree(run, folder / "copy"))
    shutil.rmtree(copy / "checkpoints" / "step-00000008")
    return copy


def content(run: Path) -> dict[Path, bytes]:
    files = (path for path in (run / "checkpoints").rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files}


def check_refused(outcome: Outcome, code: int, message: str) -> None:
    assert set(outcome.codes) == {code}, outcome.stderr
    assert message in outcome.stderr[0]
    assert outcome.stderr[0].startswith("normuon: error: ")
    assert outcome.stderr[0].count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--async-checkpoint"]], ids=["", "async"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(
    run: tuple[list[object], Path], tmp_path: Path, world_size: int, options: list[object]
) -> None:
    words, finished = run
    copy = copied(finished, tmp_path)
    before = content(copy)
    again = [*words, *options, "--trackers", "--out", copy, "--resume", "auto"]
    # The checkpoint's tensors take about a megabyte.
    outcome = Job(again, tmp_path / "logs", world_size=world_size, file_bytes=100_000).wait()
    message = f"the checkpoint of step 8 cannot be written to {copy / 'checkpoints'}: "
    check_refused(outcome, 1, message)
    assert "File too large; earlier checkpoints are intact" in outcome.stderr[0]
    assert content(copy) == before
    assert [verify(path).step for path in find_checkpoints(copy)] == [4]
    # With room again the run goes on.
    Job(again, tmp_path / "logs", world_size=world_size).wait().check()
    assert [verify(path).step for path in find_checkpoints(copy)] == [4, 8]


def test_a_flipped_byte_is_found_before_anything_is_overwritten(
    run: tuple[list[object], Path], tmp_path: Path
) -> None:
    words, finished = run
    copy = copied(finished, tmp_path)
    file = copy / "checkpoints" / "step-00000004" / "__0_0.distcp"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 3] ^= 4
    file.write_bytes(damaged)
    metrics, config = (copy / "metrics.jsonl").read_bytes(), (copy / "config.toml").read_bytes()
    before = content(copy)
    outcome = Job([*words, "--out", copy, "--resume", "auto"], tmp_path / "logs").wait()
    check_refused(outcome, 2, "is damaged: the bytes of __0_0.distcp have changed")
    assert content(copy) == before
    assert (copy / "metrics.jsonl").read_bytes() == metrics
    assert (copy / "config.toml").read_bytes() == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lr", 0.5], "was made with optimizer.lr = 0.004, not 0.5"),
        (["--model", "llama-small"], "was made with model.model = llama-tiny, not llama-small"),
        (["--steps", 9], "was made with batch.steps = 8, not 9"),
        (["--data.text-field", "body"], "was made with data.text_field = text, not body"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_only(
    run: tuple[list[object], Path], tmp_path: Path, change: list[object], message: str
) -> None:
    words, finished = run
    before = content(finished)
    again = [*words, *change, "--out", finished, "--resume", "auto"]
    check_refused(Job(again, tmp_path / "logs").wait(), 2, message)
    assert content(finished) == before


def test_a_run_goes_on_with_its_own_text_only(
    run: tuple[list[object], Path], tmp_path: Path, text_file: Path
) -> None:
    words, finished = run
    copy = copied(finished, tmp_path)
    before = content(copy)
    other = tmp_path / text_file.name
    other.write_text(text_file.read_text().swapcase())
    again = [*words, "--out", copy, "--resume", "auto", "--data.source", other]
    message = "the checkpoint's data is different: its fingerprint is"
    check_refused(Job(again, tmp_path / "logs").wait(), 2, message)
    assert content(copy) == before


def test_a_run_is_neither_overwritten_nor_mixed_with_other_files(
    run: tuple[list[object], Path], tmp_path: Path
) -> None:
    words, finished = run
    before = content(finished)
    outcome = Job([*words, "--out", finished], tmp_path / "logs").wait()
    check_refused(outcome, 2, "holds a run already: give --resume auto to continue it")
    assert content(finished) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    outcome = Job([*words, "--out", tmp_path / "mine"], tmp_path / "logs").wait()
    check_refused(outcome, 2, "holds other files; give a new folder")
    outcome = Job([*words, "--out", tmp_path / "mine" / "thesis.txt"], tmp_path / "logs").wait()
    check_refused(outcome, 2, "is a file; give a folder")
    outcome = Job([*words, "--out", tmp_path / "new", "--resume", "newest"], tmp_path).wait()
    check_refused(outcome, 2, "--resume newest: give never, auto or a checkpoint")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose"
    assert not (tmp_path / "new").exists()


def shards_and_words(folder: Path, **options: Any) -> tuple[list[Path], list[object]]:
    shards = [
        write_shard(folder / f"part-{number}.bin", [7 * i % 256 for i in range(40_000)])
        for number in range(2)
    ]
    words = words_for(folder / "part-*.bin", folder / "cache", **{"arm": "adamw", **options})
    return shards, [*words, "--data.vocab-size", 256]


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    shards, words = shards_and_words(tmp_path)
    shards[1].write_bytes(shards[1].read_bytes()[:-1000])
    outcome = Job([*words, "--out", tmp_path / "run"], tmp_path / "logs").wait()
    check_refused(outcome, 2, f"the shard {shards[1]} is truncated")
    assert not (tmp_path / "run").exists()


def test_missing_data_is_named(tmp_path: Path, text_file: Path) -> None:
    words = words_for(tmp_path / "nowhere.txt", tmp_path / "cache")
    outcome = Job([*words, "--out", tmp_path / "run"], tmp_path / "logs").wait()
    check_refused(outcome, 2, "nowhere.txt")
    assert not (tmp_path / "run").exists()


def run_until_saved(words: list[object], out: Path, logs: Path) -> Job:
    job = Job([*words, "--out", out], logs)
    deadline = time.monotonic() + 240
    while not find_checkpoints(out):
        assert job.is_alive(), job.wait(1).stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return job


def test_a_shard_that_is_cut_during_the_run_ends_it_and_keeps_its_checkpoints(
    tmp_path: Path,
) -> None:
    shards, words = shards_and_words(tmp_path, **{"steps": 5000, "save-every": 5})
    out = tmp_path / "run"
    job = run_until_saved(words, out, tmp_path / "logs")
    for shard in shards:
        os.truncate(shard, 5000)
    check_refused(job.wait(), 2, "part-")
    kept = find_checkpoints(out)
    assert kept
    assert all(verify(path) for path in kept)


def test_data_that_has_vanished_stops_a_run_from_going_on(tmp_path: Path) -> None:
    """An open file that is deleted can still be read; the next start misses it."""
    shards, words = shards_and_words(tmp_path, **{"steps": 5000, "save-every": 5})
    out = tmp_path / "run"
    job = run_until_saved(words, out, tmp_path / "logs")
    shards[0].unlink()
    job.kill()
    before = content(out)
    outcome = Job([*words, "--out", out, "--resume", "auto"], tmp_path / "logs").wait()
    check_refused(outcome, 2, "the checkpoint's data is different")
    assert content(out) == before
    shards[1].unlink()
    outcome = Job([*words, "--out", out, "--resume", "auto"], tmp_path / "logs").wait()
    check_refused(outcome, 2, "part-*.bin")
    assert content(out) == before


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, text_file: Path) -> None:
    """A learning rate that throws the weights so far that the next losses overflow."""
    words = words_for(
        text_file,
        tmp_path / "cache",
        **{"steps": 300, "save-every": 1, "keep-last": 0, "arm": "adamw", "lr": 1e18},
    )
    out = tmp_path / "run"
    outcome = Job([*words, "--out", out], tmp_path / "logs").wait()
    assert outcome.codes == (1,)
    assert "training stopped, earlier checkpoints are intact" in outcome.stderr[0]
    assert outcome.stderr[0].count("\n") == 1
    rows = read_metrics(out / "metrics.jsonl")
    assert all(abs(row["train_loss"]) < float("inf") for row in rows)
    steps = [verify(path).step for path in find_checkpoints(out)]
    # Every step before the bad one was kept, and nothing after.
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) in (len(rows), len(rows) - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", 2], "--dp-replicate 1 x --tp 2 does not divide the 1 rank:"),
        (["--dp-shard", 4], "is 4, but 1 rank was started: use torchrun"),
        (["--micro-batch-size", 3], "do not split into micro batches of 3"),
        (["--trackers", "wandb"], "--trackers wandb: the package wandb is not installed"),
        (["--model", "nowhere/nothing"], "--model nowhere/nothing is neither a named model"),
        (["--data.tokenizer", "nowhere.json"], "nowhere.json"),
        (["--sequence-length", 1025], "--sequence-length 1025: the model has 1,024 positions"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_made(
    tmp_path: Path, text_file: Path, options: list[object], message: str
) -> None:
    words = words_for(text_file, tmp_path / "cache")
    outcome = Job([*words, *options, "--out", tmp_path / "run"], tmp_path / "logs").wait()
    check_refused(outcome, 2, message)
    assert not (tmp_path / "run").exists()
