"""What every reader of outside data promises: the data is accepted, or refused in one clear line, soon and cheaply."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgemma_mlx.errors import DgemmaError

MOST_SECONDS = 2.0  # of CPU time, which other processes do not change much
MOST_BYTES = 500_000_000
MOST_CHARACTERS = 600  # of a message; a path of a temporary folder is in it
_UNCLEAR = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|\[Errno|Traceback|unexpected \w+Error")


def keeps(read: Callable[..., Any], *arguments: Any, folder: Path | None = None) -> DgemmaError | None:
    """Call a reader and return the error with which it refused its data, or None.

    Asserts that the error is one line with a hint and exit code 1 or 2, that the call takes at most 2 s of CPU time and
    500 MB more than the process had taken before, and that nothing in ``folder`` changes. Other exceptions pass.
    """
    before = None if folder is None else _state(folder)
    memory, started = _peak(), time.process_time()
    refused = None
    try:
        read(*arguments)
    except DgemmaError as error:
        refused = error
    assert time.process_time() - started < MOST_SECONDS
    assert _peak() - memory < MOST_BYTES
    assert folder is None or _state(folder) == before
    if refused is not None:
        check_lines(refused.message, refused.hint)
        assert refused.exit_code in (1, 2)
    return refused


def check_lines(message: str, hint: str) -> None:
    """Assert that an error's message and hint are clear: one short line each, without another program's words."""
    for line in (message, hint):
        assert line.strip()
        assert not _UNCLEAR.search(line), line
    assert len(message) <= MOST_CHARACTERS, f"{len(message)} characters: {message[:MOST_CHARACTERS]}"


def _peak() -> int:
    """Return the largest size that this process has had in memory, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of everything in a folder."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}
