"""The conversation that earlier versions of the program have kept: only the last one, as a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from dgemma_mlx.checks import reason
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.errors import DgemmaError

EARLIER = "last_session.json"


def take_over(file: Path, save: Callable[[Session, float], None]) -> None:
    """Store the conversation of a file with ``save``, which also takes the time of its last change.

    The file stays, under another name. One that cannot be read is named in a line on stderr. Raises `DgemmaError`, and
    leaves the file as it was, when the conversation cannot be stored.
    """
    moved = file.with_name("last_session.old.json")
    try:
        changed = file.stat().st_mtime
        file.rename(moved)  # first, so that only one of several processes stores it
    except FileNotFoundError:  # another process was faster
        return
    except OSError as error:
        raise DgemmaError(f"cannot rename {file}: {reason(error)}", "DGEMMA_STATE names another folder.") from None
    try:
        session = Session.load(moved)
    except DgemmaError as error:
        print(f"dgemma-mlx: {error.message}; it is kept, but is not in the list of conversations", file=sys.stderr)
        return
    try:
        if session.messages:
            save(session, changed)
    except DgemmaError:
        os.rename(moved, file)
        raise
