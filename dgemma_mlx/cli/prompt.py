"""The prompt, from the command line, from files and from standard input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from dgemma_mlx.checks import is_text
from dgemma_mlx.cli.parameters import prompt_option
from dgemma_mlx.cli.stdin import BOM, read_beside_prompt, read_stdin
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import counted

_HINT = "Write it in quotes after the command, or pipe it in."
_HINT_FILES = "Say in quotes what to do with the files; `dgemma-mlx generate - < FILE` takes a file as the prompt."
_STDIN = Path("-")

Files = Annotated[
    list[Path] | None,
    prompt_option("--file", "-f", metavar="FILE",
                  help="Show the model this text file, or the text files of this folder; `-` is standard input. May be "
                       "given several times."),
]  # fmt: skip


def read_prompt(
    argument: str | None, files: Sequence[Path] | None = None, fill_in: Callable[[str], str] = str, *,
    optional: bool = False, quiet: bool = False, stdin_is_taken: bool = False,
) -> str:
    """Return the text that the model answers: the files, then the argument, then standard input.

    With ``-`` or None, the prompt is standard input alone. A terminal is read only when the argument or a file is
    ``-``. Next to another argument, standard input is read as ``read_beside_prompt`` says, and a line on stderr says
    how much of it follows the prompt. A byte order mark is not part of the prompt.

    Args:
        argument: The argument of the command.
        files: Files and folders, which stand before the rest as ``with_attachments`` says. ``-`` is standard input,
            which then does not follow the argument.
        fill_in: A function that puts the argument and standard input into a template.
        optional: Whether the argument and standard input may be missing, because the template has a text of its own.
        quiet: Whether standard input is read without the line that says so.
        stdin_is_taken: Whether standard input is something else, a picture.

    Raises:
        DgemmaError: (exit code 2) When the prompt is empty or not UTF-8 text, or when a file cannot be read.
    """
    files = files or ()
    given = "" if argument is None or argument == "-" else argument.strip()
    if not is_text(given):
        raise DgemmaError("the prompt is not UTF-8 text", "Convert it to UTF-8.", exit_code=2)
    piped = ""
    if _STDIN in files or stdin_is_taken:
        pass  # it is one of the files, or a picture
    elif given or (optional and argument != "-"):
        piped = read_beside_prompt()
    elif argument == "-" or not sys.stdin.isatty():
        piped = read_stdin()
    piped = piped.removeprefix(BOM).strip()
    if not (given or piped or optional):
        raise DgemmaError("the prompt is empty", _HINT_FILES if files else _HINT, exit_code=2)
    if given and piped and not quiet:  # in a loop over a pipe, these are its other lines
        count = counted(len(piped), "character")
        print(f"dgemma-mlx: standard input follows the prompt, {count}", file=sys.stderr)
    prompt = fill_in("\n\n".join(part for part in (given, piped) if part))
    if not files:
        return prompt
    from dgemma_mlx.cli.attachments import Attachment, read_attachments, with_attachments

    attachments = read_attachments(path for path in files if path != _STDIN)
    if _STDIN in files:
        attachments.append(Attachment("standard input", read_stdin().removeprefix(BOM)))
    return with_attachments(prompt, attachments)
