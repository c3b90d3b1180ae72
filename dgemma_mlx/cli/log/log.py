"""The conversations of the log: stored, found, listed, renamed and removed."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from time import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dgemma_mlx.checks import is_text, is_whole, reason, shown
from dgemma_mlx.cli.images import without_data
from dgemma_mlx.cli.log.database import damaged, opened
from dgemma_mlx.cli.log.earlier import EARLIER, take_over
from dgemma_mlx.cli.log.kept_images import remove_unused, store_images, with_files
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.state import state_folder
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json

if TYPE_CHECKING:
    from sqlite3 import Connection

CONTINUABLE = ("chat", "generate")  # the kinds of conversations that a further message can be added to
LONGEST_NAME = 80
_ID = re.compile("[0-9a-f]{8}")
_MOST_DIGITS = 4000  # of a number that a model has written into a call
_LIST_HINT = "`dgemma-mlx sessions` lists them."
_DAMAGED = "`dgemma-mlx sessions rm` removes it."


@dataclass(frozen=True)
class Entry:
    """A conversation in a list.

    Attributes:
        id: Eight hexadecimal digits.
        name: The name that the user has given it, or None.
        kind: The command that wrote it: chat, generate, raw, batch, fill, edit or choose.
        model: The model's name, or None for the model of the settings.
        created: When it began, in seconds since 1970.
        changed: When it was last changed, in seconds since 1970.
        turns: Number of turns.
        title: Its first message.
    """

    id: str
    name: str | None
    kind: str
    model: str | None
    created: float
    changed: float
    turns: int
    title: str


class Hit(NamedTuple):
    """A message that a search has found.

    Attributes:
        entry: The conversation.
        role: Who wrote it: user, assistant or tool.
        content: Its text.
        undone: Whether it is no longer a part of the conversation.
    """

    entry: Entry
    role: str
    content: str
    undone: bool


class Log:
    """All conversations, in one file. Every method opens it anew, so several programs can use it at a time.

    Each method raises `DgemmaError`, without a change, when the file cannot be used.

    Attributes:
        path: The file.
    """

    def __init__(self) -> None:
        self.path = state_folder() / "conversations.db"

    def save(
        self, session: Session, kind: str, answer: Mapping[str, Any] | None = None, when: float | None = None
    ) -> None:
        """Store a conversation as it is now, and note its id, name and revision in ``session``.

        ``answer`` is what is known about its last message, if that is new: its model, seed, finish_reason and
        statistics. ``when`` is the time of the change, by default now, in seconds since 1970.

        A conversation that another program has changed or removed since it was read here is left to that program: this
        one is stored as a new one. Its name, where another conversation has it, gets a number.
        """
        with self._opened(write=True) as db:
            found = db.execute("SELECT revision FROM conversations WHERE id = ?", (session.id,)).fetchone()
            now, is_new = when or time(), found is None or found[0] != session.revision
            id, name, revision = session.id, session.name, session.revision
            if is_new or id is None:
                id, name, revision = _new_id(db), _free_name(db, name), 0
                db.execute(
                    "INSERT INTO conversations VALUES (?, ?, ?, NULL, NULL, '{}', ?, ?, 0)", (id, name, kind, now, now)
                )
            db.execute(
                "UPDATE conversations SET model = ?, system = ?, settings = ?, changed = ?, revision = ? WHERE id = ?",
                (session.model, session.system, _json(session.settings), now, revision + 1, id),
            )
            _store(db, id, session.messages, answer, now)
        session.id, session.name, session.revision = id, name, revision + 1

    def load(self, id: str) -> Session:
        """Return a conversation by its id. Raises `DgemmaError` when it is not there, or damaged."""
        with self._opened() as db:
            row = db.execute(
                "SELECT model, system, settings, name, revision FROM conversations WHERE id = ?", (id,)
            ).fetchone()
            if row is None:
                raise _missing(id)
            model, system, settings, name, revision = row
            with _intact(id):
                _check(revision, is_whole)
                _check(name, _is_text_or_none)
                messages = with_files(db, _messages(db, id))
                record = {"messages": messages, "system": system, "settings": parse_json(_text(settings))}
        session = Session.of({**record, "model": model}, f"conversation {id} is damaged", _DAMAGED)
        session.id, session.name, session.revision = id, name, revision
        return session

    def last(self) -> str | None:
        """Return the id of the conversation that was changed last and can be continued; None when there is none."""
        return next((entry.id for entry in self.entries(CONTINUABLE, 1)), None)

    def find(self, key: str) -> str:
        """Return the id of the conversation with this name, this id, or the only id that begins so.

        Raises `DgemmaError` when there is none, or more than one.
        """
        if not is_text(key):
            raise _missing(key)
        if (found := self.named(key)) is not None:
            return found
        with self._opened() as db:
            begins = "SELECT id FROM conversations WHERE substr(id, 1, length(?1)) = ?1 LIMIT 3"
            ids = [id for (id,) in db.execute(begins, (key,))] if key else []
        if len(ids) > 1:
            raise DgemmaError(f"several ids begin with {shown(key)}: {', '.join(ids)}", "Write more of it.")
        if not ids:
            raise _missing(key)
        return str(ids[0])

    def named(self, key: str) -> str | None:
        """Return the id of the conversation with this name or this whole id; None when there is none."""
        if not is_text(key):
            return None
        with self._opened() as db:
            row = db.execute("SELECT id FROM conversations WHERE name = ?1 OR id = ?1", (key,)).fetchone()
        return None if row is None else str(row[0])

    def entries(self, kinds: Collection[str] = (), limit: int = -1) -> list[Entry]:
        """Return the conversations of these kinds, or of all kinds, the last one first; at most ``limit``.

        Raises `DgemmaError`, which names it, when one of them is damaged.
        """
        with self._opened() as db:
            where = f"WHERE kind IN ({','.join('?' * len(kinds))})" if kinds else ""
            query = f"{_ENTRIES} {where} ORDER BY changed DESC, c.rowid DESC LIMIT ?"
            rows = db.execute(query, (*kinds, limit)).fetchall()
        return [self._entry(row) for row in rows]

    def ids(self) -> list[str]:
        """Return the ids of all conversations, the last one first, with those that are damaged."""
        with self._opened() as db:
            rows = db.execute("SELECT id FROM conversations ORDER BY changed DESC, rowid DESC").fetchall()
        return [self._id(id) for (id,) in rows]

    def entry(self, id: str) -> Entry:
        """Return what a list says about a conversation. Raises `DgemmaError` when it is not there."""
        with self._opened() as db:
            return self._found(db, id)

    def answers(self, id: str) -> list[dict[str, Any]]:
        """Return all messages of a conversation with their times, in the order in which they were written.

        Each has "position" (its index among the messages, or None when it was undone or answered again), "time" (in
        seconds since 1970), the keys of a message, and those of an answer: "model", "seed", "finish_reason" and
        "statistics".
        """
        with self._opened() as db:
            rows = db.execute(
                "SELECT position, time, role, content, marks, coalesce(answer, '{}') FROM messages "
                "WHERE conversation = ? ORDER BY id", (id,),
            ).fetchall()  # fmt: skip
        found = []
        with _intact(id):
            for position, when, *message, answer in rows:
                _check(position, lambda value: value is None or is_whole(value))
                _check(when, _is_time)
                found.append({"position": position, "time": when, **_message(*message), **_object(answer)})
        return found

    def rename(self, id: str, name: str) -> None:
        """Give a conversation a name.

        Raises `DgemmaError` when the conversation is not there, when another one has the name, or it cannot be one.
        """
        check_name(name)
        if (other := self.named(name)) not in (None, id):
            raise DgemmaError(f"conversation {other} has the name {shown(name)}", "Choose another name.", exit_code=2)
        with self._opened(write=True) as db:
            if not db.execute("UPDATE conversations SET name = ? WHERE id = ?", (name, id)).rowcount:
                raise _missing(id)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove conversations with all that was written in them."""
        with self._opened(write=True) as db:
            db.executemany("DELETE FROM conversations WHERE id = ?", [(id,) for id in ids])
            remove_unused(db)

    def search(self, words: Sequence[str], limit: int | None = None) -> list[Hit]:
        """Return the messages that hold all the words, in any case and as parts of words, the last one first."""
        folded = [word.casefold() for word in words]
        with self._opened() as db:
            texts = "SELECT conversation, role, content, position IS NULL FROM messages WHERE content IS NOT NULL"
            with closing(db.execute(f"{texts} ORDER BY id DESC")) as rows:
                hits = list(islice((row for row in rows if self._holds(row, folded)), limit))
            found = {id: self._found(db, id) for id in {row[0] for row in hits}}
        return [Hit(found[id], role, content, bool(undone)) for id, role, content, undone in hits]

    def _id(self, value: Any) -> str:
        """Return the id of a row. Raises `DgemmaError` for what is none: then no command can name the conversation."""
        if not isinstance(value, str) or not _ID.fullmatch(value):
            raise damaged(self.path, f"{shown(value)} is not an id")
        return value

    def _found(self, db: Connection, id: str) -> Entry:
        """Return the entry of an id. Raises `DgemmaError` when it is not there, or damaged."""
        row = db.execute(f"{_ENTRIES} WHERE c.id = ?", (id,)).fetchone()
        if row is None:
            raise _missing(id)
        return self._entry(row)

    def _entry(self, row: Sequence[Any]) -> Entry:
        """Return a row of ``_ENTRIES``. Raises `DgemmaError` for one that is damaged."""
        entry = Entry(*row)
        with _intact(self._id(entry.id)):
            for text in (entry.kind, entry.title):
                _check(text, is_text)
            for text_or_none in (entry.name, entry.model):
                _check(text_or_none, _is_text_or_none)
            for when in (entry.created, entry.changed):
                _check(when, _is_time)
        return entry

    def _holds(self, row: Sequence[Any], words: Sequence[str]) -> bool:
        """Return whether a message holds all the words. Raises `DgemmaError` for one that is damaged."""
        id, role, content = row[:3]
        with _intact(self._id(id)):
            _check(role, is_text)
            return all(word in _text(content).casefold() for word in words)

    @contextmanager
    def _opened(self, write: bool = False) -> Iterator[Connection]:
        """Yield the database, after the last conversation of an earlier version of the program has moved into it."""
        earlier = self.path.with_name(EARLIER)
        if os.path.exists(earlier):
            take_over(earlier, lambda session, changed: self.save(session, "chat", when=changed))
        with opened(self.path, create=write) as db:
            yield db


