"""Ctrl-C while the model writes: the work ends after the current step, so that the state is well defined."""

from __future__ import annotations

import signal
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


def unless_cancelled(events: Iterable[Event]) -> Iterator[Event]:
    """Yield the events; raise KeyboardInterrupt in place of the ``Done`` event of a cancelled answer."""
    from dgemma_mlx.events import Done

    for event in events:
        if isinstance(event, Done) and event.finish_reason == "cancelled":
            raise KeyboardInterrupt
        yield event
