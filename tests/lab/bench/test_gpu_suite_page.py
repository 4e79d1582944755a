"""The page and the verdict of the suite of one GPU, in a browser where there is one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from normuon_lab.bench.suite.options import (
    MODEL_SHAPES,
    SuiteOptions,
)
from normuon_lab.bench.suite.page import render_page, verdict
from normuon_lab.bench.suite.record import (
    new_record,
    page_path,
)
from tests.browser import CHROMIUM, needs_browser


def test_the_page_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    options = SuiteOptions(out=tmp_path, command="</code><b>x")
    page = render_page(new_record(options, device="cuda", dry_run=False))
    assert "nothing has been measured yet" in page
    assert "</code><b>" not in page


def on_a_gpu(record: dict[str, Any]) -> dict[str, Any]:
    """A dry run's record as a GPU might have left it, with a second race."""
    record = copy.deepcopy(record)
    record["dry_run"] = False
    record["parts"]["machine"]["values"].update(
        name="Some GPU", capability=[9, 0], memory_bytes=80 * 10**9, driver="570.1"
    )
    for model in record["parts"]["step"]["values"]["models"]:
        quick, slow = model["races"]
        for one in quick["contenders"]:
            # A busy CPU's ratios of tiny steps may be any.
            ratio = 1.0 if one["name"] == "NorMuon" else 2.0
            one.update(host_ms=0.25, device_ms=1.5, launches=1234, ratio_to_first=ratio)
        dion = {**quick["contenders"][3], "name": "dion NorMuon", "ratio_to_first": 0.5}
        slow["contenders"] = [{**quick["contenders"][0], "median_ms": 98765.0}, dion]
        del slow["not_run"]["dion NorMuon"]
    return record


def test_a_gpus_page_and_verdict_take_both_races(dry: tuple[dict[str, Any], Path]) -> None:
    record = on_a_gpu(dry[0])
    first, *_ = verdict(record)
    assert first.startswith("On Some GPU, one NorMuon step of llama-1.1b takes ")
    assert "the fastest peer, dion NorMuon, takes 0.50 times that" in first
    page = render_page(record)
    assert "1,234" in page
    assert "compute capability 9.0, 80 GB" in page
    assert page.count(">dion NorMuon</th>") == 2 * len(MODEL_SHAPES)
    assert "98,765" not in page, "the reference of the second race has no line of its own"


@pytest.fixture(scope="module")
def opened(dry: tuple[dict[str, Any], Path]) -> Iterator[tuple[Any, list[str]]]:
    """The dry run's page in a browser, and what it complained about or asked others for."""
    from playwright.sync_api import sync_playwright

    path = page_path(dry[1])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith("data:") or request.url == path.as_uri()
                else complaints.append(request.url)
            ),
        )
        page.goto(path.as_uri())
        yield page, complaints
        browser.close()


@needs_browser
def test_the_page_opens_alone_on_wide_and_narrow_screens_light_and_dark(
    opened: tuple[Any, list[str]], dry: tuple[dict[str, Any], Path]
) -> None:
    page, complaints = opened
    shown = page.locator(".verdict").all_inner_texts()
    assert shown == verdict(dry[0])
    assert shown[0].startswith("Dry run on a CPU")
    assert "one NorMuon step of llama-1.1b takes" in shown[1]
    assert "than with AdamW" in shown[1]
    assert page.locator("#step table").count() == 2 * len(MODEL_SHAPES)
    assert page.locator("#comparison polyline").count() == 2
    median = dry[0]["parts"]["step"]["values"]["models"][0]["races"][0]["contenders"][0]
    assert f"{median['median_ms']:#.4g}" in page.locator("#step tr.first").first.inner_text()
    grounds = []
    for width in (1400, 400):
        for scheme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            scroll, client = page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert scroll <= client
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] == grounds[2] != grounds[1] == grounds[3]
    assert complaints == []
