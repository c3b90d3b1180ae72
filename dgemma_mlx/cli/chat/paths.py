"""Paths in a line of a chat, as people type them and as Finder and terminals paste them."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError

_SPECIAL = re.compile(r"""([\s\\'"])""")
_LAST_WORD = re.compile(r"""(?:^|(?<=\s))(?:[^\s\\'"]|\\.)*\\?$""")  # with its escaped characters


def paths_of(text: str, usage: str) -> list[Path]:
    """Return the paths that follow a command, each with its ``~`` expanded.

    They are separated by white space; a backslash or quotation marks keep it. One path that exists needs neither.
    Raises `DgemmaError` when there is no path.
    """
    if "\0" not in text and os.path.exists(os.path.expanduser(text)):
        words = [text] if text else []
    else:
        try:
            words = shlex.split(text)
        except ValueError:
            hint = r"""Put a name with ' or " in it into the other marks, or write \ before them."""
            raise DgemmaError(f"a quotation mark is open: {shown(text)}", hint) from None
    paths = [Path(os.path.expanduser(word)) for word in words]
    if not paths or "\0" in text or not all(path.name or path.is_dir() for path in paths):
        raise DgemmaError("which file?", f"Write {usage}.")
    return paths


def path_of(text: str, usage: str) -> Path:
    """Return the one path that follows a command, which may hold spaces as it stands.

    Raises `DgemmaError` when there is no path, or several are quoted or escaped.
    """
    if not re.search(r"""[\\'"]""", text):
        path = Path(os.path.expanduser(text))
        if not path.name or "\0" in text:
            raise DgemmaError("which file?", f"Write {usage}.")
        return path
    found = paths_of(text, usage)
    if len(found) > 1:
        raise DgemmaError(f"{len(found)} files are named", f"Write {usage}.")
    return found[0]


def last_word(text: str) -> str | None:
    """Return the unescaped path that a text ends with, or None within quotation marks."""
    found = _LAST_WORD.search(text)
    return None if found is None else re.sub(r"\\(.)", r"\1", found[0])


def escaped(text: str) -> str:
    """Return a part of a path with a backslash before each character that would end or begin a word."""
    return _SPECIAL.sub(r"\\\1", text)
