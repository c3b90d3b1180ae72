"""The log of answers: what it keeps, whom it lets read it, and what happens when its file cannot be used."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.cli.log.keep import Keeper
from dgemma_mlx.cli.log.log import Log
from dgemma_mlx.cli.log.options import ConversationOptions, session_names
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError

ANSWER = {"model": "demo", "seed": 2**64 - 1, "finish_reason": "stop", "statistics": {"seconds": 1.5}}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    """An empty log."""
    monkeypatch.setenv("DGEMMA_STATE", str(tmp_path / "state"))
    return Log()


def turn(question: str = "Hi", answer: str = "Hello") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def stored(log: Log, *questions: str, name: str | None = None, kind: str = "chat") -> Session:
    """Store a conversation with these questions, turn by turn."""
    session = Session(name=name, model="demo")
    for question in questions:
        session.messages += turn(question, f"{question}!")
        log.save(session, kind, ANSWER)
    return session


def test_what_was_stored_is_loaded(log: Log) -> None:
    calls = [{"name": "add", "arguments": {"n": 10**50}, "id": "call_1"}]
    session = Session(
        [
            {"role": "user", "content": 'ß, 日本, "\x1b[31m" and\nlines'},
            {"role": "assistant", "content": "", "tool_calls": calls, "thinking": "first\nthen"},
            {"role": "tool", "content": {"value": [1, None]}, "name": "add", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "Hello", "cancelled": True},
        ],
        "Be brief.", {"seed": 5, "t_max": 1.0}, "owner/name", name="a name",
    )  # fmt: skip
    log.save(session, "chat", ANSWER)
    assert session.id is not None and log.load(session.id) == session
    assert log.answers(session.id)[-1].items() >= {**ANSWER, "content": "Hello", "cancelled": True}.items()
    assert "model" not in log.answers(session.id)[0]


def test_only_the_owner_can_read_it(log: Log) -> None:
    before = os.umask(0)
    try:
        stored(log, "Hi")
    finally:
        os.umask(before)
    assert [(path.name, path.stat().st_mode & 0o777) for path in log.path.parent.iterdir()] == [
        ("conversations.db", 0o600)
    ]
    assert log.path.parent.stat().st_mode & 0o777 == 0o700


def test_what_is_undone_leaves_the_conversation_and_stays_in_the_log(log: Log) -> None:
    session = stored(log, "one", "two")
    session.pop_turn()
    session.messages += turn("two", "another answer")
    log.save(session, "chat", ANSWER)
    assert [message["content"] for message in log.load(str(session.id)).messages] == [
        "one", "one!", "two", "another answer"
    ]  # fmt: skip
    log.save(session, "chat", ANSWER)  # the same text once more is an answer of its own
    rows = log.answers(str(session.id))
    assert [(row["position"], row["content"]) for row in rows] == [
        (0, "one"), (1, "one!"), (2, "two"), (None, "two!"), (None, "another answer"), (3, "another answer"),
    ]  # fmt: skip
    assert [hit.undone for hit in log.search(["two!"])] == [True]


def test_a_conversation_is_found_by_name_id_and_the_beginning_of_its_id(log: Log) -> None:
    first, second = stored(log, "one", name="trip"), stored(log, "two")
    assert log.find("trip") == log.find(str(first.id)) == first.id
    for id in (first.id, second.id):
        beginning = next(str(id)[:n] for n in range(1, 9) if not str(other(id, first, second)).startswith(str(id)[:n]))
        assert log.find(beginning) == id
    for key in ("", "nobody", "%", "________", "' OR 1"):
        with pytest.raises(DgemmaError, match="there is no conversation"):
            log.find(key)
    assert log.last() == second.id
    fill = stored(log, "x", kind="fill")
    assert log.last() == second.id and [entry.id for entry in log.entries()] == [fill.id, second.id, first.id]
    with pytest.raises(DgemmaError, match="was written by fill and cannot be continued"):
        ConversationOptions(session=fill.id).open(Settings())


def other(id: str | None, first: Session, second: Session) -> str | None:
    return second.id if id == first.id else first.id


def test_names_are_unique_and_can_be_seen(log: Log) -> None:
    first, second = stored(log, "one", name="trip"), stored(log, "two")
    with pytest.raises(DgemmaError, match="has the name 'trip'"):
        log.rename(str(second.id), "trip")
    for name in ("", " ", "a\nb", " a", "x" * 81, "0123abcd"):
        with pytest.raises(DgemmaError) as caught:
            log.rename(str(second.id), name)
        assert caught.value.exit_code == 2
    log.rename(str(first.id), "Reise nach 日本")
    log.rename(str(second.id), "trip")
    assert sorted(session_names()) == ["Reise nach 日本", "trip"] and session_names("tr") == ["trip"]


def test_two_at_once_lose_no_turn(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    id = str(stored(log, "one", name="trip").id)
    here, there = log.load(id), log.load(id)
    here.messages += turn("here")
    there.messages += turn("there")
    keeper = Keeper(Settings())
    keeper.keep(here, "chat", ANSWER)
    keeper.keep(there, "chat", ANSWER)
    assert (here.id, there.name) == (id, "trip-2") and there.id != id
    assert f"another program has changed conversation {id}; this one goes on as {there.id}" in capsys.readouterr().err
    assert [message["content"] for message in log.load(id).messages[::2]] == ["one", "here"]
    assert [message["content"] for message in log.load(str(there.id)).messages[::2]] == ["one", "there"]


def test_what_another_program_removes_is_kept_again_and_said(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    session = stored(log, "one", name="trip")
    id = str(session.id)
    log.remove([id])
    with pytest.raises(DgemmaError, match="there is no conversation"):
        log.rename(id, "journey")
    session.messages += turn("more")
    Keeper(Settings()).keep(session, "chat", ANSWER)
    assert session.id != id and log.load(str(session.id)) == session
    said = f"conversation {id} was removed by another program; it is kept again as {session.id}, named trip\n"
    assert capsys.readouterr().err == f"dgemma-mlx: {said}"


def test_what_is_removed_is_gone_from_the_file(log: Log) -> None:
    session = stored(log, "A secret that nobody may read")
    stored(log, "Another")
    log.remove([str(session.id)])
    assert b"secret" not in log.path.read_bytes()
    assert len(log.entries()) == 1 and log.search(["secret"]) == []


def test_a_search_finds_parts_of_words_in_any_case(log: Log) -> None:
    session = stored(log, "Straßen und ÄPFEL")
    assert {hit.entry.id for hit in log.search(["STRASSEN", "äpf"])} == {session.id}
    assert log.search(["birnen"]) == log.search(["%"]) == []
    assert [hit.role for hit in log.search(["und"], limit=1)] == ["assistant"]


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)


def of_another_program(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()


def of_a_later_version(path: Path) -> None:
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA user_version = 99")
    file.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "is damaged: "),
        (lambda path: path.write_bytes(b"no database at all" * 100), "is damaged: "),
        (of_another_program, "is the database of another program"),
        (of_a_later_version, "was written by a later version of dgemma-mlx"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_not_touched(
    log: Log, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    stored(log, "x" * 20_000)
    change(log.path)
    before = log.path.read_bytes()
    for use in (log.entries, lambda: stored(log, "Hi"), lambda: log.search(["Hi"])):
        with pytest.raises(DgemmaError, match=message) as caught:
            use()
        assert str(log.path) in caught.value.message and caught.value.hint
    keeper = Keeper(Settings())
    for _ in range(2):
        keeper.keep(Session(turn()), "chat", ANSWER)
    assert capsys.readouterr().err.count("from here on nothing is kept") == 1
    assert log.path.read_bytes() == before
    assert session_names() == []


def test_a_file_that_is_locked_or_has_no_room_costs_no_answer(
    log: Log, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgemma_mlx.cli.log.database._PATIENCE", 0.05)
    stored(log, "Hi")
    with sqlite3.connect(log.path) as file:
        file.execute("BEGIN IMMEDIATE")
        Keeper(Settings()).keep(Session(turn()), "chat", ANSWER)
        file.rollback()
    file.close()
    assert "database is locked\nhint: Another program is writing to it." in capsys.readouterr().err
    assert len(log.entries()) == 1


FULL = """
import resource, signal, sys
from dgemma_mlx.cli.log.keep import Keeper
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.settings import Settings
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))  # as a disk that is full
keeper = Keeper(Settings())
for number in range(30):
    keeper.keep(Session([{"role": "user", "content": "x" * 5000}, {"role": "assistant", "content": "y"}]), "chat")
