"""Reading of standard input, which may be a file, a pipe that is filled slowly, or one that nobody ever closes.

It is a text, or the bytes of a picture.
"""

from __future__ import annotations

import os
import select
import stat
import sys

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import size

BOM = "\ufeff"

_SAY_AFTER = 1.0  # seconds without any text after which a line says what is waited for
_PATIENCE = 5.0  # seconds in which a pipe must begin, when there is a prompt without it
_BLOCK = 1 << 16  # bytes
_MOST_BYTES = 64 * 10**6


def read_stdin() -> str:
    """Return standard input as text, to its end.

    After a moment, a line on stderr says that it is waited for. Raises `DgemmaError` (exit code 2) when it is not
    UTF-8 or is too long.
    """
    descriptor = sys.stdin.fileno()
    if not sys.stdin.isatty() and not _has_text(descriptor, _SAY_AFTER):
        _say("waiting for text on standard input")
    return _text(_read(descriptor))


def read_stdin_bytes(option: str) -> bytes:
    """Return standard input to its end, as the file that an option asks for.

    After a moment, a line on stderr says that it is waited for. Raises `DgemmaError` (exit code 2) for a terminal, and
    when it is too long.
    """
    if sys.stdin.isatty():
        raise DgemmaError(f"{option} reads standard input, which is a terminal", "Pipe a file in, as in < FILE.", 2)
    descriptor = sys.stdin.fileno()
    if not _has_text(descriptor, _SAY_AFTER):
        _say("waiting for an image on standard input")
    return _read(descriptor)


def read_beside_prompt() -> str:
    """Return standard input where it is meant to follow a prompt, else "".

    That is a file that nobody has begun to read: of a loop like ``while read``, the file is at a later line. A pipe
    must begin within five seconds, which a line on stderr announces. A socket, which is what ``ssh`` gives a program
    whether or not there is text, must begin within one second. A terminal is not read, and what is none of these must
    have text at once. Raises `DgemmaError` (exit code 2) when it is not UTF-8 or is too long.
    """
    descriptor = sys.stdin.fileno()
    mode = os.fstat(descriptor).st_mode
    if sys.stdin.isatty() or (stat.S_ISREG(mode) and os.lseek(descriptor, 0, os.SEEK_CUR) > 0):
        return ""
    if _has_text(descriptor, _SAY_AFTER if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else 0):
        return _text(_read(descriptor))
    if not stat.S_ISFIFO(mode):
        return ""
    _say(f"waiting up to {_PATIENCE:.0f} s for text on standard input; `< /dev/null` says that there is none, "
         "`-f -` waits for it")  # fmt: skip
    if _has_text(descriptor, _PATIENCE - _SAY_AFTER):
        return _text(_read(descriptor))
    _say("nothing came on standard input, so the prompt is answered without it")
    return ""


def _has_text(descriptor: int, seconds: float) -> bool:
    """Return whether text, or the end, arrives within a number of seconds."""
    return bool(select.select([descriptor], [], [], seconds)[0])


def _read(descriptor: int) -> bytes:
    """Return everything up to the end, and say so when it takes a pause."""
    blocks, length, said = [], 0, False
    while block := os.read(descriptor, _BLOCK):
        blocks.append(block)
        length += len(block)
        if length > _MOST_BYTES:
            raise DgemmaError(f"standard input is longer than {size(_MOST_BYTES)}", "Pipe in less.", exit_code=2)
        if not said and not sys.stdin.isatty() and not _has_text(descriptor, _SAY_AFTER):
            said = True
            _say("waiting for the end of standard input")
    return b"".join(blocks)


def _text(data: bytes) -> str:
    """Return standard input as text. Raises `DgemmaError` (exit code 2) when it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"standard input is not UTF-8 text (byte {error.start})"
        raise DgemmaError(message, "Convert it to UTF-8.", exit_code=2) from None


def _say(message: str) -> None:
    """Print a line to stderr."""
    print(f"dgemma-mlx: {message}", file=sys.stderr, flush=True)
