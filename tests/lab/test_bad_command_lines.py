"""Command lines that are not understood: one line that names the slip, the mend and the help."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from normuon_lab.cli import main

ENTRY = [sys.executable, "-c", "from normuon_lab.entry import main; raise SystemExit(main())"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tune --arm adamw", "--arm is not an option of normuon tune; did you mean --arms?"),
        ("compare --seed 3", "--seed is not an option of normuon compare; did you mean --seeds?"),
        (
            "plan gpt2-124m --mehs dp=2",
            "--mehs is not an option of normuon plan; did you mean --mesh?",
        ),
        ("bench --shape 8x8", "--shape is not an option of normuon bench; did you mean --shapes?"),
        (
            "evidence run --cell x",
            "--cell is not an option of normuon evidence run; did you mean --cells?",
        ),
        ("train --frobnicate 3", "--frobnicate is not an option of normuon train"),
        (
            "export a b --dtyp float32",
            "--dtyp is not an option of normuon export; did you mean --dtype?",
        ),
        ("compar", "compar is not a word of normuon; did you mean compare?"),
        ("evidence rum", "rum is not a word of normuon evidence; did you mean run?"),
        ("bench --repeats many", "--repeats many: give an integer"),
        ("compare --learning-rates", None),
        ("plan --mesh", None),
        ("", "Expected one of {compare, tune, sweep"),
        ("data", "Expected one of {prepare, verify}"),
        ("--", None),
        ("-x", "-x is not an option of normuon"),
        ("--=", None),
        ("bench --shapes", None),
        ("bench --shapes 8x8 --threads 1.5", "--threads 1.5: give an integer"),
        ("train --optimizer.lr abc", None),
        ("doctor extra words", "extra is not a word of normuon doctor"),
        ("inspect", None),
        ("data prepare", None),
        ("data prepare --out", None),
        ("tune --lrs a b", "--lrs a b: give numbers"),
        ("evidence reproduce --seeds 1 x", "--seeds 1 x: give numbers"),
        ("train --betas a b", "--betas a b: give numbers"),
        ("compare --steps 99999999999999999999", "give an integer of at most 9223372036854775807"),
        ("compare --vocab-size -99999999999999999999", "give an integer of at most"),
        ("tune --lrs 1 2 99999999999999999999 --seeds 99999999999999999999", "--seeds 9999"),
        ("evidence reproduce --seeds 0 99999999999999999999", "give numbers within 64 bits"),
        ("train --out=", "--out is empty: give a value, or leave --out out"),
        ("train --model=", "--model is empty"),
        ("compare --tuned=", "--tuned is empty"),
        ("train --dp-shard 0", "--dp-shard 0: give at least 1"),
        ("train --trackers tensorboard tensorboard", "--trackers names tensorboard twice"),
        ("train --data.workers 99999999999", "workers 99999999999: give at most 1,024"),
        ("\udcff", None),
    ],
)
def test_it_is_one_line_and_no_traceback(words: str, said: str | None, capsys) -> None:
    assert main(words.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("normuon: error: ")
    assert lines[0].endswith("--help)")
    if said is not None:
        assert said in lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", ""], "an argument of normuon plan is empty: give a value"),
        (["export", "run", ""], "an argument of normuon export is empty"),
        (["compare", "--data", "a.txt", ""], "an argument of normuon compare is empty"),
        (["train", "--out", ""], "--out is empty: give a value, or leave --out out"),
        (["train", "--preset", ""], "--preset is empty"),
        (["data", "prepare", "stdlib", "--out", ""], "--out is empty"),
    ],
)
def test_an_empty_value_is_not_the_current_folder(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """`--out "$OUT"` with a misspelt variable wrote the run into the current folder."""
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"normuon: error: {said}")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompt_is_a_prompt(tmp_path: Path, capsys) -> None:
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out"), "--prompt", ""]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --num-ranks 4", "--num-ranks goes with --dry-run; torchrun starts the ranks"),
        ("train --mfu 0.5", "--mfu goes with --dry-run"),
        ("train --mfu 2 --dry-run", "--mfu 2.0: give a share of the peak, at most 1"),
        ("bench --shapes 8x8 --seconds 5", "--seconds goes with --suite gpu"),
        ("bench --shapes 8x8 --no-tests", "--no-tests goes with --suite gpu"),
        ("bench --suite gpu --no-peers", "--no-peers is not for --suite gpu"),
        ("bench --suite gpu --repeats 3", "--repeats is not for --suite gpu"),
        ("bench --suite gpu --device cpu --models foo", "foo is neither a preset"),
        ("bench --suite gpu --lr nan", "--lr nan: give a finite number, more than 0"),
        ("compare --seeds 1001", "seeds from 1000 on are for tuning"),
        ("tune --seeds 1001", "--seeds must be at most 1000, got 1001"),
        ("compare --arms adamw --lr adamw=0.1 --tuned x", "--tuned x is not needed: --lr gives"),
        ("train --data.source stream:", "write stream:GLOB"),
        ("data prepare stdlib --out x --shard-tokens 0", "--shard-tokens 0: give at least 1"),
    ],
)
def test_no_option_is_passed_over_in_silence(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("normuon: error: ")
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_the_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"normuon {metadata.version('normuon')}\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    """As `normuon --help | head -1` does."""
    running = subprocess.Popen(
        [*ENTRY, "doctor", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert "Traceback" not in running.stderr.read()
    assert running.wait(timeout=120) == 141


def test_a_reader_that_leaves_a_table_is_no_error() -> None:
    """As `normuon plan gpt2-124m | head -1` does; rich would exit with 1."""
    running = subprocess.Popen(
        [*ENTRY, "plan", "llama-tiny"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == ""
    assert running.wait(timeout=120) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["plan", "llama-tiny"], ["--version"]])
def test_an_output_that_is_full_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*ENTRY, *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert ended.stderr == "normuon: error: No space left on device\n"
    assert ended.returncode == 1


@pytest.mark.parametrize("words", [["--help"], ["plan", "llama-tiny"]])
def test_an_output_in_ascii_is_written(words: list[str]) -> None:
    ended = subprocess.run(
        [*ENTRY, *words],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "40"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.isascii()
    assert ended.stderr == b""