"""


def test_a_full_disk_loses_nothing_that_was_stored(log: Log) -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=60, check=True)
    error, hint = done.stderr.splitlines()
    assert error.startswith("dgemma-mlx: from here on nothing is kept: cannot use ") and hint.startswith("hint: ")
    entries = log.entries()
    assert 3 < len(entries) < 20
    assert all(len(log.load(entry.id).messages) == 2 for entry in entries)


WRITER = """
import time
from dgemma_mlx.cli.log.log import Log
from dgemma_mlx.cli.log.session import Session
session, number = Session(), 0
while True:
    session.messages += [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "x" * 3000}]
    Log().save(session, "chat", {"model": "demo"})
    print(session.id, number, flush=True)
    number += 1
    time.sleep(0.01)  # so that each gets its turn
"""


@pytest.fixture
def writers() -> Iterator[list[subprocess.Popen[str]]]:
    found = [
        subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]  # fmt: skip
    yield found
    for process in found:
        process.kill()
        process.wait()


def test_killed_while_it_writes_at_most_the_turn_is_lost(log: Log, writers: list[subprocess.Popen[str]]) -> None:
    pause = random.Random(7)
    said = []
    for process in writers:
        assert process.stdout is not None
        said.append([process.stdout.readline().split()])  # it has begun
    for process, lines in zip(writers, said, strict=True):
        time.sleep(pause.uniform(0.1, 0.3))
        process.send_signal(signal.SIGKILL)
        lines += [line.split() for line in process.communicate()[0].splitlines() if line.endswith(tuple("0123456789"))]
    for lines in said:
        id, last = lines[-1]
        asked = [message["content"] for message in log.load(id).messages[::2]]
        assert asked in ([str(n) for n in range(int(last) + 1)], [str(n) for n in range(int(last) + 2)])
    with sqlite3.connect(log.path) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    file.close()
    stored(log, "goes on")


def test_a_folder_that_cannot_be_written_can_still_be_read(log: Log) -> None:
    session = stored(log, "Hi")
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    log.path.chmod(0o400)
    log.path.parent.chmod(0o500)
    try:
        assert log.load(str(session.id)) == session
        with pytest.raises(DgemmaError, match="readonly"):
            stored(log, "more")
    finally:
        log.path.parent.chmod(0o700)
