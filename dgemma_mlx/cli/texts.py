"""Read, compare and write the text files of ``fill`` and ``edit``."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.stdin import BOM, read_stdin
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import locked_path, write_whole
from dgemma_mlx.infill.template import lines_of

_COLOURS = {"+": "32", "-": "31", "@": "36"}


def is_stdin(path: Path | None) -> bool:
    """Return whether the path means standard input: None or ``-``."""
    return path is None or str(path) == "-"


def read_text(path: Path | None) -> str:
    """Return the text of a file with its line ends and its byte order mark unchanged.

    None or ``-`` reads standard input. Raises `DgemmaError` (exit code 2) when the file cannot be read or is not UTF-8
    text.
    """
    name = "standard input" if is_stdin(path) else str(path)
    try:
        if path is None or is_stdin(path):
            if path is None and sys.stdin.isatty():
                raise DgemmaError("there is no text", "Name a file, or pipe the text in.", exit_code=2)
            return read_stdin()
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        hint = "Name a file that can be read; a text itself is piped in."
        raise DgemmaError(f"cannot read {name}: {error.strerror}", hint, exit_code=2) from None
    except UnicodeDecodeError as error:
        raise DgemmaError(f"{name} is not UTF-8 text (byte {error.start})", "Convert it to UTF-8.", 2) from None


def without_bom(text: str) -> tuple[str, str]:
    """Return the text's byte order mark, or "", and the text after it."""
    return (BOM, text[1:]) if text.startswith(BOM) else ("", text)


def save_text(path: Path, text: str, before: str) -> None:
    """Replace the text of a file, completely or not at all. Of several processes at once, only one does.

    Raises `DgemmaError` when the file no longer holds the text ``before``, or when it cannot be written.
    """
    try:
        with locked_path(path):
            if read_text(path) != before:
                raise DgemmaError(f"{path} has changed in the meantime", "Nothing was written. Run the command again.")
            write_whole(path, text)
    except OSError as error:
        raise DgemmaError(f"cannot write {path}: {error.strerror}", "The file is as it was.") from None


def print_exact(text: str) -> None:
    """Print the text unchanged to a pipe or file. On a terminal, make it safe and end it with a line feed."""
    if sys.stdout.isatty():
        print(visible(text), end="" if text.endswith("\n") else "\n")
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()


def print_diff(before: str, after: str, name: str, coloured: bool) -> None:
    """Print a unified diff that ``patch`` accepts."""
    for line in unified(before, after, name):
        if coloured and (colour := _COLOURS.get(line[0])):
            body = visible(line.rstrip("\n"))
            print(f"\x1b[{colour}m{body}\x1b[0m")
        else:
            print_exact(line)


def unified(before: str, after: str, name: str) -> Iterator[str]:
    """Yield the lines of a unified diff, each with a line feed."""
    for line in difflib.unified_diff(lines_of(before), lines_of(after), f"a/{name}", f"b/{name}"):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
