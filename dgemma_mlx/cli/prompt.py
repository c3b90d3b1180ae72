"""The prompt, from the command line and from standard input."""

from __future__ import annotations

import sys

from dgemma_mlx.checks import is_text
from dgemma_mlx.cli.stdin import BOM, read_beside_prompt, read_stdin
from dgemma_mlx.errors import DgemmaError

_HINT = 'Write it in quotes after the command, or pipe it in.'


def read_prompt(argument: str | None) -> str:
    """Return the argument, standard input, or both joined with the argument first.

    With ``-`` or None, the prompt is standard input alone. A terminal is read only when the argument is ``-``. Next to
    another argument, standard input is read as ``read_beside_prompt`` says. A byte order mark is not part of the
    prompt. Raises `DgemmaError` (exit code 2) when the prompt is empty or not UTF-8 text.
    """
    given = "" if argument is None or argument == "-" else argument
    if not is_text(given):
        raise DgemmaError("the prompt is not UTF-8 text", "Convert it to UTF-8.", exit_code=2)
    piped = ""
    if given.strip():
        piped = read_beside_prompt()
    elif argument == "-" or not sys.stdin.isatty():
        piped = read_stdin()
    prompt = "\n\n".join(part for part in (given.strip(), piped.removeprefix(BOM).strip()) if part)
    if not prompt:
        raise DgemmaError("the prompt is empty", _HINT, exit_code=2)
    return prompt
