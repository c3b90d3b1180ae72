"""Stop texts: where an answer ends before the model ends it."""

from __future__ import annotations

from collections.abc import Sequence

from dgemma_mlx.server.errors import ApiError

_MOST = 64


def stop_texts(given: str | Sequence[str] | None, param: str = "stop") -> tuple[str, ...]:
    """Return the stop texts of a request, whose field is ``param``. Raises ``ApiError`` (400) for too many."""
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > _MOST:
        raise ApiError(400, f"there are {len(stops):,} stop texts; at most {_MOST} are read", param=param)
    return stops


class StopTexts:
    """Cuts a text that arrives in pieces before the first of several stop texts, which may lie across pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""  # what may be the beginning of a stop text
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Return what is certain to come before any stop text. ``found`` is the stop text once one is complete."""
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            place, self.found = min(places)
            self._held = ""
            return text[:place]
        kept = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return what was held back, because the text has ended."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return the length of the longest end of the text that begins the stop text."""
        most = min(len(stop) - 1, len(text))
        return next((size for size in range(most, 0, -1) if stop.startswith(text[-size:])), 0)


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Return a whole text up to the first of the stop texts, and this one; None without one."""
    texts = StopTexts(stops)
    return texts.feed(text) + texts.finish(), texts.found
