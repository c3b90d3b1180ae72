"""The prompt, from the command line and standard input."""

from __future__ import annotations

import sys

from dgemma_mlx.checks import is_text
from dgemma_mlx.errors import DgemmaError

_HINT = 'Write it after the command: dgemma-mlx generate "...", or pipe it in.'


def read_prompt(argument: str | None) -> str:
    """The argument, standard input, or both joined (argument first); ``-`` or None is standard input alone.

    A terminal is read only where ``-`` asks for it.
    """
    piped = "" if sys.stdin.isatty() and argument != "-" else _read_stdin()
    given = "" if argument is None or argument == "-" else argument
    if not is_text(given):
        raise DgemmaError("the prompt is not UTF-8 text", exit_code=2)
    prompt = "\n\n".join(part for part in (given.strip(), piped.strip()) if part)
    if not prompt:
        raise DgemmaError("the prompt is empty", _HINT, exit_code=2)
    return prompt


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DgemmaError(f"standard input is not UTF-8 text (byte {error.start})", exit_code=2) from None
