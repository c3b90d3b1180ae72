"""Photograph the page of the server in a browser: light, dark, and on a phone."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

BROWSERS = (
    "chromium", "chromium-browser", "google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)  # fmt: skip
FIRST = "Make a JSON object: Simon is 59 years old and lives in Rome."
SECOND = "Solve this Sudoku:\n. . . 4\n. . 1 .\n. 3 . .\n2 . . ."
SEED, STEP = "27", 3  # the demo solves the Sudoku with this seed; the step of its canvas that is shown
VIEWS: dict[str, dict[str, Any]] = {
    "page-light": {"viewport": {"width": 860, "height": 780}},
    "page-dark": {"viewport": {"width": 860, "height": 780}, "color_scheme": "dark"},
    "page-phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "color_scheme": "light"},
}


@contextmanager
def server() -> Iterator[str]:
    """Run a server with the built-in model, and yield its address."""
    command = [sys.executable, "-m", "dgemma_mlx", "serve", "-m", "demo", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = next(filter(None, (re.search(r"http://[\w.:]+", line) for line in process.stderr)), None)
            if found is None:
                sys.exit("the server did not start")
            yield found[0]
        finally:
            process.terminate()


def photograph(browser: Browser, address: str, file: Path, view: dict[str, Any]) -> None:
    """Ask two questions, and take a picture of one step of the second answer."""
    page = browser.new_page(**view)
    page.add_init_script(f"localStorage.setItem('dgemma-settings', JSON.stringify({{ seed: '{SEED}' }}))")
    page.goto(address)
    for number, question in enumerate((FIRST, SECOND), 1):
        page.locator("#words").fill(question)
        page.locator("#words").press("Enter")
        page.locator(".tools:visible").nth(number - 1).wait_for()
    bar = page.get_by_role("slider").last
    bar.press("Home")
    for _ in range(STEP - 1):
        bar.press("ArrowRight")
    bar.evaluate("bar => bar.blur()")
    page.wait_for_function("() => !document.getAnimations().length")
    page.locator("#scroll").evaluate("box => { box.scrollTop = box.scrollHeight; }")
    page.screenshot(path=file)
    page.close()


def main() -> None:
    """Parse the command line and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the PNG files go")
    folder = parser.parse_args().folder
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        sys.exit("there is no Chromium and no Chrome here")
    with server() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        for name, view in VIEWS.items():
            photograph(browser, address, folder / f"{name}.png", view)
        browser.close()


if __name__ == "__main__":
    main()
