"""Committed text that is drawn as Markdown."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest

from dgemma_mlx.cli.render.live import LiveView
from dgemma_mlx.cli.render.markdown import MarkdownText
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.text import Tokenizer
from tests.cli.synthetic import EOS_IDS, answer
from tests.cli.terminal import ScreenStream, Terminal
from tests.cli.test_remote_chat import choice, foreign, sent

CODES = re.compile(r"\x1b\[[\d;]*m")
TEXT = """# A title
Some **bold** words, `code`, [a link](http://x.y/z) and <http://auto.z>.
The next line & <b>HTML</b> &amp; such.

1 2 3 4
  3 4 1 2

- one
- two
  ```py
  x = "nested"
  ```

| a | b |
|---|--:|
| 1 | 与字 |

```python
def f(x):
\treturn [x, "text", 12]  # why

class A: pass
```
> quoted

---
[ref]: http://nowhere
Price: $5 and $10, \\(a_1 * b * c\\), $x*y*z$ and __init__.py
"""


def drawn(text: str, columns: int = 80, part: int = 10_000) -> str:
    parts = MarkdownText()
    done = "".join(parts.add(visible(text[at : at + part]), columns) for at in range(0, len(text), part))
    return done + parts.finish(columns)


def plain(text: str, columns: int = 80) -> str:
    return CODES.sub("", drawn(text, columns))


def test_a_document() -> None:
    assert plain(TEXT, 40) == """A title
Some bold words, code, a link (http://x.y/z) and http://auto.z.
The next line & <b>HTML</b> & such.

1 2 3 4
  3 4 1 2

 • one
 • two
   x = "nested"

 a     b
 ───────
 1  与字

def f(x):
\treturn [x, "text", 12]  # why

class A: pass
▌ quoted

---------------------------------------
[ref]: http://nowhere
Price: $5 and $10, \\(a_1 * b * c\\), $x*y*z$ and __init__.py
"""


def test_markup_and_code_have_styles() -> None:
    assert drawn("**b** and *i*") == "\x1b[1mb\x1b[0m and \x1b[3mi\x1b[0m\n"
    assert "\x1b[35mdef\x1b[0m" in drawn("```python\ndef f(): 0\n```")
    assert drawn("```nolanguage\ndef\n```") == "def\n"


@pytest.mark.parametrize("part", [1, 3, 7, 40])
def test_it_does_not_matter_how_the_text_arrives(part: int) -> None:
    assert drawn(TEXT, part=part) == drawn(TEXT)


@pytest.mark.parametrize("seed", range(5))
def test_any_text_can_be_drawn_and_no_word_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    pieces = ["word", " ", "\n", "\n\n", "# ", "* ", "1. ", "```", "`", "**", "_", "| ", "|--", "> ", "<a>", "$",
              "    ", "\t", "[x](y)", "![i](j)", "&#27;", "\x1b[2J", "\\", "你", "---\n", "~~a~~"]  # fmt: skip
    for _ in range(60):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 60)))
        shown = CODES.sub("", drawn(text, rng.randint(1, 60), rng.randint(1, 30)))
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
        assert len(re.findall("[word你]", shown)) >= len(re.findall("[word你]", re.sub(r"`{3,}[^`\n]*", "", text)))


def test_what_is_not_complete_is_pending() -> None:
    parts = MarkdownText()
    assert parts.add("Done.\n\n* one\n* tw", 80) == "Done.\n\n"
    assert parts.pending == "* one\n* tw"
    assert CODES.sub("", parts.add("o\n\nNext", 80) + parts.finish(80)) == " • one\n • two\n\nNext\n"
    assert parts.add("```py\nx = 1\ny =", 80) == CODES.sub("", "x = ") + "\x1b[36m1\x1b[0m\n"
    assert parts.pending == "y ="


@pytest.mark.parametrize("columns", [80, 40])
def test_the_screen_shows_the_answer_as_markdown(tokenizer: Tokenizer, columns: int) -> None:
    stream = ScreenStream(columns, 70)
    with LiveView(stream, tokenizer, EOS_IDS, markdown=True) as view:  # type: ignore[arg-type]
        for event in answer(tokenizer, tokenizer.encode(TEXT)):
            view(event)
    assert stream.screen.text == plain(TEXT, columns).rstrip("\n").replace("\t", " " * 8)
    assert stream.screen.is_sane


def test_without_markdown_the_answer_stays_as_it_is(tokenizer: Tokenizer) -> None:
    stream = ScreenStream()
    with LiveView(stream, tokenizer, EOS_IDS) as view:  # type: ignore[arg-type]
        for event in answer(tokenizer, tokenizer.encode("**as it is**")):
            view(event)
    assert stream.screen.text == "**as it is**"


def test_nothing_is_imported_for_markdown_before_a_canvas_is_committed() -> None:
    program = """
import sys
from pathlib import Path
from dgemma_mlx.cli.render.live import LiveView
from tests.cli.synthetic import EOS_IDS, draft
from tests.cli.terminal import ScreenStream, Terminal
from tests.cli.test_remote_chat import choice, foreign, sent

class Tokens:
    special_ids = {}
    def token_bytes(self, id): return b"x"

with LiveView(ScreenStream(), Tokens(), EOS_IDS, markdown=True) as view:
    view(draft([2, 3]))
    assert "markdown_it" not in sys.modules and "rich.markdown" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({}, "bold"), ({"DGEMMA_MARKDOWN": "false"}, "**bold**"), ({"NO_COLOR": "1"}, "**bold**"),
        ({"TERM": "dumb"}, "**bold**"),
    ],
)  # fmt: skip
def test_chat_draws_markdown_unless_a_setting_or_the_terminal_forbids_it(variables: dict[str, str], shown: str) -> None:
    with (
        foreign((200, sent(choice(content="Some **bold** words.\n"), choice("stop")))) as (url, _),
        Terminal(["chat", "--url", url], env=variables) as terminal,
    ):
        terminal.wait_for_text(">>>")
        terminal.type("Hello\r")
        terminal.wait_for_text(f"Some {shown} words.")
        assert ("\x1b[1mbold\x1b[0m" in terminal.output.decode()) == (not variables)


