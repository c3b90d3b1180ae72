"""Atomic writing of files and folders: one is written completely or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dgemma_mlx.errors import DgemmaError


def write_whole(path: Path, text: str) -> None:
    """Write text to a file as UTF-8, completely or not at all, and create the folder if necessary.

    See ``whole_file``. Raises ``OSError``.
    """
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file to write to, which replaces ``path`` when the block ends without an exception.

    After an exception ``path`` is unchanged. The folder is created if necessary. An existing file keeps its
    permissions, and a symbolic link keeps pointing to the file that is replaced. What is not a regular file (a FIFO, a
    device, ``/dev/stdout``) is written to as the block runs, and never replaced. Raises ``OSError``.
    """
    if (stream := _stream_at(path)) is not None:
        with stream:
            yield stream
        return
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
    if os.path.exists(path) and not os.path.isfile(path):
        return  # opening a FIFO would wait for its reader
    with _unfinished(Path(os.path.realpath(path))) as other:
        other.open("wb").close()


def replace_folder(new: Path, target: Path) -> None:
    """Rename a complete folder to ``target``, and remove the folder that is there, if any.

    Both lie in the same folder. ``target`` is one of the two at any time, where the system can exchange names (macOS
    and Linux on their usual disks). Elsewhere the old one is called ``.NAME.old`` for a moment; ``recover_folder``
    brings it back after a crash. Raises ``OSError``.
    """
    old = _old(target)
    sync_folder(new)
    shutil.rmtree(old, ignore_errors=True)
    if not target.exists():
        new.rename(target)
    elif _exchange(new, target):
        new.rename(old)
    else:
        target.rename(old)
        new.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Bring back the old folder if a crash within ``replace_folder`` has left ``target`` without any."""
    if not target.exists() and _old(target).is_dir():
        _old(target).rename(target)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create a folder if necessary, and lock it while the block runs.

    Raises ``DgemmaError`` if another process holds the lock, and ``OSError`` if the folder cannot be created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_free = False
        except OSError:  # a disk without locks, as on some networks
            is_free = True
        else:  # free, unless the process that had locked it has just renamed it
            is_free = os.path.exists(folder) and os.path.samestat(os.fstat(descriptor), os.stat(folder))
        if not is_free:
            raise DgemmaError(f"another process is writing {folder}", "Wait until it ends, or stop it.")
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so that renames in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked_path(path: Path) -> Iterator[None]:
    """Lock an existing file or folder while the block runs, after waiting for the process that has locked it.

    The block must read a file again if it is to replace it: another process may have replaced it before. On a disk
    without locks, nothing is locked. Raises ``OSError`` if the path cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _stream_at(path: Path) -> BinaryIO | None:
    """Open what a path leads to for writing if it is not a regular file. Return None for a regular or missing file.

    The process's own output, by whatever name, is written through its descriptor: a second one would have a position of
    its own and overwrite what the first has written.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError):
            if stream is not None and os.path.samestat(found, os.fstat(descriptor)):
                stream.flush()
                return os.fdopen(os.dup(descriptor), "wb")
    return None if os.path.isfile(path) or os.path.isdir(path) else path.open("wb")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step. Return False where the system or the disk cannot."""
    import ctypes  # needed only here, and not by most commands

    names = os.fsencode(one), os.fsencode(other)
    library = ctypes.CDLL(None)
    try:
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, 2) == 0)  # RENAME_SWAP
        return bool(library.renameat2(-100, names[0], -100, names[1], 2) == 0)  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:
        return False


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
def is_clutter(path: Path) -> bool:
    """Return whether a file is one that macOS adds to a folder by itself: ``.DS_Store``, or ``._NAME`` beside NAME."""
    return path.name == ".DS_Store" or path.name.startswith("._")


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, and remove the file at that path afterwards.

    The folder is created if necessary.
    """
    # Not the process's number: another thread, or a process of another container, may write the same file.
    other = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield other
    finally:
        with suppress(OSError):
            other.unlink(missing_ok=True)
