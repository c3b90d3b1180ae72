"""The exception for errors that are reported to the user."""

from __future__ import annotations


class DgemmaError(Exception):
    """An error that the user can act on. The command line prints its message and hint without a traceback.

    Attributes:
        message: One line that says what is wrong; it starts in lower case and has no full stop at the end.
        hint: Whole sentences that say what to do; may be empty.
        exit_code: Exit code of the program: 1 for run-time failures, such as a damaged file, and 2 for wrong usage.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
