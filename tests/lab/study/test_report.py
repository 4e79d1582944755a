"""The report in a real browser: it draws everything, alone, and says what results.json says."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from normuon_lab.study.compare.report import render_report, standing, verdict
from normuon_lab.study.compare.results import Results
from normuon_lab.study.statistics.estimates import Estimate, t_interval
from tests.browser import CHROMIUM, FITS, needs_browser, wait_until
from tests.lab.conftest import Outcome

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
@pytest.mark.parametrize("width", [1400, 400])
def test_in_the_dark_all_ink_is_light(opened: OpenedPage, width: int) -> None:
    page = opened.page
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme="dark")
    wait_until(page, "document.getElementById('loss-steps').layout.font.color === '#e6eaef'")
    background = "getComputedStyle(document.querySelector('section')).backgroundColor"
    assert page.evaluate(background) == "rgb(29, 36, 44)"
    for plot in PLOTS:
        style = f"getComputedStyle(document.querySelector('#{plot} .ytitle')).fill"
        assert page.evaluate(style) == "rgb(230, 234, 239)", plot
    page.emulate_media(color_scheme="light")
    wait_until(page, "document.getElementById('loss-steps').layout.font.color === '#1f2933'")
    page.set_viewport_size({"width": 1280, "height": 900})
    assert opened.page_errors == []


@needs_browser
def test_in_a_narrow_window_panels_stand_one_below_the_other(opened: OpenedPage) -> None:
    page = opened.page
    page.set_viewport_size({"width": 400, "height": 900})
    wait_until(page, "document.getElementById('final-loss').layout.xaxis.domain[1] === 1")
    for plot in ("final-loss", "singular-values", "row-norms"):
        boxes = [
            box.bounding_box() for box in page.locator(f"#{plot} .plot .xy, #{plot} .bg").all()
        ]
        tops = [box["y"] for box in boxes if box is not None]
        assert len(set(tops)) == len(tops) > 1, plot
    page.set_viewport_size({"width": 1280, "height": 900})
    wait_until(page, "document.getElementById('final-loss').layout.xaxis.domain[1] < 0.5")


@needs_browser
def test_layer_buttons_and_narrow_windows_work(opened: OpenedPage) -> None:
    opened.page.locator("#row-norms .updatemenu-button").first.click()
    opened.page.set_viewport_size({"width": 480, "height": 900})
    wait_until(opened.page, FITS)
    assert opened.page_errors == []


def test_a_partial_comparison_is_called_partial(tiny_comparison: tuple[Path, Outcome]) -> None:
    values = json.loads((tiny_comparison[0] / "results.json").read_text())
    values["runs"] = [run for run in values["runs"] if run["arm"] != "normuon"]
    values["runs"][0]["final_loss"] = None
    page = render_report(Results.from_json(values))
    assert "Only 4 of 6 runs are finished." in page
    assert "diverged with seed" in page
    assert "not run" in page


def with_interval(low: float, high: float) -> Estimate:
    return Estimate(values=(low, high), mean=(low + high) / 2, low=low, high=high)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 2.0, "better"),
        (-2.0, -1.0, "worse"),
        (-1.0, 2.0, "too close to call"),
        (0.0, 2.0, "too close to call"),
        (0.04, 2.0, "too close to call"),  # It is printed as 0.0.
        (0.06, 2.0, "better"),
    ],
)
def test_an_interval_that_touches_zero_is_too_close_to_call(
    low: float, high: float, expected: str
) -> None:
    assert standing(with_interval(low, high), digits=1) == expected
    mirrored = with_interval(-high, -low)
    assert standing(mirrored, digits=1, less_is_better=True) == expected


def test_one_seed_has_no_standing() -> None:
    assert standing(t_interval([3.0]), digits=1) == "too close to call"


def test_the_verdict_says_what_the_results_say(tiny_comparison: tuple[Path, Outcome]) -> None:
    values = json.loads((tiny_comparison[0] / "results.json").read_text())
    results = Results.from_json(values)
    page = render_report(results)
    assert html.escape(verdict(results), quote=False).replace("'", "&#39;") in page
    assert verdict(results).startswith(("NorMuon", "Whether NorMuon"))
    assert "its final loss against Muon's is" in verdict(results)
    values["runs"] = [run for run in values["runs"] if run["arm"] == "adamw"]
    unfinished = Results.from_json(values)
    assert verdict(unfinished) == "No seed is finished with two optimizers yet."


def test_text_from_the_results_cannot_break_the_page(
    tiny_comparison: tuple[Path, Outcome],
) -> None:
    values = json.loads((tiny_comparison[0] / "results.json").read_text())
    values["corpus"]["name"] = "</script><b>x"
    page = render_report(Results.from_json(values))
    assert "</script><b>" not in page
