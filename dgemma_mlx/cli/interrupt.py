"""Ctrl-C while the model writes: the work ends after the step under way, so that it is known what was done."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from dgemma_mlx.events import Done, Event


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Says whether Ctrl-C was pressed; pressed again, it interrupts at once."""
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


def unless_cancelled(events: Iterable[Event]) -> Iterator[Event]:
    """The events; in place of the ``Done`` of a cancelled answer a ``KeyboardInterrupt``."""
    for event in events:
        if isinstance(event, Done) and event.finish_reason == "cancelled":
            raise KeyboardInterrupt
        yield event
