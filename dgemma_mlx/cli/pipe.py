"""Standard streams that are closed at the start, closed early by their reader, or full."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dgemma_mlx.errors import DgemmaError


def reopen_streams() -> None:
    """Open the null device for each closed standard stream, so that no other file gets its descriptor."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


@contextmanager
def quiet_when_closed() -> Iterator[None]:
    """End the block quietly when the reader of stdout closes it early, as ``| head`` does.

    Commands use it themselves because Typer turns the error into exit code 1. Raises `DgemmaError` when a disk is full.
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
    """Redirect stdout to the null device, so that flushing the rest of the buffer does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
