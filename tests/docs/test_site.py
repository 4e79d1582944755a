"""The documentation site, opened from a disk: links, search, and the pages of the reference."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.browser import CHROMIUM, needs_browser
from tests.docs.test_docs import DOCS, ROOT

LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src"}
"""Elements that lead elsewhere, and the attribute that says where."""


@dataclass
class Page(HTMLParser):
    """What a page links to, what it loads, and its anchors.

    Attributes:
        links: what its elements name, with the element.
        anchors: every ``id`` in it.
    """

    links: list[tuple[str, str]] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        target = values.get(LINKS.get(tag, ""))
        if target is not None:
            self.links.append((tag, target))
        self.anchors.update(value for value in (values.get("id"), values.get("name")) if value)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    """Every page but the one that only a server shows."""
    found = {}
    for path in site.rglob("*.html"):
        if path.name != "404.html":
            found[path] = Page()
            found[path].feed(path.read_text())
    assert len(found) == len(list(DOCS.rglob("*.md")))
    return found


def test_every_link_from_a_disk_leads_to_a_file_and_its_anchor(site, pages):
    """A server would answer a link to a folder; a browser that reads a disk lists the folder."""
    broken = []
    for path, page in pages.items():
        for _, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            anchors = pages[target].anchors if target in pages else {parts.fragment}
            if not target.is_file() or not {parts.fragment} <= {"", "__skip", *anchors}:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 50 * len(pages) > 0


def test_nothing_is_loaded_from_elsewhere(pages):
    loaded = {link for page in pages.values() for tag, link in page.links if tag != "a"}
    assert loaded
    assert {link for link in loaded if urlsplit(link).netloc} == set()


def test_the_search_index_is_a_script_that_pages_on_a_disk_may_load(site):
    script = (site / "search" / "search_index.js").read_text()
    assert script.startswith("var __index = ")
    index = json.loads(script.removeprefix("var __index = "))
    locations = {entry["location"].partition("#")[0] for entry in index["docs"]} - {""}
    assert "reference/optimizer.html" in locations
    assert all((site / location).is_file() for location in locations)


def test_the_reference_shows_values_and_examples_as_code(site):
    """Not the names of constants, nor an example's lines as one paragraph of quotations."""
    for path in (site / "reference").glob("*.html"):
        page = path.read_text()
        source = (DOCS / "reference" / f"{path.stem}.md").read_text()
        for name in re.findall(r"^::: (\S+)", source, re.MULTILINE):
            assert f'id="{name}"' in page
        text = re.sub(r"<[^>]+>", "", page)
        assert "::" not in text.replace("::1", "")
        assert "&gt;&gt;&gt;" not in re.sub(r"<code>.*?</code>", "", page, flags=re.DOTALL)
        assert "<blockquote>" not in page
        assert not re.search(r"DEFAULT_[A-Z]", text)
    optimizer = (site / "reference" / "optimizer.html").read_text()
    assert 'id="normuon.NorMuon.step"' in optimizer
    text = re.sub(r"<[^>]+>", "", optimizer)
    assert "bucket_bytes: int = 256 * 1024 * 1024" in text
    assert "&quot;kernels&quot;, &quot;triton&quot;" in text.replace('"', "&quot;")


@dataclass
class Opened:
    """A page in a browser, and everything it complained about or asked of a network."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def opened(site) -> Iterator[Opened]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = Opened(browser.new_page(viewport={"width": 1400, "height": 900}))
        opened.page.on(
            "console",
            lambda message: (
                opened.complaints.append(message.text)
                if message.type in ("error", "warning")
                else None
            ),
        )
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.on("requestfailed", lambda request: opened.complaints.append(request.url))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.goto((site / "index.html").as_uri())
        yield opened
        browser.close()


@needs_browser
def test_a_browser_searches_and_follows_links_from_a_disk(opened, site):
    page = opened.page
    page.click("nav.md-nav--primary a:has-text('Schedule the learning rate')")
    assert page.url == (site / "how-to" / "schedules.html").as_uri()
    page.click("input.md-search__input")
    page.keyboard.type("describe_groups", delay=30)  # The page reads keys, and may still load.
    result = page.locator("a.md-search-result__link").first
    result.wait_for(timeout=100_000)
    result.click()
    page.wait_for_url("**/reference/groups.html**")
    assert page.is_visible("h1:has-text('Groups and views')")
    assert opened.complaints == []
    assert {url for url in opened.requests if not url.startswith(("file:", "data:"))} == set()
