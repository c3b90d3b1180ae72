"""The prompt, from the command line and from standard input."""

from __future__ import annotations

import sys

from dgemma_mlx.checks import is_text
from dgemma_mlx.errors import DgemmaError

_HINT = 'Write it in quotes after the command, or pipe it in.'


def read_prompt(argument: str | None) -> str:
    """Return the argument, standard input, or both joined with the argument first.

    With ``-`` or None, the prompt is standard input alone. A terminal is read only when the argument is ``-``. Raises
    `DgemmaError` (exit code 2) when the prompt is empty or not UTF-8 text.
    """
    piped = "" if sys.stdin.isatty() and argument != "-" else _read_stdin()
    given = "" if argument is None or argument == "-" else argument
    if not is_text(given):
        raise DgemmaError("the prompt is not UTF-8 text", "Convert it to UTF-8.", exit_code=2)
    prompt = "\n\n".join(part for part in (given.strip(), piped.strip()) if part)
    if not prompt:
        raise DgemmaError("the prompt is empty", _HINT, exit_code=2)
    return prompt


def _read_stdin() -> str:
    """Return standard input as text. Raises `DgemmaError` (exit code 2) when it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"standard input is not UTF-8 text (byte {error.start})"
        raise DgemmaError(message, "Convert it to UTF-8.", exit_code=2) from None