_ENTRIES = """
    SELECT id, name, kind, model, created, changed,
        (SELECT count(*) FROM messages WHERE conversation = c.id AND role = 'user' AND position IS NOT NULL),
        coalesce((SELECT content FROM messages WHERE conversation = c.id AND role = 'user'
                  ORDER BY position IS NULL, position LIMIT 1), '')
    FROM conversations c"""


def check_continuable(entry: Entry) -> None:
    """Raise `DgemmaError` (exit code 2) for what is no conversation of chat or generate."""
    if entry.kind not in CONTINUABLE:
        hint = f"Only conversations of {' and '.join(CONTINUABLE)} can."
        raise DgemmaError(f"{entry.id} was written by {entry.kind} and cannot be continued", hint, exit_code=2)


def check_name(name: str) -> None:
    """Raise `DgemmaError` (exit code 2) for what cannot be the name of a conversation."""
    if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME or name != name.strip():
        hint = f"A name has 1 to {LONGEST_NAME} characters that can be seen."
        raise DgemmaError(f"{shown(name)} cannot be a name", hint, exit_code=2)
    if _ID.fullmatch(name):
        raise DgemmaError(f"{shown(name)} looks like an id", _LIST_HINT, exit_code=2)


def _missing(key: str) -> DgemmaError:
    return DgemmaError(f"there is no conversation {shown(key)}", _LIST_HINT)


