"""Where the program begins: signals end it from the first moment on, before the slow imports.

This module imports only what the interpreter has loaded already, so that hardly any time passes before the signals are
handled. ``cli/interrupt.py`` takes over when there is something that a signal must not leave behind.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # as in the module typing, which takes a while to import
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


def main() -> NoReturn:
    """Run the program and exit with 0 (success), 1 (run-time error), 2 (wrong usage) or 130 (interrupted).

    Another signal that ends the program exits with 128 + its number, as in a shell.
    """
    end_at_once()
    from dgemma_mlx.cli.app import run
    from dgemma_mlx.cli.interrupt import end_in_order

    end_in_order()
    try:
        code = run()
    except KeyboardInterrupt:  # a second one, while the program was already ending
        code = 128 + signal.SIGINT
    end_at_once()
    sys.exit(code)


def end_at_once() -> None:
    """Let each signal of ``SIGNALS`` that is not ignored end the process at once, with one line on stderr."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def say(number: int) -> None:
    """Print what a signal has done to stderr, which may be a terminal that no longer exists."""
    try:  # noqa: SIM105 - contextlib would be another import
        os.write(2, f"{SIGNALS[signal.Signals(number)]}\n".encode())
    except OSError:
        pass


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Print one line and end the process without unwinding: no import or thread can hold it up."""
    say(number)
    os._exit(128 + number)
