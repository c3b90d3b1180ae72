"""The command sessions: what people see of the log, and what they do with it."""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from dgemma_mlx.cli import app as program
from dgemma_mlx.cli.log.keep import Keeper
from dgemma_mlx.cli.log.log import Log
from dgemma_mlx.cli.log.options import ConversationOptions
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError
from tests.cli.terminal import Terminal
from tests.cli.test_log import stored

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    """An empty log."""
    monkeypatch.setenv("DGEMMA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "80")
    return Log()


@pytest.fixture
def run(log: Log, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``dgemma-mlx sessions`` in this process; return exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dgemma-mlx", "sessions", *arguments])
        code = program.run()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_an_empty_log_is_not_an_error_and_creates_nothing(log: Log, run: Run) -> None:
    for arguments in ((), ("list",), ("search", "x")):
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (0, "", 1)
    assert run("list", "--json") == (0, "[]\n", "")
    for arguments in (("show",), ("show", "x"), ("rm", "-y", "x"), ("export", "x"), ("rename", "x", "y")):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "") and re.match("dgemma-mlx: .*\nhint: .*\n$", err)
    assert not log.path.parent.exists()


def test_a_list_has_a_line_for_each_that_fits_the_terminal(log: Log, run: Run) -> None:
    first, _ = stored(log, "a\x1b[31m\n" + "long " * 40, "two", name="trip"), stored(log, "x", kind="choose")
    second = stored(log, "Hi", kind="generate")
    code, out, err = run()
    assert (code, err) == (0, "")
    one, two = out.splitlines()
    assert re.fullmatch(rf"{second.id}  \d{{4}}-\d\d-\d\d \d\d:\d\d  generate    1 turn  Hi", one)
    assert two.startswith(str(first.id)) and "2 turns  [trip] a␛[31m" in two and len(two) <= 80
    assert len(run("list", "--all")[1].splitlines()) == 3 and len(run("list", "-n", "1")[1].splitlines()) == 1
    assert [entry["id"] for entry in json.loads(run("list", "--json")[1])] == [second.id, first.id]


def test_a_conversation_is_shown_exported_and_loaded_again(log: Log, run: Run, tmp_path: Path) -> None:
    session = stored(log, "Hi", name="trip")
    session.system = "Be brief."
    session.add("user", "Add")
    session.add("assistant", "", tool_calls=[{"name": "add", "arguments": {"n": 1}, "id": "c"}], thinking="So\nadd")
    session.add("tool", "2", tool_call_id="c")
    session.add("assistant", "Two", cancelled=True)
    log.save(session, "chat", {"model": "demo", "seed": 3, "finish_reason": "cancelled", "statistics": {}})
    shown = run("show", str(session.id)[:7])[1]
    assert shown.splitlines()[1:3] == ["name: trip", "system prompt: Be brief."]
    assert "[assistant (cancelled)]\nTwo\n" in shown and 'tool call: {"name": "add"' in shown
    markdown = run("export", "trip")[1]
    assert markdown.startswith("# trip\n") and "\n## Assistant (cancelled)\n\nTwo\n" in markdown
    assert "\n> So\n> add\n" in markdown and "\n## System\n\nBe brief.\n" in markdown
    line = run("export", "trip", "--json")[1]
    assert run("show", "trip", "--json")[1] == line == run("export", "--all", "--json")[1]
    (tmp_path / "trip.json").write_text(line)
    again = Session.load(tmp_path / "trip.json")
    assert (again.messages, again.system, again.model) == (session.messages, session.system, session.model)
    assert [answer["seed"] for answer in json.loads(line)["answers"]] == [2**64 - 1, 3]


def test_conversations_are_renamed_and_removed(log: Log, run: Run) -> None:
    first, second = stored(log, "one"), stored(log, "two")
    assert run("rename", str(first.id), "trip") == (0, "", f"{first.id} is now trip\n")
    assert run("rename", str(second.id), "trip")[0] == 2
    assert run("rm")[0] == run("rm", "trip", "--all")[0] == run("rm", "trip")[0] == 2  # no terminal to ask on
    assert run("rm", "-y", "trip", "nobody")[0] == 1 and len(log.entries()) == 2
    assert run("rm", "-y", "trip", str(first.id)) == (0, "", f"removed {first.id}\n")
    assert [entry.id for entry in log.entries()] == [second.id]


def test_a_search_shows_the_words_where_they_stand(log: Log, run: Run) -> None:
    session = stored(log, "before " * 20 + "the hotel in Lisbon", name="trip")
    code, out, _ = run("search", "lisbon", "HOTEL")
    assert code == 0 and len(out.splitlines()) == 2
    assert re.fullmatch(rf"{session.id}  .{{16}}  \[trip\] assistant: ….*hotel in L.*", out.splitlines()[0])
    assert json.loads(run("search", "lisbon", "--json", "-n", "1")[1])[0]["role"] == "assistant"


def test_a_person_is_asked_before_something_is_removed(log: Log) -> None:
    session = stored(log, "one")
    for answer, left in (("n", 1), ("y", 0)):
        with Terminal(["sessions", "rm", str(session.id)]) as terminal:
            terminal.wait_for_text(f"Remove {session.id}? [y/N]:")
            terminal.type(answer + "\r")
            assert terminal.finish() == 0
        assert len(log.entries()) == left


def test_a_key_that_is_no_text_names_no_conversation(log: Log, run: Run) -> None:
    stored(log, "one", name="trip")
    for arguments in (("show", "\udcff"), ("export", "\udcff"), ("rm", "-y", "\udcff"), ("rename", "\udcff", "x")):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "") and "there is no conversation '\\udcff'" in err
    code, _, err = run("rename", "trip", "\udcff")
    assert code == 2 and "cannot be a name" in err
    assert run("search", "\udcff")[:2] == (0, "")
    with pytest.raises(DgemmaError, match="cannot be a name"):
        ConversationOptions(session="\udcff").open(Settings())


