"""Chromium without a window, for the tests of pages; they are skipped where there is none."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """The browser; where there is none, whoever asks for it is skipped."""
    api = pytest.importorskip("playwright.sync_api", reason="pages are tested with playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"pages are tested in a browser, one of {', '.join(NAMES)}, and none of them is here")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--headless=new", "--no-sandbox"])
        yield browser
        browser.close()


class Tabs:
    """Opens tabs, and keeps what went wrong in them: errors, warnings, requests to anybody but their own page."""

    def __init__(self, browser: Any):
        self._browser, self._contexts, self.wrong = browser, list[Any](), list[str]()

    def open(self, url: str, fake_clock: bool = False, **options: Any) -> Any:
        """A tab that shows what is at `url`. fake_clock: time stands, unless the test moves it."""
        context = self._browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self._contexts.append(context)
        mine = url.split("#")[0]
        context.on("request", lambda one: None if one.url.startswith((mine, "data:")) else self.wrong.append(one.url))
        page = context.new_page()
        page.set_default_timeout(20000)
        page.on("console", lambda told: self.wrong.append(told.text) if told.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("websocket", lambda socket: self.wrong.append(socket.url))
        page.on("popup", lambda popup: self.wrong.append(f"a popup: {popup.url}"))
        page.on("dialog", lambda dialog: (self.wrong.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        if fake_clock:
            page.clock.install(time=0)
        page.goto(url)
        if fake_clock:
            page.clock.pause_at(60)
        return page

    def close(self) -> None:
        """Whatever went wrong is an error now."""
        for context in self._contexts:
            context.close()
        wrong, self.wrong = self.wrong, []
        assert wrong == [], wrong


def until(what: Callable[[], Any], seconds: float = 10) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it doesn't come true"
        time.sleep(0.02)
    return found
