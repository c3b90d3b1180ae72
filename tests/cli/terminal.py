"""A terminal for tests: an emulated screen that reflows, a stream that writes to it, and a program that runs in it."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import struct
import sys
import termios
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import pexpect
import pyte
from pyte.screens import Char
from wcwidth import wcwidth

Line = list[Char]  # a wide character is followed by a cell without data


class Screen(pyte.Screen):
    """A screen that breaks its lines again when it is resized, as the terminals of a Mac do.

    Rows that the terminal itself had broken are joined before; rows that ended with a line feed are not. Rows come
    back from the scrollback where there is room for them.
    """

    def __init__(self, columns: int, lines: int) -> None:
        self.scrollback: list[tuple[Line, bool]] = []
        self._ends: list[int | None] = [None] * lines  # for each row, the column at which it was broken
        super().__init__(columns, lines)

    def draw(self, data: str) -> None:
        for character in data:
            width = wcwidth(character)
            if width <= 0:
                self._combine(character)
                continue
            if self.cursor.x + width > self.columns:
                self._ends[self.cursor.y] = self.cursor.x
                self.carriage_return()
                self.index()
            row, style = self.buffer[self.cursor.y], self.cursor.attrs[1:]
            row[self.cursor.x] = Char(character, *style)
            if width == 2:
                row[self.cursor.x + 1] = Char("", *style)
            self.cursor.x += width

    def _combine(self, character: str) -> None:
        row = self.buffer[self.cursor.y]
        before = next((x for x in range(self.cursor.x - 1, -1, -1) if row[x].data), None)
        if before is not None:
            row[before] = row[before]._replace(data=row[before].data + character)

    def index(self) -> None:
        if self.cursor.y == self.lines - 1:
            self.scrollback.append(self._row(0))
            self._ends = [*self._ends[1:], None]
        super().index()

    def erase_in_display(self, how: int = 0, *args: object, **options: object) -> None:
        first, last = (self.cursor.y if how == 0 else 0), (self.cursor.y if how == 1 else self.lines)
        self._ends[first:last] = [None] * (last - first)
        super().erase_in_display(how, *args, **options)

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        lines, columns = lines or self.lines, columns or self.columns
        logical: list[Line] = [[]]
        mark = (0, 0)  # the cursor: a logical line, and cells into it
        for number, (row, broken) in enumerate(self._all_rows()):
            if number == len(self.scrollback) + self.cursor.y:
                mark = len(logical) - 1, len(logical[-1]) + self.cursor.x
            logical[-1] += row
            if not broken:
                logical.append([])
        while len(logical) > mark[0] + 1 and not logical[-1]:
            logical.pop()
        rows: list[tuple[Line, bool]] = []
        cursor = (0, 0)
        for number, line in enumerate(logical):
            broken_anew = _break(line, columns)
            if number == mark[0]:
                cursor = _find(broken_anew, mark[1], columns)
                cursor = (len(rows) + cursor[0], cursor[1])
            rows += [(row, True) for row in broken_anew[:-1]] + [(broken_anew[-1], False)]
        self._put(rows, cursor, lines, columns)

    def _put(self, rows: list[tuple[Line, bool]], cursor: tuple[int, int], lines: int, columns: int) -> None:
        top = max(0, len(rows) - lines)
        self.scrollback, shown = rows[:top], rows[top:]
        self.lines, self.columns = lines, columns
        self.tabstops = set(range(8, columns, 8))
        self.buffer.clear()
        self._ends = [None] * lines
        for y, (row, broken) in enumerate(shown):
            self.buffer[y].update(enumerate(row))
            self._ends[y] = len(row) if broken else None
        self.cursor.y, self.cursor.x = max(cursor[0] - top, 0), cursor[1]

    def _row(self, y: int) -> tuple[Line, bool]:
        """Return the cells of a row on the screen and whether the terminal has broken the row."""
        end = self._ends[y]
        row = [self.buffer[y][x] for x in range(self.columns if end is None else end)]
        while end is None and row and row[-1].data == " ":
            row.pop()
        return row, end is not None

    def _all_rows(self) -> list[tuple[Line, bool]]:
        return self.scrollback + [self._row(y) for y in range(self.lines)]

    @property
    def rows(self) -> list[str]:
        """The text of the rows on the screen, without trailing spaces and without empty rows at the end."""
        return _texts([self._row(y)[0] for y in range(self.lines)])

    @property
    def all_rows(self) -> list[str]:
        """The text of the rows that have scrolled away and of those on the screen."""
        return _texts([row for row, _ in self._all_rows()])

    @property
    def text(self) -> str:
        """The text of scrollback and screen as a user would copy it, with broken lines joined."""
        return "".join(_text(row) + ("" if broken else "\n") for row, broken in self._all_rows()).rstrip("\n")

    @property
    def is_sane(self) -> bool:
        """Whether the cursor is visible at the start of an empty row and modes and colours are as at first."""
        fresh = pyte.Screen(self.columns, self.lines)
        return (
            self.mode == fresh.mode and self.margins is None and self.title == self.icon_name == ""
            and not self.cursor.hidden and self.cursor.attrs == fresh.cursor.attrs
            and self.charset == fresh.charset and self.g0_charset == fresh.g0_charset
            and self.cursor.x == 0 and not self._row(self.cursor.y)[0]
        )  # fmt: skip


def _text(row: Line) -> str:
    return "".join(cell.data for cell in row)


def _texts(rows: list[Line]) -> list[str]:
    texts = [_text(row).rstrip() for row in rows]
    while texts and not texts[-1]:
        texts.pop()
    return texts


def _break(line: Line, columns: int) -> list[Line]:
    """Return the rows of a line, at least one. A wide character is never split between two rows."""
    rows: list[Line] = [[]]
    for x, cell in enumerate(line):
        wide = x + 1 < len(line) and not line[x + 1].data
        if cell.data and len(rows[-1]) + 1 + wide > columns:
            rows.append([])
        rows[-1].append(cell)
    return rows


def _find(rows: list[Line], cells: int, columns: int) -> tuple[int, int]:
    """Return the row and column of a cell by its number. After the end of the line, the last row continues."""
    for y, row in enumerate(rows):
        if cells < len(row) or y == len(rows) - 1:
            return y, min(cells, columns - 1)
        cells -= len(row)
    raise AssertionError("there is a row")


class ScreenStream(io.TextIOBase):
    """A text stream to a screen. A writer learns the size of the screen from a pseudo-terminal."""

    def __init__(self, columns: int = 80, lines: int = 24, screen: Screen | None = None) -> None:
        self.screen = screen or Screen(columns, lines)
        self.output = ""
        self._stream = pyte.Stream(self.screen)
        self._master, self._slave = os.openpty()
        self._tell_size()

    def write(self, text: str) -> int:
        self.output += text
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def fileno(self) -> int:
        return self._slave

    def isatty(self) -> bool:
        return True

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        self._tell_size()

    def close(self) -> None:
        if not self.closed:
            os.close(self._master)
            os.close(self._slave)
        super().close()

    def _tell_size(self) -> None:
        size = struct.pack("HHHH", self.screen.lines, self.screen.columns, 0, 0)
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, size)


class Terminal:
    """A context manager that runs a program, by default dgemma-mlx, on a pseudo-terminal."""

    def __init__(
        self, arguments: Sequence[str], columns: int = 80, lines: int = 24, env: Mapping[str, str] | None = None,
        program: Sequence[str] = (sys.executable, "-m", "dgemma_mlx"),
    ) -> None:
        self.screen = Screen(columns, lines)
        self.output = b""
        self._stream = pyte.ByteStream(self.screen)
        environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "DGEMMA_MODEL")}
        environment |= {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", **(env or {})}
        command, *rest = [*program, *arguments]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork in a process with threads
            self.process = pexpect.spawn(
                command, rest, dimensions=(lines, columns), env=environment,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
            )
        self.process.delaybeforesend = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.close(force=True)

    def resize(self, columns: int, lines: int) -> None:
        """Stop the program between two writes, resize the window and let the program continue."""
        self.process.kill(signal.SIGSTOP)
        self._drain()
        self.screen.resize(lines, columns)
        self.process.setwinsize(lines, columns)
        self.process.kill(signal.SIGCONT)

    def type(self, text: str) -> None:
        self.process.send(text)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Read until the condition holds. Fail when the program ends first or takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.read(), f"the program has ended:\n{self.text}"
            assert time.monotonic() < deadline, self.text

    def wait_for_text(self, text: str) -> None:
        self.wait_for(lambda: text in self.text)

    def finish(self, seconds: float = 60) -> int:
        """Read until the program ends and return its exit code."""
        deadline = time.monotonic() + seconds
        while self.read():
            assert time.monotonic() < deadline, self.text
        self.process.wait()
        assert self.process.exitstatus is not None, f"ended by signal {self.process.signalstatus}"
        code: int = self.process.exitstatus
        return code

    def read(self, seconds: float = 0.1) -> bool:
        """Feed the output of the next moments to the screen. Return False when the program has closed the terminal."""
        try:
            data = self.process.read_nonblocking(65536, seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.output += data
        self._stream.feed(data)
        return True

    def _drain(self) -> None:
        """Read everything that the stopped program has written."""
        before = -1
        while len(self.output) > before:
            before = len(self.output)
            assert self.read(0.02), f"the program has ended:\n{self.text}"

    @property
    def text(self) -> str:
        """All text that was written and not erased, as a user would copy it."""
        return self.screen.text


def laid_out(text: str, columns: int, lines: int) -> Screen:
    """Return a new screen that shows the text."""
    screen = Screen(columns, lines)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    return screen
