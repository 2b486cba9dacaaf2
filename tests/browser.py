"""A headless Chromium for tests of pages, and what a page says and asks for while it is open."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
MARKS = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")]


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000)  # as root there is no sandbox
        yield browser
        browser.close()


class Watched:
    """Pages of a test: ``told`` is all that they wrote to the console, threw or asked in dialogs, ``asked`` the addresses they fetched."""

    def __init__(self, browser: Any) -> None:
        self.told, self.asked = list[str](), list[str]()
        self._browser, self._contexts = browser, list[Any]()

    def open(self, address: str, **context: Any) -> Any:
        """A page at ``address``, in a context of its own with these options of playwright."""
        self._contexts.append(self._browser.new_context(**context))
        page = self._contexts[-1].new_page()
        page.on("console", lambda message: self.told.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.told.append(str(error)))
        page.on("dialog", lambda dialog: (self.told.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(address)
        return page

    def close(self) -> None:
        """Close all of them."""
        for context in self._contexts:
            context.close()
