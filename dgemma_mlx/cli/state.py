"""The folder of what the program keeps between runs: typed messages and conversations."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dgemma_mlx.checks import reason
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.settings import APP

STATE_VARIABLE = "DGEMMA_STATE"


def state_folder() -> Path:
    """Return the platform's folder for a program's state, or the folder that DGEMMA_STATE names. Nothing is created."""
    if named := os.environ.get(STATE_VARIABLE):
        return Path(os.path.expanduser(named))
    from platformdirs import user_state_path

    return user_state_path(APP)


def own_folder(folder: Path) -> None:
    """Create a folder that only its owner can read, unless it is there. Raises ``OSError``."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def history_file() -> Path | None:
    """Return the file of the typed messages. When it cannot be written, print a warning and return None."""
    folder = state_folder()
    path = folder / "history"
    try:
        own_folder(folder)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error:
        print(visible(f"what you type will not be kept: cannot write {folder}: {reason(error)}"), file=sys.stderr)
        return None
    return path
