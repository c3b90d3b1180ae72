"""What people see and do on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.page.conftest import PICTURE, Visit

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

SUDOKU = "Solve this Sudoku:\n. . . 4\n. . 1 .\n. 3 . .\n2 . . ."
SOLVED = "1 2 3 4\n3 4 1 2\n4 3 2 1\n2 1 4 3"  # with seed 6, after some steps
# Notes each state of the cells that is drawn.
WATCH = """() => {
  window.seen = [];
  const look = () => {
    const cells = [...document.querySelectorAll(".answer:last-of-type .cell b")].map((cell) => cell.textContent);
    if (cells.join("") && JSON.stringify(cells) !== JSON.stringify(window.seen.at(-1))) window.seen.push(cells);
  };
  new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


def ask(page: Page, question: str) -> Locator:
    """Ask a question with the keyboard, and return its answer, which is whole."""
    box, answers = page.get_by_role("textbox", name="Your message"), page.get_by_role("article", name="Answer")
    before = answers.count()
    box.fill(question)
    box.press("Enter")
    answers.nth(before).wait_for(state="attached")  # until then, the button to send is still there
    return ended(page)


def ended(page: Page) -> Locator:
    """Wait until the model has finished, and return its latest answer."""
    page.locator("#send").wait_for()
    page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    page.wait_for_function("() => !document.getAnimations().length")
    return page.get_by_role("article", name="Answer").last


def text_of(answer: Locator) -> str:
    return answer.locator(".main-text").inner_text()


def scrub(answer: Locator, step: int) -> None:
    """Move the scrub bar with the keyboard, to a step from 0."""
    bar = answer.get_by_role("slider")
    bar.press("Home")
    for _ in range(step):
        bar.press("ArrowRight")


def setting(page: Page, name: str, value: Any) -> None:
    """Change one of the settings."""
    page.get_by_role("button", name="Settings", exact=True).click()
    field = page.get_by_label(name)
    {"select": field.select_option, "checkbox": field.set_checked}.get(
        field.evaluate("field => field.localName === 'select' ? 'select' : field.type"), field.fill
    )(value)
    page.get_by_role("button", name="Done").click()


def test_the_canvas_is_seen_to_change_until_the_answer_is_right(demo: str, visit: Visit) -> None:
    page = visit(demo)
    page.evaluate(WATCH)
    setting(page, "Seed", "6")
    answer = ask(page, SUDOKU)
    assert text_of(answer) == SOLVED
    seen = page.evaluate("window.seen")
    assert len(seen) > 1 and all(len(cells) == 32 for cells in seen)  # every position keeps its place
    assert seen[-1][:5] == ["1", "2", "3", "4", "↵"]
    numbers = answer.locator(".numbers").inner_text()
    assert "20 tokens" in numbers and "tokens a step" in numbers and "tokens/s" in numbers and "seed 6" in numbers


def test_an_example_is_asked_and_the_conversation_goes_on(scripted: str, visit: Visit) -> None:
    page = visit(scripted)
    asked: list[Any] = []
    page.on("request", lambda request: request.post_data_json and asked.append(request.post_data_json))
    page.get_by_role("button", name="Sort 7 3 5").click()
    assert text_of(ended(page)) == "I heard: Sort 7 3 5"
    assert text_of(ask(page, "And 9?")) == "I heard: And 9?"
    assert [message["content"] for message in asked[-1]["messages"]] == ["Sort 7 3 5", "I heard: Sort 7 3 5", "And 9?"]
    page.get_by_role("button", name="New").click()
    assert page.get_by_role("article", name="Answer").count() == 0
    assert page.get_by_role("heading", name="watch the answer take shape").is_visible()
    ask(page, "Anew")
    assert [message["content"] for message in asked[-1]["messages"]] == ["Anew"]


def test_the_steps_are_played_again(demo: str, visit: Visit) -> None:
    page = visit(demo)
    setting(page, "Seed", "6")
    answer = ask(page, SUDOKU)
    last = int(answer.get_by_role("slider").get_attribute("max") or 0)
    assert last > 1
    canvases = []
    for step in range(last):
        scrub(answer, step)
        assert answer.get_by_role("slider").get_attribute("aria-valuetext") == f"step {step + 1}"
        canvases.append(answer.locator(".cell b").all_inner_texts())
        assert text_of(answer) == ""
    assert len(set(map(tuple, canvases))) > 1
    answer.get_by_role("slider").press("End")
    assert text_of(answer) == SOLVED
    answer.get_by_role("button", name="Replay").click()
    assert answer.locator(".cells").is_visible()
    answer.get_by_role("button", name="Replay").wait_for()  # it is called Pause until the end
    assert text_of(answer) == SOLVED


def test_certainty_and_acceptance_are_shown_without_colour(demo: str, visit: Visit) -> None:
    page = visit(demo)
    setting(page, "Seed", "6")
    answer = ask(page, SUDOKU)
    scrub(answer, 0)
    faint, sure = (
        answer.locator(".cell:not(.e)").evaluate_all(
            f"cells => cells.filter(cell => {accepted}cell.classList.contains('accepted'))"
            ".map(cell => Number(cell.firstChild.style.opacity))"
        )
        for accepted in ("!", "")
    )
    assert faint and sure and min(faint) < 0.8 < sorted(sure)[len(sure) // 2]
    marked = answer.locator(".cell.accepted").first
    assert marked.evaluate("cell => getComputedStyle(cell, '::after').height") == "2px"


@pytest.mark.parametrize("how", ["button", "key"])
def test_an_answer_is_stopped_and_the_next_question_is_answered(how: str, scripted: str, visit: Visit) -> None:
    page = visit(scripted)
    box = page.get_by_role("textbox", name="Your message")
    box.fill("a long one")
    box.press("Enter")
    page.wait_for_function("() => document.querySelector('.main-text').textContent.length > 20")
    if how == "key":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    answer = ended(page)
    kept = text_of(answer)
    assert kept.startswith("0 1 2 3") and not kept.endswith("2999")
    assert "stopped" in answer.locator(".numbers").inner_text()
    assert page.evaluate("document.activeElement.id") == "words"
    assert text_of(ask(page, "next")) == "I heard: next"


def test_text_of_the_model_stays_text(scripted: str, visit: Visit) -> None:
    page = visit(scripted)
    answer = ask(page, "a picture")
    assert text_of(answer) == PICTURE
    scrub(answer, 0)
    question = ask(page, PICTURE + " picture")
    assert page.locator("img").count() == 0 and question.locator("b:not(.cell b)").count() == 0
    assert page.title() == "dgemma-mlx"


def test_a_script_that_is_injected_does_not_run(scripted: str, browser: Any) -> None:
    page = browser.new_page()
    page.goto(scripted)
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.append("document.title = 'broken into'");
      document.body.append(script);
    }""")
    assert page.title() == "dgemma-mlx"
    refused = page.evaluate("() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } }")
    assert refused == "TypeError"
    assert page.evaluate("fetch('https://example.com').then(() => 'reached', () => 'refused')") == "refused"
    page.close()


def test_thinking_is_folded(scripted: str, visit: Visit) -> None:
    page = visit(scripted)
    setting(page, "Think before answering", True)
    answer = ask(page, "think")
    fold = answer.get_by_text("Thought, 6 words")
    assert text_of(answer) == "Done." and not answer.get_by_text("First I look").is_visible()
    fold.click()
    assert answer.get_by_text("First I look, then I leap.").is_visible()


def test_an_answer_follows_the_schema(demo: str, visit: Visit) -> None:
    page = visit(demo)
    setting(page, "JSON schema", '{"enum": ["yes", "no"]')
    box = page.get_by_role("textbox", name="Your message")
    box.fill("Is Rome a city?")
    box.press("Enter")  # the schema is not JSON: the settings open at it
    assert page.get_by_role("dialog").get_by_text("This is not JSON").is_visible()
    assert page.evaluate("document.activeElement.name") == "schema"
    page.keyboard.type("}")
    page.get_by_role("button", name="Done").click()
    assert "JSON schema" in page.get_by_role("button", name="Settings in effect").inner_text()
    box.press("Enter")
    assert text_of(ended(page)) in ('"yes"', '"no"')


def test_settings_stay_and_the_api_key_does_not(scripted: str, visit: Visit) -> None:
    page = visit(f"{scripted}#key=secret")
    assert page.url == f"{scripted}/"
    setting(page, "System prompt", "Be brief.")
    setting(page, "Speed", "fast")
    page.reload()
    assert page.get_by_role("button", name="Settings in effect").inner_text() == "fast · system prompt"
    other = page.context.new_page()
    other.goto(scripted)
    other.get_by_role("button", name="Settings", exact=True).click()
    assert other.get_by_label("System prompt").input_value() == "Be brief."
    assert other.get_by_label("API key").input_value() == ""


def test_errors_of_the_server_are_shown(scripted: str, visit: Visit, browser: Any) -> None:
    page = browser.new_page()  # its console tells of the status 400
    page.goto(scripted)
    answer = ask(page, "x " * 200_000)
    assert "tokens" in answer.get_by_role("alert").inner_text()
    assert text_of(ask(page, "next")) == "I heard: next"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str, scripted: str, visit: Visit) -> None:
    page = visit(scripted, color_scheme=scheme)
    pairs = [("--ink", "--paper"), ("--soft", "--paper"), ("--soft", "--card"), ("--on-accent", "--accent"),
             ("--bad", "--paper"), ("--ink", "--mark"), ("--ink", "--card")]  # fmt: skip
    for text, ground in pairs:
        ratio = page.evaluate(
            """([a, b]) => {
              const light = (name) => {
                const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim().slice(1);
                const parts = hex.length === 3 ? [...hex].map((c) => c + c) : hex.match(/../g);
                const [r, g, b] = parts.map((part) => parseInt(part, 16) / 255)
                  .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const [high, low] = [light(a), light(b)].sort((x, y) => y - x);
              return (high + 0.05) / (low + 0.05);
            }""",
            [text, ground],
        )
        assert ratio >= 4.5, (text, ground, ratio)


def test_nothing_moves_for_those_who_do_not_want_it(demo: str, visit: Visit) -> None:
    page = visit(demo, reduced_motion="reduce")
    page.evaluate("""() => {
      window.animated = 0;
      const animate = Element.prototype.animate;
      Element.prototype.animate = function (...all) { window.animated += 1; return animate.apply(this, all); };
    }""")
    assert text_of(ask(page, "Sort 7 3 5")) == "3 5 7"
    assert page.evaluate("window.animated") == 0 and page.locator(".ghost").count() == 0


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_needs_no_sideways_scrolling(width: int, scripted: str, visit: Visit) -> None:
    page = visit(scripted, viewport={"width": width, "height": 700}, has_touch=True)
    for look in ("empty", "answer", "settings"):
        if look == "answer":
            scrub(ask(page, "echo " + "w" * 300), 0)
        elif look == "settings":
            page.get_by_role("button", name="Settings", exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, look
        assert page.evaluate("document.querySelector('main').scrollWidth") <= width, look
        small = page.locator("button:visible:not(.foot button)").evaluate_all(
            "all => all.filter((one) => one.getBoundingClientRect().height < 39.5).map((one) => one.textContent)"
        )
        assert small == [], look


def test_the_page_is_used_with_the_keyboard_alone(demo: str, visit: Visit) -> None:
    page = visit(demo)
    page.wait_for_function("() => document.activeElement?.localName === 'textarea'")  # it takes the focus by itself
    page.keyboard.type("Sort 7 3 5")
    page.keyboard.press("Enter")
    answer = page.get_by_role("article", name="Answer").last
    answer.locator(".main-text", has_text="3 5 7").wait_for()  # the button to send may still be there at first
    ended(page)
    names = []
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        names.append(page.evaluate("(document.activeElement.ariaLabel ?? document.activeElement.textContent).trim()"))
        if names[-1] == "New":
            break
    assert {"Copy", "Steps of this answer", "▶ Replay", "Settings", "New"} <= set(names)


def test_a_screen_reader_hears_the_answer_and_not_the_canvas(demo: str, visit: Visit) -> None:
    page = visit(demo)
    answer = ask(page, "Sort 7 3 5")
    assert "Finished: " in page.locator("#status[role=status]").inner_text()
    assert answer.locator(".main-text").get_attribute("aria-live") == "polite"
    scrub(answer, 0)
    assert answer.locator(".cells").get_attribute("aria-hidden") == "true"


def test_the_page_leaves_nothing_running_at_the_server(scripted: str, visit: Visit) -> None:
    page = visit(scripted)
    box = page.get_by_role("textbox", name="Your message")
    box.fill("a long one")
    box.press("Enter")
    page.wait_for_function("() => document.querySelector('.main-text').textContent.length > 20")
    page.close()
    body = {"messages": [{"role": "user", "content": "next"}]}
    found = httpx.post(f"{scripted}/v1/chat/completions", json=body, timeout=20).json()
    assert found["choices"][0]["message"]["content"] == "I heard: next"


def test_gaps_are_filled_and_the_text_around_them_is_kept(demo: str, visit: Visit) -> None:
    page = visit(demo)
    page.get_by_text("Fill in the blanks", exact=True).click()
    page.get_by_role("textbox", name="What to tell the model").fill(
        "Make a JSON object: Simon is 59 years old and lives in Rome."
    )
    setting(page, "Seed", "1")
    page.get_by_role("textbox", name="A text with gaps").fill('{"name": "Simon", "age": ___, "city": "Rome"}')
    page.get_by_role("button", name="Fill in").click()
    answer = ended(page)
    assert text_of(answer) == '{"name": "Simon", "age": 59, "city": "Rome"}'
    assert answer.locator("mark").all_inner_texts() == ["59"]
    others = answer.get_by_role("radio")
    assert others.count() > 1 and others.first.is_checked()
    others.nth(1).check()
    changed = text_of(answer)
    assert changed != '{"name": "Simon", "age": 59, "city": "Rome"}' and changed.endswith('"city": "Rome"}')
    assert "canvases tried" in answer.locator(".numbers").inner_text()
    scrub(answer, 1)
    pinned = answer.locator(".cell.p")
    assert [text for text in pinned.all_inner_texts() if text.isalpha()] == ["city", "R", "ome"]
    others.first.check()
    assert text_of(answer) == '{"name": "Simon", "age": 59, "city": "Rome"}'
    assert not answer.locator(".cells").is_visible()


def test_the_model_is_named(scripted: str, visit: Visit) -> None:
    page = visit(scripted)
    page.get_by_text("demo, 4,096 tokens of context").wait_for()
