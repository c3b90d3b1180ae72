"""What a terminal shows on stderr while nothing else is printed: how much of the prompt is read, and the step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import TracebackType

from dgemma_mlx.cli.render.plain import reading
from dgemma_mlx.cli.render.region import Region, can_draw
from dgemma_mlx.events import Committed, Done, Draft, Encoded, Event

_DIM = "2"
_PRINTED: dict[str, tuple[type, ...]] = {  # the types of the events that the forms of the output print
    "json": (Done,), "jsonl": (Draft, Committed, Done), "code": (Done,), "text": (Committed, Done), "live": ()
}


class Progress:
    """A context manager that draws one line on stderr, and erases it.

    It draws nothing when ``shown`` is false, or when stdout and stderr are not a terminal that understands escape
    codes.
    """

    def __init__(self, shown: bool) -> None:
        self._region = Region(sys.stderr) if shown and can_draw() else None

    def __enter__(self) -> Progress:
        self._draw("reading the prompt")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def encoded(self, part: Encoded) -> None:
        """Draw how much of the prompt is encoded."""
        self._draw(reading(part))

    def until_printed(self, events: Iterable[Event], form: str) -> Iterator[Event]:
        """Yield the events. The line shows each step, and ends before the first event that the ``form`` prints."""
        for event in events:
            if isinstance(event, _PRINTED[form]):
                self._close()
            elif isinstance(event, Draft):
                self._draw(f"canvas {event.canvas + 1}, step {event.step} of at most {event.max_steps}")
            yield event

    def _draw(self, text: str) -> None:
        if self._region is not None:
            self._region.draw([[(text[: self._region.size[0] - 1], _DIM)]])

    def _close(self) -> None:
        if self._region is not None:
            self._region.close()
            self._region = None
