"""Open a file in the user's text editor."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from dgemma_mlx.checks import reason, shown
from dgemma_mlx.errors import DgemmaError

_HINT = "EDITOR or VISUAL names the editor to open, such as nano, or code --wait."


def require_terminal(hint: str) -> None:
    """Raise `DgemmaError` (exit code 2) with a hint when stdin is not a terminal, in which an editor could run."""
    if not sys.stdin.isatty():
        raise DgemmaError("cannot open an editor, because stdin is not a terminal", hint, exit_code=2)


def edit_file(path: Path) -> None:
    """Open a file in the editor that VISUAL or else EDITOR names, by default vi, and wait until it is closed.

    Raises `DgemmaError` when stdin is not a terminal (exit code 2), or when the editor cannot be started or fails.
    """
    require_terminal(f"Write {path}.")
    import subprocess

    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        code = subprocess.run([*shlex.split(command), str(path)], check=False).returncode
    except (OSError, ValueError) as error:  # ValueError: a quotation mark that is not closed
        raise DgemmaError(f"cannot start the editor {shown(command)}: {reason(error)}", _HINT) from None
    if code:
        raise DgemmaError(f"the editor {shown(command)} failed (exit code {code})", _HINT)
