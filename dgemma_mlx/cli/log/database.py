"""The SQLite file of the log: how it is opened, what its tables are, and what its errors are called."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma_mlx.checks import reason
from dgemma_mlx.cli.state import own_folder
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    import sqlite3

VERSION = 2
_APPLICATION = 0x6447656D  # "dGem": which program's file this is
_PATIENCE = 10  # seconds to wait for another program that writes
# A message without a position is no longer a part of its conversation: it was undone, or answered again. ``marks`` is
# a JSON object of its other keys, and ``answer`` one of an answer's model, seed, finish_reason and statistics.
# The file of an image is stored once, whichever messages show it (since version 2).
_IMAGES = """
    CREATE TABLE images (sha256 TEXT PRIMARY KEY, data BLOB NOT NULL);
    CREATE TABLE image_uses (
        message INTEGER NOT NULL REFERENCES messages ON DELETE CASCADE, sha256 TEXT NOT NULL REFERENCES images,
        PRIMARY KEY (message, sha256)
    ) WITHOUT ROWID;
    CREATE INDEX image_uses_by_image ON image_uses (sha256);
"""
_SCHEMA = f"""
    CREATE TABLE conversations (
        id TEXT PRIMARY KEY, name TEXT UNIQUE, kind TEXT NOT NULL, model TEXT, system TEXT, settings TEXT NOT NULL,
        created REAL NOT NULL, changed REAL NOT NULL, revision INTEGER NOT NULL
    );
    CREATE INDEX conversations_by_change ON conversations (changed);
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY, conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE,
        position INTEGER, time REAL NOT NULL, role TEXT NOT NULL, content TEXT, marks TEXT NOT NULL, answer TEXT,
        UNIQUE (conversation, position)
    );
    {_IMAGES}
    PRAGMA application_id = {_APPLICATION};
    PRAGMA user_version = {VERSION};
"""
_HINTS = {
    "locked": "Another program is writing to it. Try again.",
    "full": "Free some space.",
}


@contextmanager
def opened(path: Path, *, create: bool) -> Iterator[sqlite3.Connection]:
    """Yield a connection to the file within one transaction, which is committed unless the block raises.

    Only the owner can read a file that is created, and its journal. Without ``create``, a missing file is an empty
    database in memory. Raises `DgemmaError`, and changes nothing, when the file cannot be read or written, is damaged,
    or is that of another program or of a later version of this one.
    """
    try:
        import sqlite3
    except ImportError:
        raise DgemmaError("this Python was built without SQLite", "DGEMMA_LOG=off keeps no answers.") from None
    try:
        if create and not os.path.exists(path):
            own_folder(path.parent)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        name = path if os.path.exists(path) else ":memory:"
        with closing(sqlite3.connect(name, timeout=_PATIENCE, isolation_level=None)) as connection:
            connection.text_factory = lambda data: data.decode(errors="surrogateescape")  # ``log`` finds such damage
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")  # what is removed is overwritten
            _check_version(connection, path, upgrade=create)
            connection.execute("BEGIN IMMEDIATE" if create else "BEGIN")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise _error(error, path) from None
    except UnicodeDecodeError as error:  # of a message of SQLite that quotes a damaged table
        raise damaged(path, reason(error)) from None
    except OSError as error:
        raise DgemmaError(f"cannot write {path}: {reason(error)}", "DGEMMA_STATE names another folder.") from None


def _check_version(connection: sqlite3.Connection, path: Path, *, upgrade: bool) -> None:
    """Create the tables of an empty file. Raise `DgemmaError` for a file that this version cannot read.

    With ``upgrade``, a file of an earlier version gets the tables that it lacks.
    """
    version, application = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "application_id")
    )
    if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        _change(connection, 0, _SCHEMA)
    elif application != _APPLICATION:
        raise DgemmaError(f"{path} is the database of another program", "Move it away, or set DGEMMA_STATE.")
    elif version > VERSION:
        raise DgemmaError(f"{path} was written by a later version of dgemma-mlx", "Update this one.")
    elif upgrade and version < VERSION:
        _change(connection, version, f"{_IMAGES} PRAGMA user_version = {VERSION};")


def _change(connection: sqlite3.Connection, version: int, statements: str) -> None:
    """Change the tables of a file of this version, unless another process has just done so."""
    connection.execute("BEGIN IMMEDIATE")
    if connection.execute("PRAGMA user_version").fetchone()[0] == version:
        for statement in statements.split(";"):
            connection.execute(statement)
    connection.execute("COMMIT")


def damaged(path: Path, problem: str) -> DgemmaError:
    """Return the error that the whole file is damaged."""
    return DgemmaError(f"{path} is damaged: {problem}", "It was left as it is. Move it away to begin a new one.")


def _error(error: sqlite3.Error, path: Path) -> DgemmaError:
    """Return the error that says what is wrong with the file."""
    import sqlite3

    if type(error) is sqlite3.DatabaseError:  # and not one of its subclasses: damaged, or no database at all
        return damaged(path, str(error))
    hint = next((hint for word, hint in _HINTS.items() if word in str(error)), "Check its permissions, and the disk.")
    return DgemmaError(f"cannot use {path}: {error}", hint)
