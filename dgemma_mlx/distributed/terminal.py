"""The state of the terminal, which a process that ends at once gives back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress


def terminal_state() -> Callable[[], None]:
    """Return a function that gives the terminal back as it is now, with its cursor."""
    if not sys.stdin.isatty():
        return lambda: None
    import termios

    state = termios.tcgetattr(sys.stdin.fileno())

    def restore() -> None:
        with suppress(OSError, termios.error):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, state)
            os.write(2, b"\x1b[?25h")

    return restore
