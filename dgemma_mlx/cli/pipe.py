"""Standard output that may close early."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_when_closed() -> Iterator[None]:
    """Ends the block quietly when the reader of stdout has what it wanted (``| head``).

    Inside a command, because Typer turns the error into exit code 1.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
