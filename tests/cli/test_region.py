"""Rows that are redrawn at the bottom of a terminal whose size changes."""

from __future__ import annotations

import random

import pytest

from dgemma_mlx.cli.render.region import Region
from dgemma_mlx.cli.render.visible import Row, wrap
from tests.cli.terminal import Screen, ScreenStream

TEXT = "One row of text that is wide enough to be broken, 与一些宽字符 in it, and  spaces \nand another row."


def rows(text: str, width: int) -> list[Row]:
    return wrap([(text, "2")], width)


def shown(text: str, width: int) -> list[str]:
    return ["".join(part for part, _ in row).rstrip() for row in rows(text, width)]


@pytest.fixture
def stream() -> ScreenStream:
    return ScreenStream(80, 24)


@pytest.fixture
def region(stream: ScreenStream) -> Region:
    return Region(stream)  # type: ignore[arg-type]


def test_what_is_drawn_replaces_what_was(stream: ScreenStream, region: Region) -> None:
    stream.write("$ before\n")
    for text in ("a\nb\nc", "d", "", "e\n\nf"):
        region.draw(rows(text, 79))
        assert stream.screen.rows == ["$ before", *text.split("\n")] if text else ["$ before"]
    region.close("end\n")
    assert stream.screen.rows == ["$ before", "end"]
    assert stream.screen.is_sane


@pytest.mark.parametrize("seed", range(40))
def test_nothing_else_is_erased_and_nothing_is_left_when_the_size_changes(seed: int) -> None:
    rng = random.Random(seed)
    stream = ScreenStream(80, 24)
    region = Region(stream)  # type: ignore[arg-type]
    lines = ["$ before", ""]
    stream.write("$ before\n\n")
    for number in range(8):
        width = region.size[0] - 1
        line = f"line {number} " * rng.randint(1, 20)
        region.draw(rows(TEXT, width), above=line + "\n")
        lines.append(line.rstrip())
        assert stream.screen.text.split("\n") == lines + shown(TEXT, width)
        stream.resize(rng.randint(12, 100), rng.randint(20, 50))
    region.close()
    assert stream.screen.text.split("\n") == lines
    assert stream.screen.is_sane


def test_rows_of_wide_characters_may_take_more_rows_than_their_cells(stream: ScreenStream, region: Region) -> None:
    stream.write("kept\n")
    region.draw([[("你" * 20, "")], [("status", "")]])
    stream.resize(7, 24)  # three of the characters fit in a row of seven cells
    region.draw([[("done", "")]])
    assert stream.screen.all_rows == ["kept", "done"]


def test_of_many_rows_the_last_ones_are_shown(stream: ScreenStream, region: Region) -> None:
    numbers: list[Row] = [[(str(n), "")] for n in range(100)]
    for columns, lines in ((80, 24), (40, 10), (10, 3), (10, 1)):
        stream.resize(columns, lines)
        region.draw(numbers)
        assert stream.screen.rows == [str(n) for n in range(100 - max(lines - 1, 1), 100)] or lines == 24
        assert stream.screen.rows[-1] == "99"


class Xterm(Screen):
    """A screen that cuts its rows when it becomes narrower."""

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        rows = [(self._row(y)[0][:columns], False) for y in range(self.lines)]
        self._put(rows, (self.cursor.y, self.cursor.x), lines or self.lines, columns or self.columns)


def test_a_terminal_that_cuts_its_rows_keeps_what_is_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMUX", raising=False)
    monkeypatch.setenv("XTERM_VERSION", "XTerm(388)")
    stream = ScreenStream(screen=Xterm(80, 24))
    region = Region(stream)  # type: ignore[arg-type]
    stream.write("one\ntwo\nthree\n")
    for columns in (80, 30, 20, 60):
        stream.resize(columns, 24)
        region.draw(rows(TEXT, columns - 1))
        assert stream.screen.rows == ["one", "two", "three", *shown(TEXT, columns - 1)]
    region.close()
    assert stream.screen.rows == ["one", "two", "three"]


def test_keys_typed_meanwhile_leave_nothing(stream: ScreenStream, region: Region) -> None:
    region.draw([[("text", "")], [("status" * 13, "")]])
    stream.write("^C")
    region.draw([[("text", "")], [("status", "")]])
    assert stream.screen.rows == ["text", "status"]


def test_lines_above_are_written_unbroken_and_without_style(stream: ScreenStream, region: Region) -> None:
    line = "word " * 60 + "end"
    region.draw([[("row", "")]])
    region.draw([[("row", "")]], above=line + "\n")
    assert line + "\n" in stream.output
    assert stream.screen.text == line + "\nrow"
