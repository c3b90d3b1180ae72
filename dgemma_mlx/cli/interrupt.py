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

from dgemma_mlx.cli.signals import SIGNALS, end_at_once

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


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a signal end the program at once within the block, in which nothing may be written that it could leave.

    A download runs in threads, which an exception in the main thread waits for. Reading weights is a few long calls.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    end_at_once()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_in_order() -> None:
    """Make Ctrl-C raise KeyboardInterrupt, and SIGTERM and SIGHUP SystemExit with 128 + their number.

    What is unfinished is then cleaned up: temporary files, the terminal's state, a kernel's self-check. A second
    SIGTERM or SIGHUP ends the program at once. A signal that is ignored stays ignored.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        end_at_once()
        sys.exit(128 + number)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else leave)


def unless_cancelled(events: Iterable[Event]) -> Iterator[Event]:
    """Yield the events; raise KeyboardInterrupt in place of the ``Done`` event of a cancelled answer."""
    from dgemma_mlx.events import Done

    for event in events:
        if isinstance(event, Done) and event.finish_reason == "cancelled":
            raise KeyboardInterrupt
        yield event
