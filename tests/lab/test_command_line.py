"""The command that goes on with an interrupted one can be typed where the first one was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from normuon_lab.command_line import MAKE_TARGET, command_with, recorded_command


@pytest.fixture(autouse=True)
def _not_under_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MAKE_TARGET, raising=False)


def program(folder: Path, name: str = "normuon") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_program_on_the_path_is_called_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", [str(program(tmp_path)), "compare", "--out", "two words"])
    assert recorded_command() == "normuon compare --out 'two words'"
    assert command_with("--resume") == "normuon compare --out 'two words' --resume"


def test_another_is_called_by_the_path_it_was_called_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment that is not activated, and another normuon on the PATH."""
    program(tmp_path / "elsewhere")
    program(tmp_path, ".venv/bin/normuon")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("sys.argv", [".venv/bin/normuon", "compare", "--resume"])
    assert command_with("--resume") == ".venv/bin/normuon compare --resume"


def test_the_module_is_called_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["/somewhere/normuon_lab/__main__.py", "compare"])
    assert command_with("--resume") == f"{sys.executable} -m normuon_lab compare --resume"


def test_a_run_is_resumed_by_the_program_that_began_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `normuon train` prints after Ctrl-C named a `normuon` that need not be on the PATH."""
    from normuon_lab.train.pretrain.training import _resume_command

    options = "train --config 'a run/config.toml' --out 'a run' --resume auto"
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["/somewhere/normuon_lab/__main__.py", "train"])
    assert _resume_command(Path("a run")) == f"{sys.executable} -m normuon_lab {options}"
    monkeypatch.setattr("sys.argv", [str(tmp_path / "venv" / "normuon"), "train"])
    assert _resume_command(Path("a run")) == f"{tmp_path}/venv/normuon {options}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _resume_command(Path("a run")).startswith("torchrun --nproc-per-node 2 -m normuon_lab")


def test_make_is_called_by_its_target_and_a_shell_gives_the_words_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--out", "two words", "--data", "it's $HOME.txt"]
    monkeypatch.setenv(MAKE_TARGET, "compare")
    monkeypatch.setattr("sys.argv", [".venv/bin/normuon", "compare"])
    assert command_with("--resume") == "make compare ARGS=--resume"
    (tmp_path / "Makefile").write_text("compare:\n\t@printf '%s\\n' $(ARGS)\n")
    again = command_with("--resume", ["compare", *words])
    shown = subprocess.run(
        again, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines() == [*words, "--resume"], again


def test_the_makefile_names_its_target(tmp_path: Path) -> None:
    fake = program(tmp_path)
    fake.write_text(f"#!/bin/sh\necho ${MAKE_TARGET} $@\n")
    (tmp_path / "installed").touch()
    repository = Path(__file__).parents[2]
    shown = subprocess.run(
        ["make", "-s", "compare", f"BIN={tmp_path}", f"LAB={tmp_path}/installed", "ARGS=--resume"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "compare compare --resume\n"
