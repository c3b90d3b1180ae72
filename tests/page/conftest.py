"""The page in a real browser. Where Chromium or Playwright is missing, these tests are skipped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from dgemma_mlx import Model, load
from dgemma_mlx.model.text import DiffusionGemma
from tests.server.live import serving
from tests.server.scripted import scripted_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = (
    "chromium", "chromium-browser", "google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)  # fmt: skip
PICTURE = "<img src=x onerror=\"document.title='broken into'\"> <b>bold</b>"
LONG = " ".join(str(number) for number in range(3000))

# Opens a page at an address, in a browser with these settings: visit(address, color_scheme="dark").
Visit = Callable[..., "Page"]


class SlowNetwork(DiffusionGemma):
    """The demo's network, whose steps of a single canvas take long enough to be seen."""

    def decode_layers(self, x: Any, *more: Any, **options: Any) -> Any:
        time.sleep(0.15 if x.shape[0] == 1 else 0)
        return super().decode_layers(x, *more, **options)


def slow_demo() -> Model:
    model = load("demo")
    network: Any = model.network
    network.__class__ = SlowNetwork
    return replace(model, network=network)


def script(prompt: str) -> str:
    """Return what the scripted model writes."""
    question = prompt.rsplit("user\n", 1)[1].split("<turn|>")[0]
    if "picture" in question:
        return PICTURE
    if "think" in question:
        return "<|channel>thought\nFirst I look, then I leap.\n<channel|>Done."
    return LONG if "long" in question else f"I heard: {question}"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser without a window."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("Chromium is not here")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def demo() -> Iterator[str]:
    """The address of a server with the demo model, which is slowed down."""
    with serving(slow_demo) as address:
        yield address


@pytest.fixture(scope="session")
def scripted() -> Iterator[str]:
    """The address of a server whose model writes what ``script`` says."""
    with serving(lambda: scripted_model(script)) as address:
        yield address


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """A function that opens the page. At the end, the browser's console must be free of errors and warnings."""
    contexts = []
    problems: list[str] = []

    def open_page(address: str, **settings: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1000, "height": 760}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda line: line.type in ("error", "warning") and problems.append(line.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
