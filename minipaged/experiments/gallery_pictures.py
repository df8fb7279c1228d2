"""Pictures of the gallery's pages, made by Chromium without a window."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1280


@contextmanager
def browser() -> Iterator[Any]:
    """ValueError if there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise ValueError("--pictures: they are made with playwright: pip install playwright") from None
    if found is None:
        raise ValueError(f"--pictures: they are made by a browser, one of {', '.join(NAMES)}, and none of them is here")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--headless=new", "--no-sandbox"])
        yield chromium
        chromium.close()


def picture(chromium: Any, page: Path, height: int) -> Path:
    """NAME.png beside the page, of the step at which it opens; of 256 colours, which takes a third of the bytes.

    ValueError if the page has an error.
    """
    from PIL import Image

    tab = chromium.new_page(viewport={"width": WIDTH, "height": height}, color_scheme="light", reduced_motion="reduce")
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.resolve().as_uri())
    tab.wait_for_timeout(300)
    shot = Image.open(io.BytesIO(tab.screenshot()))
    tab.close()
    if errors:
        raise ValueError(f"{page} doesn't work: {errors[0]}")
    path = page.with_suffix(".png")
    shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path
