"""Messages as lines of standard input: through a pipe, and on a terminal that cannot edit."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dgemma_mlx.cli.chat.commands import QUOTES, is_open
from dgemma_mlx.errors import DgemmaError


def piped_lines() -> Callable[[str], str | None]:
    """Return a function that reads the next line of stdin, and returns None after the last one."""
    number = 0

    def ask(start: str) -> str | None:
        nonlocal number
        number += 1
        return _line(number)

    return ask


def typed_lines() -> Callable[[str], str | None]:
    """Return a function that asks for a message on a terminal without an editor, and returns None to leave.

    Three quotation marks begin and end a message of several lines. Ctrl-C gives up what is typed; a second one at the
    next prompt leaves.
    """
    number = 0

    def ask(start: str) -> str | None:
        nonlocal number
        text, warned = "", False
        while True:
            try:
                print("... " if text else ">>> ", end="", flush=True)  # Ctrl-C may come as soon as it is read
                line = _line(number := number + 1)
            except KeyboardInterrupt:
                print()
                if warned:
                    return None
                if not text:
                    print("Ctrl-C again or Ctrl-D leaves", file=sys.stderr)
                text, warned = "", not text
                continue
            if line is None and text:
                print(f"\nthe message was not sent: its {QUOTES} is open", file=sys.stderr)
            if line is None:
                return None
            text, warned = text + line, False
            if not is_open(text):
                return text

    return ask


def _line(number: int) -> str | None:
    """Return the next line of stdin with its line feed, or None when there is none."""
    line = sys.stdin.buffer.readline()
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8") if line else None
    except UnicodeDecodeError:
        message = f"standard input is not UTF-8 text (line {number})"
        raise DgemmaError(message, "Convert it to UTF-8 first, for example with iconv.", exit_code=2) from None
