"""Standard streams that are closed at the start, closed early by their reader, full, or not UTF-8."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dgemma_mlx.errors import DgemmaError

_REPLACE = "dgemma-replace"  # the name of the codec error handler


def prepare_streams() -> None:
    """Open the null device for each closed standard stream, and let stdout replace what its encoding lacks.

    A closed stream's descriptor would go to another file. The first replacement prints a warning.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        codecs.register_error(_REPLACE, _Replacement())
        sys.stdout.reconfigure(errors=_REPLACE)


class _Replacement:
    """Replaces the characters that stdout cannot encode, as the codec error handler "replace", and warns once."""

    def __init__(self) -> None:
        self._warned = False

    def __call__(self, error: UnicodeError) -> tuple[str | bytes, int]:
        if not self._warned:
            self._warned = True
            print(f"dgemma-mlx: stdout is {sys.stdout.encoding}: each character that it lacks is written as '?'; "
                  "PYTHONIOENCODING=utf-8 keeps them all", file=sys.stderr)  # fmt: skip
        return codecs.replace_errors(error)


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
