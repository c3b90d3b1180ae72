"""Images on the page: chosen, pasted or dropped, removed, and sent with a message."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dgemma_mlx import load
from tests.page.conftest import Visit
from tests.server.live import serving
from tests.vision.seeing import png, write_blind, write_seeing

if TYPE_CHECKING:
    from playwright.sync_api import Page

# Dispatches an event of the document with a picture as its only file.
GIVE = """([kind, key, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], "a.png", { type: "image/png" }));
  const type = kind === "paste" ? ClipboardEvent : DragEvent;
  document.dispatchEvent(new type(kind, { [key]: data, bubbles: true, cancelable: true }));
}"""
TEXT = base64.b64encode(png()).decode()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a model that reads images."""
    folder = write_seeing(tmp_path_factory.mktemp("seeing"))
    with serving(lambda: load(folder), max_tokens=4) as address:
        yield address


@pytest.fixture
def blind(tmp_path: Path) -> Iterator[str]:
    """The address of a server with a model that reads no images."""
    folder = write_blind(tmp_path / "blind")
    with serving(lambda: load(folder), max_tokens=4) as address:
        yield address


def choose(page: Page, count: int) -> None:
    """Choose files with the dialog of the browser."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add images").click()
    files: Any = [{"name": f"{number}.png", "mimeType": "image/png", "buffer": png(number)} for number in range(count)]
    chooser.value.set_files(files)


def test_images_go_with_the_next_message_and_stay_in_the_conversation(seeing: str, visit: Visit) -> None:
    page = visit(seeing)
    asked: list[Any] = []
    page.on("request", lambda request: request.method == "POST" and asked.append(request.post_data_json))
    choose(page, 2)
    page.get_by_role("button", name="Remove image 1").click()
    page.evaluate(GIVE, ["paste", "clipboardData", TEXT])
    page.evaluate(GIVE, ["drop", "dataTransfer", TEXT])
    page.get_by_role("button", name="Remove image 3").wait_for()
    box = page.get_by_role("textbox", name="Your message")
    for words in ("What is it?", "Why?"):
        box.fill(words)
        box.press("Enter")
        page.locator("#stop").wait_for(state="hidden")
        page.get_by_text("Finished").wait_for(state="attached")
    assert page.get_by_role("button", name="Remove image").count() == 0
    assert page.locator(".question").first.get_by_role("img").count() == 3
    urls = [f"data:image/png;base64,{base64.b64encode(png(seed)).decode()}" for seed in (1, 0, 0)]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    expected = {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}
    assert [body["messages"][0] for body in asked] == [expected, expected]
    assert asked[1]["messages"][-1] == {"role": "user", "content": "Why?"}


def test_images_go_with_a_text_with_gaps(seeing: str, visit: Visit) -> None:
    page = visit(seeing)
    asked: list[Any] = []
    page.on("request", lambda request: request.method == "POST" and asked.append(request.post_data_json))
    page.get_by_text("Fill in the blanks", exact=True).click()
    choose(page, 1)
    page.get_by_role("button", name="Remove image 1").wait_for()
    page.locator("#words").fill("It is ___:2___.")
    page.get_by_role("button", name="Fill in").click()
    page.get_by_text("Finished").wait_for(state="attached")
    assert asked[0]["images"] == [f"data:image/png;base64,{TEXT}"]


def test_a_model_that_reads_no_images_takes_none(blind: str, visit: Visit) -> None:
    page = visit(blind)
    page.get_by_text("of context").wait_for()
    assert page.get_by_role("button", name="Add images").count() == 0
    page.evaluate(GIVE, ["paste", "clipboardData", TEXT])
    assert page.locator("#pictures img").count() == 0
