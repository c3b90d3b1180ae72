"""Standard streams that are closed, close early, or are full."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dgemma_mlx.errors import DgemmaError


def reopen_streams() -> None:
    """Opens the null device for each standard stream that is closed, lest another file gets its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


@contextmanager
def quiet_when_closed() -> Iterator[None]:
    """Ends the block quietly when the reader of stdout has what it wanted (``| head``).

    Inside a command, because Typer turns the error into exit code 1. A full disk is a ``DgemmaError``.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        raise DgemmaError(f"cannot write the output: {error.strerror}", "Free some space.") from None


def _drop_output() -> None:
    """What is still buffered goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
