"""Atomic writing of files: a file is written completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, text: str) -> None:
    """Write text to a file as UTF-8, completely or not at all, and create the folder if necessary.

    The text is written under a temporary name in the same folder, which is then renamed. Raises ``OSError``.
    """
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file to write to, which replaces ``path`` when the block ends without an exception.

    After an exception ``path`` is unchanged. The folder is created if necessary. An existing file keeps its
    permissions, and a symbolic link keeps pointing to the file that is replaced. Raises ``OSError``.
    """
    path = Path(os.path.realpath(path))
    with _unfinished(path) as other:
        with other.open("wb") as file:
            yield file
        if path.exists():
            shutil.copymode(path, other)
        other.replace(path)


def check_writable(path: Path) -> None:
    """Check that ``path`` can be written, by creating and removing a temporary file in its folder.

    The folder is created if necessary. Raises the ``OSError`` that writing would raise.
    """
    with _unfinished(path) as other:
        other.open("wb").close()


def is_clutter(path: Path) -> bool:
    """Return whether a file is one that macOS adds to a folder by itself: ``.DS_Store``, or ``._NAME`` beside NAME."""
    return path.name == ".DS_Store" or path.name.startswith("._")


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, and remove the file at that path afterwards.

    The folder is created if necessary.
    """
    other = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield other
    finally:
        with suppress(OSError):
            other.unlink(missing_ok=True)
