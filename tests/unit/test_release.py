"""What a release says of itself: the changelog, and the versions that are declared and tested."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import normuon

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def matrix() -> list[dict[str, str]]:
    """The pairs of Python and torch that the workflow tests; absent from a source distribution."""
    yaml = pytest.importorskip("yaml")
    path = ROOT / ".github" / "workflows" / "test.yml"
    if not path.exists():
        pytest.skip("no workflow beside these sources")
    workflow: dict[str, Any] = yaml.safe_load(path.read_text())
    include: list[dict[str, str]] = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    return include


def test_the_changelog_has_notes_on_this_version():
    heading = rf"^## \[{re.escape(normuon.__version__)}\] - \d{{4}}-\d\d-\d\d$"
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(heading, changelog, re.MULTILINE)
    assert f'version = "{normuon.__version__}"' in PROJECT


def test_every_python_that_is_declared_is_tested(matrix):
    declared = set(re.findall(r"Python :: (3\.\d+)", PROJECT))
    assert {pair["python"] for pair in matrix} == declared
    assert f'requires-python = ">={min(declared, key=_numbers)}"' in PROJECT


def test_the_oldest_torch_that_is_declared_is_tested(matrix):
    (oldest,) = re.findall(r'dependencies = \["torch>=([\d.]+)"\]', PROJECT)
    tested = sorted((pair["torch"] for pair in matrix), key=_numbers)
    assert tested[0].startswith(f"{oldest}.")
    minors = {_numbers(torch)[1] for torch in tested}
    assert minors == set(range(min(minors), max(minors) + 1))


def test_the_workflow_tests_the_pinned_versions(matrix):
    (pinned,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned in {pair["torch"] for pair in matrix}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
