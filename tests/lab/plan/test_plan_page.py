"""The page of `normuon plan`, in a browser where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from normuon_lab.plan.page import buckets_figure, render_page
from tests.browser import CHROMIUM, FITS, needs_browser, wait_until
from tests.lab.plan.planned_models import contents_of

PLOTS = ("work", "sent", "schemes", "buckets")


@pytest.fixture(scope="module")
def contents() -> dict[str, Any]:
    return contents_of("llama-1.1b", "dp_replicate=2,dp_shard=4,tp=2")


def test_what_needs_no_exchange_stands_before_the_first_bucket() -> None:
    contents = contents_of("mixtral-8x7b", "dp_shard=8")
    alone, *others = contents["buckets"]
    assert alone["num_matrices"] == 512
    assert alone["gather_seconds"] == alone["return_seconds"] == 0
    assert len(others) == contents["num_buckets"]
    assert sum(bucket["num_matrices"] for bucket in others) == 4 * 32
    figure = buckets_figure(contents)
    assert list(figure.data[0].x) == list(range(-1, len(others)))
    assert figure.layout.xaxis.ticktext[:2] == ("no exchange", "0")
    assert list(figure.data[1].customdata[0]) == ["no exchange", 512]
    sharded = contents_of("gpt2-124m", "dp_shard=8")
    assert list(buckets_figure(sharded).data[0].x) == list(range(sharded["num_buckets"]))
    assert "Before the first come" not in render_page(sharded, command="normuon plan")


@pytest.fixture(scope="module")
def opened(
    contents: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, list[str]]]:
    """The page in a browser, and everything it complained about or asked others for."""
    from playwright.sync_api import sync_playwright

    path = tmp_path_factory.mktemp("page") / "plan.html"
    path.write_text(render_page(contents, command="normuon plan llama-1.1b"), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        complaints: list[str] = []
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("data:", "blob:")) or request.url == path.as_uri()
                else complaints.append(request.url)
            ),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-plots-drawn]", timeout=30_000, state="attached")
        yield page, complaints
        browser.close()


@needs_browser
def test_the_page_draws_everything_alone_and_without_an_error(
    opened: tuple[Any, list[str]],
) -> None:
    page, complaints = opened
    assert complaints == []
    for plot in PLOTS:
        box = page.locator(f"#{plot} .main-svg").first.bounding_box()
        assert box["width"] > 600, plot
        assert box["height"] > 250, plot
        assert page.locator(f"#{plot} .barlayer .trace").count() >= 2, plot
    # Sixteen ranks, each with a bar of the plan and one of round-robin.
    assert page.locator("#work .barlayer .point").count() == 32


@needs_browser
def test_the_page_says_what_the_json_says(
    opened: tuple[Any, list[str]], contents: dict[str, Any]
) -> None:
    page, _ = opened
    assert page.locator("#digest").inner_text() == contents["digest"]
    row = page.locator("#scheme-table tr[data-scheme=plan]").inner_text()
    assert f"{contents['imbalance']:.3f}" in row
    assert "16 B" in page.locator("#traffic-table").inner_text()
    drawn = page.evaluate("document.getElementById('work').data[0].y")
    assert [y * 1e12 for y in drawn] == pytest.approx(contents["flops_by_rank"], rel=1e-12)


@needs_browser
def test_in_the_dark_all_ink_is_light(opened: tuple[Any, list[str]]) -> None:
    page, complaints = opened
    page.emulate_media(color_scheme="dark")
    wait_until(page, "document.getElementById('work').layout.font.color === '#e6eaef'")
    for plot in PLOTS:
        style = (
            f"getComputedStyle(document.querySelector('#{plot} .xtick text, #{plot} text')).fill"
        )
        assert page.evaluate(style) == "rgb(230, 234, 239)", plot
    page.emulate_media(color_scheme="light")
    wait_until(page, "document.getElementById('work').layout.font.color === '#1f2933'")
    assert complaints == []


@needs_browser
def test_a_narrow_window_does_not_scroll_sideways(opened: tuple[Any, list[str]]) -> None:
    page, complaints = opened
    page.set_viewport_size({"width": 480, "height": 900})
    wait_until(page, FITS)
    assert complaints == []


def test_text_from_a_path_cannot_break_the_page() -> None:
    contents = contents_of("gpt2-124m", "dp_shard=1")
    contents["model"]["name"] = "</script><b>x"
    page = render_page(contents, command="normuon plan </script><b>")
    assert "</script><b>" not in page
