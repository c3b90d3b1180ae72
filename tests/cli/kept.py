"""What the program has kept in a folder for state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.cli.log.log import Log
from dgemma_mlx.cli.log.session import Session


def log_of(state: Path) -> Log:
    """Return the log in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGEMMA_STATE", str(state))
        return Log()


def last_session(state: Path) -> Session:
    """Return the conversation that was changed last."""
    log = log_of(state)
    id = log.last()
    assert id is not None
    return log.load(id)


def messages(state: Path) -> list[dict[str, Any]]:
    """Return the messages of the conversation that was changed last."""
    return last_session(state).messages
