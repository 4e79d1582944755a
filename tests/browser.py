"""A real browser for the tests of pages, where there is one."""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
"""Whether the page does not scroll sideways."""


def wait_until(page: Any, expression: str, *, seconds: float = 30.0) -> None:
    """Wait for a JavaScript expression to be true; the pages' policy forbids playwright's own."""
    until = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < until, f"not true within {seconds:g} s: {expression}"
        page.wait_for_timeout(50)
