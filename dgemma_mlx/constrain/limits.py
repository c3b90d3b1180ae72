"""The bound on what compiling a constraint may take.

Counts (states, nodes, moves, transitions) refuse what is too large, alike on every machine. A limit on the CPU time of
the thread stands behind them, for what no count foresaw.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf

from dgemma_mlx.errors import DgemmaError

MOST_SECONDS = 2.0
_end: ContextVar[float] = ContextVar("end", default=inf)  # CPU time of the thread at which compiling must have ended


class TooLargeError(Exception):
    """A constraint is larger than the bounds allow. The message says which one, as in "it has more than 3 states"."""


@contextmanager
def compiling(label: str) -> Iterator[None]:
    """Bound what is compiled in the block: ``check_time`` raises after ``MOST_SECONDS`` of CPU time.

    A ``TooLargeError`` becomes a ``DgemmaError`` (exit code 2). ``label`` names the constraint in its message.
    """
    before = _end.set(time.thread_time() + MOST_SECONDS)
    try:
        yield
    except TooLargeError as error:
        raise DgemmaError(
            f"{label} is too large: {error}", "Use smaller repetitions and shorter lengths.", exit_code=2
        ) from None
    finally:
        _end.reset(before)


def check_time() -> None:
    """Raise ``TooLargeError`` when the block of ``compiling`` around the call has used up its time.

    Every loop of the compiler calls this. Outside such a block it does nothing.
    """
    if time.thread_time() > _end.get():
        raise TooLargeError(f"it takes more than {MOST_SECONDS:.0f} seconds to compile")


def give_up(problem: str) -> None:
    """Raise ``TooLargeError`` in a block of ``compiling``. Outside such a block it does nothing."""
    if _end.get() < inf:
        raise TooLargeError(problem)
