"""The rule that turns numbers into verdicts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from normuon_lab.study.evidence.verdicts import (
    Finding,
    Verdict,
    overall,
    verdict_by_count,
    verdict_in_cell,
)

SHOWN = Finding(estimate=12.0, low=9.0, high=15.0, p_value=0.001)


@pytest.mark.parametrize(
    ("change", "paper_value", "expected"),
    [
        ({}, 12.0, Verdict.REPRODUCED),
        ({}, 12.1, Verdict.WEAKER),
        ({"high": None}, 10.0, Verdict.REPRODUCED),
        # The interval holds zero, is open below, or is on the other side.
        ({"low": -0.1}, 10.0, Verdict.NOT_REPRODUCED),
        ({"low": None}, 10.0, Verdict.NOT_REPRODUCED),
        ({"estimate": -12.0, "low": -15.0, "high": -9.0}, -20.0, Verdict.NOT_REPRODUCED),
        # The two tests must agree.
        ({"p_value": 0.05}, 10.0, Verdict.NOT_REPRODUCED),
        ({"p_value": None}, 10.0, Verdict.NOT_REPRODUCED),
        ({"low": None, "high": None}, 10.0, Verdict.NOT_REPRODUCED),
        ({"estimate": None}, 0.0, Verdict.NOT_REPRODUCED),
        ({"was_run": False}, 10.0, Verdict.NOT_RUN),
    ],
)
def test_in_one_cell(change: dict[str, object], paper_value: float, expected: Verdict) -> None:
    assert verdict_in_cell(replace(SHOWN, **change), paper_value=paper_value) is expected


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], Verdict.NOT_RUN),
        ([Verdict.NOT_RUN], Verdict.NOT_RUN),
        ([Verdict.REPRODUCED, Verdict.NOT_RUN], Verdict.REPRODUCED),
        ([Verdict.REPRODUCED, Verdict.WEAKER], Verdict.WEAKER),
        ([Verdict.REPRODUCED, Verdict.NOT_REPRODUCED], Verdict.WEAKER),
        ([Verdict.WEAKER, Verdict.NOT_REPRODUCED], Verdict.WEAKER),
        ([Verdict.NOT_REPRODUCED] * 2, Verdict.NOT_REPRODUCED),
        ([Verdict.NOT_TESTABLE], Verdict.NOT_TESTABLE),
    ],
)
def test_over_cells(verdicts: list[Verdict], expected: Verdict) -> None:
    assert overall(verdicts) is expected


def test_counts() -> None:
    found = [verdict_by_count(count, 4) for count in range(5)]
    assert found == [Verdict.NOT_REPRODUCED] * 3 + [Verdict.WEAKER, Verdict.REPRODUCED]
    assert verdict_by_count(0, 0) is Verdict.NOT_RUN
