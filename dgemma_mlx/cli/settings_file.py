"""Changes of single settings in ``config.toml``, which keep the other lines, their order and the comments."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from dgemma_mlx.checks import reason
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import locked_folder, write_whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_BOM = "\ufeff"


def change_setting(path: Path, name: str, value: Any) -> bool:
    """Set one setting in a settings file, or remove it when the value is None. Return whether the file has changed.

    The file is created if necessary. A comment after the value stays. Raises `DgemmaError`, without a change, when the
    file cannot be read or written, when another process is changing it, and when it holds settings that are not valid
    (exit code 2).
    """
    try:
        with locked_folder(Path(os.path.realpath(path)).parent):
            before = ""
            if path.exists():
                Settings({}, path)  # what cannot be read is not changed
                before = path.read_bytes().decode()  # with its line ends
            after = changed(before, name, value)
            if after != before:
                write_whole(path, after)
    except OSError as error:
        raise DgemmaError(f"cannot write {path}: {reason(error)}", "Check its permissions, and the disk.") from None
    return after != before


def changed(text: str, name: str, value: Any) -> str:
    """Return the text of a settings file with another value of a setting, or without the setting if it is None."""
    mark = _BOM if text.startswith(_BOM) else ""
    statements = _statements(text.removeprefix(_BOM))
    end = "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"
    place = next((i for i, statement in enumerate(statements) if name in tomllib.loads(statement)), None)
    if value is None:
        new = ""
    elif place is None:
        new = f"{name} = {_toml(value)}{end}"
    else:
        new = f"{name} = {_toml(value)}{_comment(statements[place])}{end}"
    if place is not None:
        statements[place] = new
    elif new:
        if statements and not statements[-1].endswith("\n"):
            statements[-1] += end
        statements.append(new)
    return mark + "".join(statements)


def _statements(text: str) -> list[str]:
    """Split TOML without tables into its statements, comments and empty lines. A text of several lines is one part."""
    parts, part = [], ""
    for line in text.splitlines(keepends=True):
        part += line
        try:
            tomllib.loads(part)
        except ValueError:
            continue
        parts.append(part)
        part = ""
    return parts


def _comment(statement: str) -> str:
    """Return the comment after the value of a statement, with the spaces before it, or an empty text."""
    line = statement.rstrip("\r\n")
    value = tomllib.loads(line)
    place = line.find("#")
    while place >= 0:
        try:
            if tomllib.loads(line[:place]) == value:
                kept = line[:place].rstrip()
                return line[len(kept) :]
        except ValueError:
            pass
        place = line.find("#", place + 1)
    return ""


def _toml(value: Any) -> str:
    """Return a text, number or truth value as TOML, which writes them as JSON does except for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
