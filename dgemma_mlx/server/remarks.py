"""Lines of the log that are written once, such as the names of fields that have no effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable

_MOST = 1000  # clients choose some of the words


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
        """Write which of these fields of a request's body are given. They have no effect."""
        for name in names:
            if getattr(body, name) is not None:
                self.once(f"{path}: {name} has no effect")
