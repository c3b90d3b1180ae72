"""Files written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 under another name and renames it; makes the folder where there is none. Raises OSError."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """The same for bytes: a file to write to, which becomes ``path`` when the block has ended well.

    Of a file that is there, the permissions stay; of a link, the file that it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    with _unfinished(path) as other:
        with other.open("wb") as file:
            yield file
        if path.exists():
            shutil.copymode(path, other)
        other.replace(path)


def check_writable(path: Path) -> None:
    """Raises the OSError that writing the file would begin with, before there is anything to write."""
    with _unfinished(path) as other:
        other.open("wb").close()


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A name beside ``path``, in a folder that is there; nothing is left under it."""
    other = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield other
    finally:
        with suppress(OSError):
            other.unlink(missing_ok=True)
