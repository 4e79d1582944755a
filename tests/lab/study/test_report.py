"""The report in a real browser: it draws everything, alone, and says what results.json says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from normuon_lab.study.compare.report import render_report
from normuon_lab.study.compare.results import Results
from tests.lab.conftest import Outcome

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

PLOTS = ("loss-steps", "loss-seconds", "final-loss", "singular-values", "row-norms")


@dataclass
class OpenedPage:
    """A page and everything it complained about or asked for."""

    page: Any
    console_errors: list[str] = field(default_factory=list)
    page_errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def opened(tiny_comparison: tuple[Path, Outcome]) -> Iterator[OpenedPage]:
    from playwright.sync_api import sync_playwright

    report = tiny_comparison[0] / "report.html"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        opened = OpenedPage(page)
        page.on(
            "console",
            lambda message: (
                opened.console_errors.append(message.text)
                if message.type in ("error", "warning")
                else None
            ),
        )
        page.on("pageerror", lambda error: opened.page_errors.append(str(error)))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto(report.as_uri())
        page.wait_for_selector("body[data-plots-drawn]", timeout=30_000, state="attached")
        yield opened
        browser.close()


@needs_browser
def test_it_draws_without_an_error_and_asks_nobody(
    opened: OpenedPage, tiny_comparison: tuple[Path, Outcome]
) -> None:
    assert opened.page_errors == []
    assert opened.console_errors == []
    others = [url for url in opened.requests if not url.startswith(("data:", "blob:"))]
    assert others == [(tiny_comparison[0] / "report.html").as_uri()]


@needs_browser
@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_shows_every_arm(opened: OpenedPage, plot: str) -> None:
    box = opened.page.locator(f"#{plot} .main-svg").first.bounding_box()
    assert box is not None
    assert box["width"] > 600
    assert box["height"] > 250
    assert opened.page.locator(f"#{plot} .scatterlayer .trace").count() >= 3
    titles = opened.page.locator(f"#{plot} .ytitle").all_text_contents()
    assert titles
    assert all(title.strip() for title in titles)


@needs_browser
def test_an_arm_has_the_same_colour_in_every_plot(opened: OpenedPage) -> None:
    colours = opened.page.evaluate(
        """(names) => names.map((name) => Object.fromEntries(
            document.getElementById(name).data
              .filter((trace) => trace.name && trace.line && trace.line.color)
              .map((trace) => [trace.name, trace.line.color])))""",
        [plot for plot in PLOTS if plot != "final-loss"],
    )
    assert all(found == colours[0] for found in colours)
    assert set(colours[0]) == {"AdamW", "Muon", "NorMuon"}
    assert len(set(colours[0].values())) == 3


@needs_browser
def test_the_table_says_what_the_results_say(
    opened: OpenedPage, tiny_comparison: tuple[Path, Outcome]
) -> None:
    results = json.loads((tiny_comparison[0] / "results.json").read_text())
    comparisons = {
        c["arm"]: c for c in results["analysis"]["comparisons"] if c["baseline"] == "adamw"
    }
    for arm in results["config"]["arms"]:
        row = opened.page.locator(f"#efficiency tr[data-arm={arm}]").inner_text()
        finals = [run["final_loss"] for run in results["runs"] if run["arm"] == arm]
        assert f"{sum(finals) / 2:.4f}" in row
        if arm in comparisons:
            loss = comparisons[arm]["loss_difference"]
            assert f"{loss['mean']:+.4f} [{loss['low']:+.4f}, {loss['high']:+.4f}]" in row
            saved = comparisons[arm]["fewer_steps_percent"]
            if saved["mean"] is not None:
                assert f"{saved['mean']:.1f}% [{saved['low']:.1f}, {saved['high']:.1f}]" in row
    assert opened.page.locator("#corpus-digest").inner_text() == results["corpus"]["sha256"]


@needs_browser
def test_layer_buttons_and_narrow_windows_work(opened: OpenedPage) -> None:
    opened.page.locator("#row-norms .updatemenu-button").first.click()
    opened.page.set_viewport_size({"width": 480, "height": 900})
    opened.page.wait_for_timeout(300)
    scroll, client = opened.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert scroll <= client
    assert opened.page_errors == []


def test_a_partial_comparison_is_called_partial(tiny_comparison: tuple[Path, Outcome]) -> None:
    values = json.loads((tiny_comparison[0] / "results.json").read_text())
    values["runs"] = [run for run in values["runs"] if run["arm"] != "normuon"]
    values["runs"][0]["final_loss"] = None
    page = render_report(Results.from_json(values))
    assert "Only 4 of 6 runs are finished." in page
    assert "diverged with seed" in page
    assert "not run" in page


def test_text_from_the_results_cannot_break_the_page(
    tiny_comparison: tuple[Path, Outcome],
) -> None:
    values = json.loads((tiny_comparison[0] / "results.json").read_text())
    values["corpus"]["name"] = "</script><b>x"
    page = render_report(Results.from_json(values))
    assert "</script><b>" not in page
