"""Rows at the bottom of a terminal that are redrawn in place while finished text scrolls up above them.

The program uses no alternate screen and never hides the cursor, so nothing has to be restored. It does not use Rich's
``Live``: when the window becomes narrower, terminals break the drawn rows again, and ``Live`` erases too few of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from dgemma_mlx.cli.render.visible import Row, wrap

# Erases the row, then from its second cell on. tmux keeps the whole screen in the scrollback when it is erased from its
# very first cell, where each frame of an answer that began at the top of the screen begins.
_ERASE_BELOW = "\x1b[K\x1b[C\x1b[J\r"


def can_draw() -> bool:
    """Return whether stdout and stderr are a terminal that understands escape codes and NO_COLOR is not set."""
    allowed = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    return allowed and sys.stdout.isatty() and sys.stderr.isatty()


def _breaks_again() -> bool:
    """Return whether the terminal breaks its rows again when it becomes narrower. xterm, screen and the console cut."""
    if os.environ.get("TMUX"):
        return True
    return not (os.environ.get("XTERM_VERSION") or os.environ.get("STY") or os.environ.get("TERM") == "linux")


class Region:
    """The redrawn rows of a terminal, whose size is read again for each frame.

    What a terminal itself moves into its scrollback, because the rows no longer fit on the screen once they are broken
    again, cannot be erased. tmux counts the empty rows below the cursor for that, too.

    Between frames, the cursor stands at the start of the last row, where the terminal echoes typed keys (``^C``).
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rows: list[Row] = []  # the rows on the screen

    @property
    def size(self) -> tuple[int, int]:
        """Return the number of columns and of rows."""
        columns, rows = os.get_terminal_size(self._stream.fileno())
        return columns or 80, rows or 24  # a terminal that does not know its size reports 0

    def draw(self, rows: Sequence[Row], above: str = "") -> None:
        """Replace the drawn rows. ``above`` holds whole lines that stay on the screen, above the new rows.

        Each row must fit into the width. When there are more rows than the screen has, the last ones are shown.
        """
        columns, height = self.size
        shown = [_stripped(row) for row in rows[-max(height - 1, 1) :]]
        text = self._back(columns) + above + "\n".join(map(styled, shown)) + "\r"
        self._rows = shown
        self._stream.write(text)
        self._stream.flush()

    def close(self, last: str = "") -> None:
        """Erase the rows and write ``last``, which stays on the screen."""
        columns, _ = self.size
        self._stream.write(self._back(columns) + last)
        self._stream.flush()
        self._rows = []

    def _back(self, columns: int) -> str:
        """Return the codes that move to the first drawn cell, or to the top of the screen, and erase from there.

        If the window has become narrower since, a drawn row now takes several rows of the screen.
        """
        if not self._rows:
            return ""
        above = self._rows[:-1]
        up = sum(len(wrap(row, columns)) for row in above) if _breaks_again() else len(above)
        return "\r" + (f"\x1b[{up}A" if up else "") + _ERASE_BELOW


def styled(row: Row) -> str:
    """Return the text of the row with its styles as escape sequences."""
    return "".join(f"\x1b[{style}m{text}\x1b[0m" if style else text for text, style in row)


def _stripped(row: Row) -> Row:
    """Return the row without trailing spaces, which only some terminals count when the window becomes narrower."""
    row = list(row)
    while row:
        text, style = row.pop()
        if text := text.rstrip(" "):
            return [*row, (text, style)]
    return row
