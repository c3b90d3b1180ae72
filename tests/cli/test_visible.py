"""Model text on a terminal: it cannot control the terminal, and rows break where terminals break them."""

from __future__ import annotations

import json
import random
import sys
import unicodedata

import pytest

from dgemma_mlx.cli.render.visible import cells, json_line, visible, wrap
from tests.cli.terminal import laid_out

ALL = "".join(map(chr, range(sys.maxunicode + 1)))
SHOWN = visible(ALL)
BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def test_no_character_of_unicode_can_control_a_terminal() -> None:
    shown = set(SHOWN)
    assert {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} == {"\n", "\t"}
    assert not {c for c in shown if unicodedata.bidirectional(c) in BIDI}
    shown_as_utf_8 = "".join(shown).encode()
    assert not {byte for byte in shown_as_utf_8 if byte < 0x20} - {0x09, 0x0A}


def test_every_character_leaves_something_to_see_and_harmless_ones_are_unchanged() -> None:
    assert len(SHOWN) == len(ALL)
    changed = {a for a, b in zip(ALL, SHOWN, strict=True) if a != b}
    assert {unicodedata.category(c) for c in changed} == {"Cc", "Cf", "Cs", "Zl", "Zp"}
    kept = "naïve 北京 👩‍👩‍👧 ❤️ e\u0301 שלום العربية \u200f नमस्ते [b]x[/b] **bold** | <td> & \\x1b[0m"
    assert visible(kept) == kept


def test_json_cannot_either_and_keeps_its_value() -> None:
    text = "".join(c for c in ALL if unicodedata.category(c) != "Cs") + "\ud800"  # two would be one character
    line = json_line({"text": text})
    assert json.loads(line) == {"text": text}
    assert visible(line) == line and "\n" not in line and "\t" not in line
    assert "北京" in json_line("北京")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "␛[31mred"), ("a\x00b\x07", "a␀b␇"), ("one\rtwo", "one␍two"), ("\x7f", "␡"),
        ("\x9b31m", "\ufffd31m"), ("\u202eabc", "\ufffdabc"), ("a\u2028b", "a\ufffdb"), ("a\tb\n", "a\tb\n"),
    ],
)
def test_what_it_looks_like(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_rows_break_where_a_terminal_breaks_them() -> None:
    rng = random.Random(0)
    alphabet = [*"abc xyz  你好世界🙂é\n", "e\u0301"]
    for _ in range(200):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(120)))
        width = rng.randint(2, 30)
        rows = ["".join(part for part, _ in row).rstrip() for row in wrap([(text, "")], width)]
        while rows and not rows[-1]:
            rows.pop()
        assert rows == laid_out(text, width, 200).all_rows


def test_rows_hold_all_the_text_and_no_more_cells_than_they_may() -> None:
    rng = random.Random(1)
    for _ in range(200):
        pieces = [("".join(rng.choice("ab\t你 \n❤\ufe0f") for _ in range(5)), rng.choice(["", "2"])) for _ in range(9)]
        width = rng.randint(2, 20)
        rows = wrap(pieces, width)
        assert all(sum(cells(c) for text, _ in row for c in text) <= width for row in rows)
        for style in ("", "2"):
            wanted = "".join(text for text, own in pieces if own == style)
            got = "".join(text for row in rows for text, own in row if own == style)
            assert got.replace(" ", "") == "".join(wanted.split())


def test_json_has_null_for_nan_and_infinity() -> None:
    value = {"a": [float("nan"), (float("inf"), 1.5)], "b": "NaN"}
    assert json.loads(json_line(value), parse_constant=pytest.fail) == {"a": [None, [None, 1.5]], "b": "NaN"}
