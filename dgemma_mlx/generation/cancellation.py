"""Cancelling between two steps, as one exception."""

from __future__ import annotations

from collections.abc import Callable


class Cancelled(KeyboardInterrupt):
    """The caller asked to stop.

    ``generate``, ``stream`` and ``generate_batch`` end with what is committed. ``fill``, ``edit`` and ``choose`` have
    nothing to return then and let the exception reach their caller, as a ``KeyboardInterrupt``.
    """


class Cancellation:
    """A caller's request to stop. It is latched: it cannot be withdrawn."""

    def __init__(self, cancelled: Callable[[], bool] | None = None) -> None:
        """``cancelled`` is called between any two steps, and says whether to stop; None never stops."""
        self._cancelled = cancelled
        self._latched = False

    def requested(self) -> bool:
        """Return whether the caller has asked to stop, now or before."""
        self._latched = self._latched or (self._cancelled is not None and self._cancelled())
        return self._latched

    def check(self) -> None:
        """Raise ``Cancelled`` when the caller has asked to stop."""
        if self.requested():
            raise Cancelled
