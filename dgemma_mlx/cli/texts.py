"""Files of text as fill and edit read, compare and write them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import write_whole
from dgemma_mlx.infill.template import lines_of

_COLOURS = {"+": "32", "-": "31", "@": "36"}


def is_stdin(path: Path | None) -> bool:
    return path is None or str(path) == "-"


def read_text(path: Path | None) -> str:
    """A file's text, line ends as they are; None or ``-`` is standard input. ``DgemmaError`` where it is no UTF-8."""
    name = "standard input" if is_stdin(path) else str(path)
    try:
        if path is None or is_stdin(path):
            if path is None and sys.stdin.isatty():
                raise DgemmaError("there is no text", "Name a file, or pipe the text in.", exit_code=2)
            return sys.stdin.buffer.read().decode("utf-8")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DgemmaError(f"cannot read {name}: {error.strerror}", exit_code=2) from None
    except UnicodeDecodeError as error:
        raise DgemmaError(f"{name} is not UTF-8 text (byte {error.start})", exit_code=2) from None


def save_text(path: Path, text: str, before: str) -> None:
    """Replaces the file's text, whole or not at all; refuses where it is no longer what it was ``before``."""
    if read_text(path) != before:
        raise DgemmaError(f"{path} has changed meanwhile", "Nothing was written; run it again.")
    try:
        write_whole(path, text)
    except OSError as error:
        raise DgemmaError(f"cannot write {path}: {error.strerror}") from None


def print_exact(text: str) -> None:
    """The text as it is to a pipe or file; to a terminal made safe and ended with a line."""
    if sys.stdout.isatty():
        print(visible(text), end="" if text.endswith("\n") else "\n")
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()


def print_diff(before: str, after: str, name: str, coloured: bool) -> None:
    """A unified diff, as patch takes it."""
    for line in unified(before, after, name):
        if coloured and (colour := _COLOURS.get(line[0])):
            body = visible(line.rstrip("\n"))
            print(f"\x1b[{colour}m{body}\x1b[0m")
        else:
            print_exact(line)


def unified(before: str, after: str, name: str) -> Iterator[str]:
    """Its lines, each with a line feed."""
    for line in difflib.unified_diff(lines_of(before), lines_of(after), f"a/{name}", f"b/{name}"):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
