"""The emulated screen breaks lines again after a change of size, as the terminals of a Mac do."""

from __future__ import annotations

import random

import pytest

from tests.cli.terminal import ScreenStream, laid_out

TEXT = "one two three four five six seven\n\n  你好世界 and 🙂🙂🙂 and e\u0301 and so on\nlast"


@pytest.mark.parametrize("seed", range(20))
def test_text_is_laid_out_as_on_a_fresh_screen_of_the_size(seed: int) -> None:
    rng = random.Random(seed)
    stream = ScreenStream()
    stream.write(TEXT)
    for _ in range(5):
        columns, lines = rng.randint(2, 90), rng.randint(1, 30)
        stream.resize(columns, lines)
        fresh = laid_out(TEXT, columns, lines)
        assert stream.screen.rows == fresh.rows
        assert stream.screen.all_rows == fresh.all_rows
        assert stream.screen.text == fresh.text == TEXT
        assert stream.screen.cursor.y == fresh.cursor.y


def test_a_wide_character_is_never_cut() -> None:
    assert laid_out("a你好", 4, 5).rows == ["a你", "好"]
    assert laid_out("a你好", 2, 5).rows == ["a", "你", "好"]


def test_the_cursor_stays_on_its_character() -> None:
    stream = ScreenStream(20, 5)
    stream.write("twenty cells are here\rX")
    stream.resize(10, 5)
    stream.write("Y")
    assert stream.screen.rows[-1] == "XY" and stream.screen.rows[0] == "twenty cel"
