"""A browser for the tests of the page, and what it saw."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The camera is Chromium's own moving picture, and nobody has to be asked for it.
ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


def lacking(reason: str) -> NoReturn:
    """Skip with ``reason``; with ``FLASHVLM_REQUIRE_BROWSER=1``, fail: a lane must not pass by skipping."""
    if os.environ.get("FLASHVLM_REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def chromium() -> Iterator[Any]:
    """Open Playwright's Chromium where it was fetched, else the one that is installed."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("driving a browser needs Playwright")
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = own if Path(own).is_file() else next(filter(None, map(shutil.which, NAMES)), None)
        if path is None:
            lacking(f"there is no Chromium: none of {', '.join(NAMES)} is on the path")
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """One visit of the page at ``base``, in a browser that knows nothing of earlier ones.

    Attributes:
        asked: bodies of the questions that were sent, in order.
        expected: patterns of console errors that the test provokes.
    """

    page: Any
    base: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    _addresses: list[str] = field(default_factory=list)
    _complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", self._on_request)
        self.page.on("console", lambda message: message.type == "error" and self._note(message.text))
        self.page.on("pageerror", lambda error: self._note(str(error)))

    def _on_request(self, request: Any) -> None:
        self._addresses.append(request.url)
        if request.url.endswith("/chat/completions"):
            self.asked.append(request.post_data_json)

    def _note(self, text: str) -> None:
        self._complaints.append(text)

    def check(self) -> None:
        """Nothing was asked of anybody else, and nothing was complained about, the content security policy included."""
        elsewhere = [
            address
            for address in self._addresses
            if not address.startswith(f"{self.base}/") and urlsplit(address).scheme not in ("data", "blob")
        ]
        assert elsewhere == []
        unexpected = [text for text in self._complaints if not any(re.search(each, text) for each in self.expected)]
        assert unexpected == []
