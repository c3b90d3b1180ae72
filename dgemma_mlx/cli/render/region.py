"""Rows at the bottom of the terminal that are drawn again and again, while finished text scrolls up above them.

No alternate screen, and the cursor is never hidden, so that nothing has to be restored. Rich's ``Live`` is not used:
when the window becomes narrower, terminals break the rows drawn before anew, and it erases too few of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from dgemma_mlx.cli.render.visible import Row, wrap

_ERASE_BELOW = "\x1b[J"


def can_draw() -> bool:
    """Return whether stdout and stderr are a terminal that understands escape codes and NO_COLOR is not set."""
    allowed = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    return allowed and sys.stdout.isatty() and sys.stderr.isatty()


class Region:
    """Draws to a terminal, of which it knows the size anew for each frame.

    Between frames the cursor stands at the start of the last row: there the terminal echoes what is typed (``^C``).
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rows: list[Row] = []  # on the screen

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        columns, rows = os.get_terminal_size(self._stream.fileno())
        return columns or 80, rows or 24  # a terminal that does not know says 0

    def draw(self, rows: Sequence[Row], above: str = "") -> None:
        """Replaces what was drawn: first ``above``, whole lines that stay, then the rows (each within the width).

        Of more rows than the screen has, the last ones are shown.
        """
        columns, height = self.size
        shown = [_stripped(row) for row in rows[-max(height - 1, 1) :]]
        text = self._back(columns) + above + "\n".join(map(styled, shown)) + "\r"
        self._rows = shown
        self._stream.write(text)
        self._stream.flush()

    def close(self, last: str = "") -> None:
        """Erases the rows and writes what stays."""
        columns, _ = self.size
        self._stream.write(self._back(columns) + last)
        self._stream.flush()
        self._rows = []

    def _back(self, columns: int) -> str:
        """Moves to the first cell of what was drawn, or of the screen if that is lower, and erases from there.

        Where the window has become narrower since, a row of many cells now takes several.
        """
        if not self._rows:
            return ""
        up = sum(len(wrap(row, columns)) for row in self._rows[:-1])
        return "\r" + (f"\x1b[{up}A" if up else "") + _ERASE_BELOW


def styled(row: Row) -> str:
    """The row with its styles as escape sequences."""
    return "".join(f"\x1b[{style}m{text}\x1b[0m" if style else text for text, style in row)


def _stripped(row: Row) -> Row:
    """The row without spaces at its end: on narrowing, some terminals count them and some do not."""
    row = list(row)
    while row:
        text, style = row.pop()
        if text := text.rstrip(" "):
            return [*row, (text, style)]
    return row
