"""The bound on what compiling a constraint may take.

Counts, where the work is done, refuse what is too large, alike on every machine. A limit on the CPU time of the thread
stands behind them, for what no count foresaw.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from dgemma_mlx.errors import DgemmaError

MOST_SECONDS = 2.0
MOST_DIGITS = 300  # of an integer in a JSON schema; readers that use doubles read up to 308
_LEAST_WAIT = 0.001  # seconds between two looks at the CPU time, which costs far more than one at the clock


class _Budget:
    """The CPU time of one block of ``compiling``.

    Attributes:
        end: CPU time of the thread, in seconds, at which compiling must have ended.
        due: Time of the clock before which this cannot be: CPU time passes no faster than time.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.thread_time() + seconds
        self.due = time.monotonic() + seconds

    def is_spent(self) -> bool:
        """Return whether the time is used up."""
        now = time.monotonic()
        if now < self.due:
            return False
        left = self.end - time.thread_time()
        self.due = now + max(left, _LEAST_WAIT)
        return left <= 0


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


class TooLargeError(Exception):
    """A constraint is larger than the bounds allow. The message says which one, as in "it has more than 3 states"."""


@contextmanager
def compiling(label: str) -> Iterator[None]:
    """Bound what is compiled in the block: ``check_time`` raises after ``MOST_SECONDS`` of CPU time.

    A ``TooLargeError`` becomes a ``DgemmaError`` (exit code 2). ``label`` names the constraint in its message.
    """
    before = _budget.set(_Budget(MOST_SECONDS))
    try:
        yield
    except TooLargeError as error:
        raise DgemmaError(
            f"{label} is too large: {error}", "Use smaller repetitions and shorter lengths.", exit_code=2
        ) from None
    finally:
        _budget.reset(before)


@contextmanager
def trying() -> Iterator[None]:
    """Give the block, which may fail, half of the time that is left of a block of ``compiling`` around it."""
    budget = _budget.get()
    before = _budget.set(None if budget is None else _Budget((budget.end - time.thread_time()) / 2))
    try:
        yield
    finally:
        _budget.reset(before)


def check_time() -> None:
    """Raise ``TooLargeError`` when the block of ``compiling`` around the call has used up its time.

    Every loop of the compiler calls this. Outside such a block it does nothing.
    """
    budget = _budget.get()
    if budget is not None and budget.is_spent():
        raise TooLargeError(f"it takes more than {MOST_SECONDS:.0f} seconds to compile")


def give_up(problem: str) -> None:
    """Raise ``TooLargeError`` in a block of ``compiling``. Outside such a block it does nothing."""
    if _budget.get() is not None:
        raise TooLargeError(problem)
