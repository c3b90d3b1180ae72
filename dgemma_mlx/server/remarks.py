"""Lines of the log that are written once, such as the names of fields that have no effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

_MOST = 1000  # clients choose some of the words
_NEUTRAL: tuple[Any, ...] = (None, 0, False, 1, [], {}, "")  # values that ask for nothing


class Remarks:
    """What the log has been told already."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log, self._told = log, set[str]()

    def once(self, line: str) -> None:
        """Write a line to the log, unless it was written before."""
        if line not in self._told and len(self._told) < _MOST:
            self._told.add(line)
            self._log(line)

    def without_effect(self, path: str, body: object, names: Iterable[str]) -> None:
        """Write which of these fields of a body ask for something, and a temperature. They have no effect."""
        for name in names:
            if getattr(body, name) not in _NEUTRAL:
                self.once(f"{path}: {name} has no effect")
        if getattr(body, "temperature", None) not in (None, 0, 1):
            self.once(f"{path}: temperature (other than 0) has no effect")
