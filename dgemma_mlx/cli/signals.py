"""What signals do at the program's beginning and end: each ends the process at once, with one line.

This module imports only what the interpreter has loaded already, so that hardly any time passes before the signals are
handled. ``cli/interrupt.py`` takes over when there is something that a signal must not leave behind.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # as in the module typing, which takes a while to import
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


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