def test_a_limit_is_a_number_that_the_database_can_count_to(log: Log, run: Run) -> None:
    stored(log, "one")
    for command in (("list",), ("search", "one")):
        code, _, err = run(*command, "-n", "99999999999999999999")
        assert code == 2 and "99999999999999999999" in err and "bug" not in err


DAMAGE = [
    "UPDATE messages SET marks = '{\"a' WHERE position = 1",
    "UPDATE messages SET marks = 7 WHERE position = 1",
    "UPDATE messages SET answer = '{' WHERE position = 1",
    "UPDATE messages SET content = CAST(x'6f6eff' AS TEXT)",
    "UPDATE messages SET content = x'6f6e'",
    "UPDATE messages SET role = x'75' WHERE position = 0",
    "UPDATE messages SET time = 1e300",
    "UPDATE conversations SET changed = 1e300",
    "UPDATE conversations SET settings = '{\"temp\": -1}'",
    "UPDATE conversations SET model = CAST(x'ff' AS TEXT)",
    "UPDATE conversations SET revision = x'ff'",
]


@pytest.mark.parametrize("statement", DAMAGE)
def test_a_damaged_conversation_is_named_and_does_not_hide_the_others(log: Log, run: Run, statement: str) -> None:
    session, id = stored(log, "one"), str(stored(log, "another").id)
    with sqlite3.connect(log.path) as file:
        file.execute(statement + (" AND" if "WHERE" in statement else " WHERE")
                     + (" conversation = ?" if "messages" in statement else " id = ?"), (id,))  # fmt: skip
    file.close()
    found = [run("list"), run("show", id)] + [
        run(*arguments, *as_json)
        for arguments in (("search", "on"), ("export", id), ("export", "--all"))
        for as_json in ((), ("--json",))
    ]
    for code, _, err in found:
        assert code == 0 or (code == 1 and f"conversation {id} is damaged" in err and err.count("\n") == 2)
    assert any(code for code, _, _ in found)
    for code, out, _ in found[-2:]:
        assert "one!" in out and (code == 0) is ("another" in out)
    session.messages += [{"role": "user", "content": "more"}, {"role": "assistant", "content": "yes"}]
    Keeper(Settings()).keep(session, "chat")
    assert log.load(str(session.id)) == session
    assert run("rm", "-y", "--all")[0] == 0 and log.entries() == []


def test_flipped_bits_are_never_called_a_bug(log: Log, run: Run) -> None:
    pick = random.Random(3)
    for number in range(4):
        stored(log, f"question {number}", "more", name=f"name {number}")
    whole = log.path.read_bytes()
    used = [place for place, byte in enumerate(whole) if byte]  # most of the file is empty
    for _ in range(8):
        flipped = bytearray(whole)
        for place in pick.sample(used, 20):
            flipped[place] ^= 1 << pick.randrange(8)
        log.path.write_bytes(flipped)
        for arguments in (("list", "-a"), ("search", "e"), ("show",), ("export", "--all"), ("export", "-a", "--json")):
            code, _, err = run(*arguments)
            assert code in (0, 1) and "unexpected" not in err, err