def _new_id(db: Connection) -> str:
    """Return an id that no conversation has."""
    while True:
        id = secrets.token_hex(4)
        if db.execute("SELECT 1 FROM conversations WHERE id = ?", (id,)).fetchone() is None:
            return id


def _free_name(db: Connection, name: str | None) -> str | None:
    """Return a name that no conversation has: ``name``, or else NAME-2, NAME-3, ..."""
    wanted, number = name, 1
    while wanted is not None and db.execute("SELECT 1 FROM conversations WHERE name = ?", (wanted,)).fetchone():
        number += 1
        wanted = f"{name}-{number}"
    return wanted


def _store(
    db: Connection, id: str, messages: Sequence[dict[str, Any]], answer: Mapping[str, Any] | None, now: float
) -> None:
    """Store the messages of a conversation. Those that it no longer has stay in the log, without a position."""
    pairs = zip(_messages(db, id), map(without_data, messages), strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if answer is not None:
        same = min(same, len(messages) - 1)  # the same text once more is another answer
    db.execute("UPDATE messages SET position = NULL WHERE conversation = ? AND position >= ?", (id, same))
    for position, message in enumerate(messages[same:], same):
        marks = {key: value for key, value in without_data(message).items() if key not in ("role", "content")}
        content = message.get("content")
        if content is not None and not isinstance(content, str):  # the result of a tool
            marks["content"], content = content, None
        about = answer if position == len(messages) - 1 else None
        values = (id, position, now, message["role"], content, _json(marks), None if about is None else _json(about))
        added = db.execute(
            "INSERT INTO messages (conversation, position, time, role, content, marks, answer) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)", values,
        )  # fmt: skip
        store_images(db, added.lastrowid, message)


def _messages(db: Connection, id: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation. Raises `DgemmaError` for one that is damaged."""
    query = (
        "SELECT role, content, marks FROM messages WHERE conversation = ? AND position IS NOT NULL ORDER BY position"
    )
    with _intact(id):
        return [_message(*row) for row in db.execute(query, (id,)).fetchall()]


def _message(role: Any, content: Any, marks: Any) -> dict[str, Any]:
    """Return a message as it was before it was stored. Raises ``ValueError`` for one that is damaged."""
    return {"role": _text(role), **({} if content is None else {"content": _text(content)}), **_object(marks)}


@contextmanager
def _intact(id: str) -> Iterator[None]:
    """Turn the ``ValueError`` of a damaged value within the block into the error that names the conversation."""
    try:
        yield
    except ValueError as error:
        raise DgemmaError(f"conversation {id} is damaged: {reason(error)}", _DAMAGED) from None


def _check(value: Any, is_right: Callable[[Any], bool]) -> None:
    if not is_right(value):
        raise ValueError(f"it holds {shown(value)} where it cannot be")


def _text(value: Any) -> str:
    _check(value, is_text)
    return str(value)


def _object(value: Any) -> dict[str, Any]:
    found = parse_json(_text(value), _MOST_DIGITS)
    _check(found, lambda value: isinstance(value, dict))
    return dict(found)


def _is_text_or_none(value: Any) -> bool:
    return value is None or is_text(value)


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and -6e10 < value < 2.5e11  # of the years 69 to 9892


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
