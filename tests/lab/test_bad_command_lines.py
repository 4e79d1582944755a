"""Command lines that are not understood: one line that names the slip, the mend and the help."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

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
        ("tune --lrs a b", "--lrs"),
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
