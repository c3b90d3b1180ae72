"""The one exception that users see."""

from __future__ import annotations


class DgemmaError(Exception):
    """An error the user can act on: one line that says what is wrong, a hint, and the exit code.

    ``exit_code`` is 1 for run-time failures (a broken file, no such model) and 2 for wrong usage.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
