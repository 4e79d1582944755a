"""Every path that a command writes to is proved before any work: one line, and nothing is lost."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from normuon_lab.atomic_files import prove_file, prove_folder, write_json
from normuon_lab.cli import main
from normuon_lab.errors import InputError


def test_a_folder_is_made_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    prove_file(tmp_path / "new" / "deeper" / "file.json", "--out file.json")
    assert list((tmp_path / "new" / "deeper").iterdir()) == []
    prove_folder(tmp_path / "new", "--out new")


def test_threads_may_prove_the_same_folder_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: prove_folder(tmp_path / "new", "--out new"), range(400)))
    assert list((tmp_path / "new").iterdir()) == []


def test_threads_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_json(file, {"written by": i}), range(400)))
    assert "written by" in json.loads(file.read_text())
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("the user's")
    with pytest.raises(InputError, match=r"^--out x: .*file is a file, not a folder$"):
        prove_folder(tmp_path / "file" / "deeper", "--out x")
    with pytest.raises(InputError, match=r"^--out x is a folder; give a file$"):
        prove_file(tmp_path, "--out x")
    with pytest.raises(InputError, match=r"^--out x cannot be written: File name too long$"):
        prove_folder(tmp_path / ("a" * 300), "--out x")
    assert (tmp_path / "file").read_text() == "the user's"


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "file.json", tmp_path / "link.json"
    link.symlink_to(target)
    prove_file(link, "--out link.json")
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}


def test_only_a_file_is_replaced(tmp_path: Path) -> None:
    """Renaming onto a device, as root may, would put a file in its place."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"^--out x is a device or a pipe; give a file$"):
        prove_file(tmp_path / "pipe", "--out x")
    with pytest.raises(InputError, match=r"^--out x is a device or a pipe; give a file$"):
        prove_file(Path("/dev/null"), "--out x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match=r"^--out x is a symbolic link that leads to itself$"):
        prove_file(tmp_path / "loop", "--out x")


@pytest.mark.parametrize("words", [["plan", "llama-tiny", "--html"], ["tune", "--out"]])
def test_a_command_replaces_no_pipe(words: list[str], tmp_path: Path, capsys) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert main([*words, str(tmp_path / "pipe")]) == 2
    assert "is a device or a pipe; give a file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


def test_a_storage_of_another_kind_is_one_line(
    tmp_path: Path, tiny_options: list[str], capsys
) -> None:
    storage = tmp_path / "sweep.db"
    storage.write_text("no database at all\n" * 100)
    words = ["sweep", *tiny_options, "--arms", "adamw", "--storage", str(storage)]
    assert main([*words, "--out", str(tmp_path / "sweep.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"--storage {storage} is no database of Optuna: file is not a database")
    assert storage.read_text() == "no database at all\n" * 100


@pytest.mark.parametrize(
    "words",
    [
        ["tune", "--out", "FILE/tuned.json"],
        ["sweep", "--out", "FILE/sweep.json"],
        ["sweep", "--out", "sweep.json", "--storage", "FILE/sweep.db"],
        ["compare", "--out", "FILE/compare"],
        ["bench", "--shapes", "8x8", "--out", "FILE/bench"],
        ["bench", "--suite", "gpu", "--device", "cpu", "--out", "FILE/suite"],
        ["train", "--preset", "llama-tiny", "--out", "FILE/run"],
        ["data", "prepare", "stdlib", "--out", "FILE/data"],
        ["evidence", "run", "--results", "FILE/results"],
        ["evidence", "rivals", "--results", "FILE/results"],
        ["evidence", "table2", "--results", "FILE/results"],
        ["train", "--preset", "llama-tiny", "--data.cache", "FILE/cache", "--out", "run"],
        ["plan", "gpt2-124m", "--mesh", "dp_shard=2", "--html", "FILE/plan.html"],
    ],
    ids=" ".join,
)
def test_a_path_below_a_file_is_refused_before_any_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("the user's")
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("normuon: error: ")
    option = words[next(at for at, word in enumerate(words) if word.startswith("FILE")) - 1]
    assert f"{option} FILE/" in line
    assert Path("FILE").read_text() == "the user's"
    assert {path.name for path in tmp_path.iterdir()} <= {"FILE"}


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.jsonl.gz", "empty.txt"])
def test_empty_files_hold_no_text(name: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert main(["data", "prepare", str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("normuon: error: no text was found in ")


def test_an_empty_file_among_others_is_passed_over(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": "some text"}\n')
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    assert main(["data", "prepare", *files, "--out", str(tmp_path / "out")]) == 0
    assert "1 document in" in capsys.readouterr().out


def test_the_module_says_which_extra_is_missing() -> None:
    """`python -m normuon_lab`, as `normuon` does."""
    code = (
        "import runpy, sys\n"
        "sys.modules['tyro'] = None\n"
        "sys.argv = ['normuon', 'doctor']\n"
        "runpy.run_module('normuon_lab', run_name='__main__')\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 2
    assert found.stderr.strip() == (
        "normuon: error: the normuon command needs tyro: pip install 'normuon[lab]'"
    )
