"""Signals that end the program.

Ctrl-C while the model writes ends the work after the current step, so that the state is well defined. Other signals
end the program in the normal way, so that what is unfinished is cleaned up.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dgemma_mlx.events import Event


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True after the first Ctrl-C.

    A second Ctrl-C raises KeyboardInterrupt immediately.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit with 128 + their number, unless they are handled or ignored already.

    By default they end the process at once, which leaves temporary files, the terminal's state and a kernel's
    unfinished self-check behind. A second signal does that.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, leave)


def unless_cancelled(events: Iterable[Event]) -> Iterator[Event]:
    """Yield the events; raise KeyboardInterrupt in place of the ``Done`` event of a cancelled answer."""
    from dgemma_mlx.events import Done

    for event in events:
        if isinstance(event, Done) and event.finish_reason == "cancelled":
            raise KeyboardInterrupt
        yield event