def test_what_matches_a_constraint_is_not_changed() -> None:
    arguments = ["generate", "-m", "demo", "--regex", r"\*\*ok\*\*", "--seed", "1", "Say it."]
    with Terminal(arguments) as terminal:
        assert terminal.finish() == 0
        assert "**ok**" in terminal.text


WIDE = "| a | b |\n|---|---|\n| /usr/local/lib/python3.12/site-packages/constants.py | https://example.org/a/b/c/d |\n"


def test_cells_that_are_too_wide_are_folded() -> None:
    rows = plain(WIDE, 60).splitlines()
    assert max(map(len, rows)) < 60 and len(rows) > 3
    assert sorted(filter(str.isalnum, plain(WIDE, 60))) == sorted(filter(str.isalnum, WIDE))


@pytest.mark.parametrize(
    "text",
    [
        "|" + " a |" * 30 + "\n|" + "---|" * 30 + "\n|" + " word |" * 30 + "\n",
        "| a | b |\n|---|---|\n| 1 | 2 | 3 |\n", "| a |\n|---|\n| `x | y` | z |\n", "- \n- \n", "3. x\n5. y\n",
        'a [link](http://x.y "its title") b\n',
    ],
)
def test_what_would_lose_a_part_stays_as_it_is_written(text: str) -> None:
    assert drawn(text) == text


def test_items_keep_the_dot_of_their_numbers_and_code_in_them_its_colours() -> None:
    assert plain("1. one\n2. two\n") == " 1. one\n 2. two\n"
    assert plain("9. one\n10. two\n") == "  9. one\n 10. two\n"
    assert "\x1b[36m1\x1b[0m" in drawn("- use\n  ```python\n  x = 1\n  ```\n- b\n")
