"""Conversations on disk: readable files, written completely or not at all; damaged files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.errors import DgemmaError

TURN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def some_session() -> Session:
    session = Session(system="Be brief.", settings={"seed": 5, "t_max": 1.0, "thinking": True}, model="owner/name")
    session.add("user", 'Sortiere "ß", 日本, \x1b[31m and\nlines')
    session.add("assistant", "ß 日本", thinking="first\nthen", cancelled=True)
    session.add("user", "Again")
    session.add("assistant", "", thinking="", cancelled=False)
    return session


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "talk.json"
    some_session().save(path)
    assert Session.load(path) == some_session()
    some_session().save(path)  # replaces the first file
    assert [file.name for file in path.parent.iterdir()] == ["talk.json"]


def test_the_file_can_be_read_by_people(tmp_path: Path) -> None:
    some_session().save(tmp_path / "talk.json")
    text = (tmp_path / "talk.json").read_text(encoding="utf-8")
    assert '      "content": "ß 日本",\n      "thinking": "first\\nthen",\n      "cancelled": true\n' in text
    assert "\x1b" not in text


def test_the_model_sees_neither_thinking_nor_marks() -> None:
    session = some_session()
    seen = session.prompt()
    assert [message["role"] for message in seen] == ["system", "user", "assistant", "user", "assistant"]
    assert all(message.keys() == {"role", "content"} for message in seen)
    assert "first" not in json.dumps(seen)
    assert session.prompt(start=2) == [seen[0], *seen[3:]]
    session.system = None
    assert session.prompt() == seen[1:]


def test_a_turn_is_taken_out_whole() -> None:
    session = some_session()
    assert (session.turns, session.questions) == (2, [0, 2])
    assert session.pop_turn() == {"role": "user", "content": "Again"}
    assert len(session.messages) == 2
    assert (session.pop_turn() or {})["content"].startswith("Sortiere")
    assert session.pop_turn() is None
    assert session.messages == []


def record(**changes: Any) -> str:
    return json.dumps({"format": "dgemma-mlx session 1", "messages": TURN, "system": None, "settings": {}, **changes})


def test_what_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(json.dumps({"format": "dgemma-mlx session 1", "messages": TURN}))
    assert Session.load(tmp_path / "talk.json") == Session(messages=TURN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read"),
        (record()[:-20].encode(), "cannot read"),
        (b'{"format": "caf\xe9"}', "cannot read"),
        (b"[" * 100_000, "cannot read"),
        (record(messages=[TURN[0], {**TURN[1], "content": "\ud800"}]).encode(), "cannot read"),
        (b"[1, 2]", "is not a saved conversation"),
        (b'{"messages": []}', "is not a saved conversation"),
        (record(format="dgemma-mlx session 99").encode(), "is not a saved conversation"),
        (record(messages=None).encode(), "do not make a conversation"),
        (record(messages=[TURN[0], {**TURN[1], "thinking": 5}]).encode(), "do not make a conversation"),
        (record(messages=TURN[:1]).encode(), "do not make a conversation"),
        (record(messages=TURN[::-1]).encode(), "do not make a conversation"),
        (record(messages=[*TURN, *TURN[:1], *TURN[:1]]).encode(), "do not make a conversation"),
        (record(messages=[TURN[0], {"role": "assistant"}]).encode(), "do not make a conversation"),
        (record(messages=[TURN[0], {"role": "assistant", "content": 3}]).encode(), "do not make a conversation"),
        (record(messages=["Hi", "Hello"]).encode(), "do not make a conversation"),
        (record(system=["Be brief."]).encode(), "do not make a conversation"),
        (record(model=7).encode(), "do not make a conversation"),
        (record(settings=[]).encode(), "do not make a conversation"),
        (record(settings={"colour": 1}).encode(), "unknown setting 'colour'"),
        (record(settings={"model": "demo"}).encode(), "unknown setting 'model'"),
        (record(settings={"max_tokens": "many"}).encode(), "max_tokens must be a whole number"),
        (record(settings={"seed": None}).encode(), "seed must be a whole number"),
        (record(settings={"thinking": 1}).encode(), "thinking must be true or false"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    with pytest.raises(DgemmaError) as caught:
        Session.load(path)
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert caught.value.hint


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "nowhere", "there is no file"), (tmp_path, "cannot read")):
        with pytest.raises(DgemmaError, match=message):
            Session.load(path)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "talk.json", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(DgemmaError) as caught:
            some_session().save(path)
        assert caught.value.message.startswith(f"cannot write {path}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"
