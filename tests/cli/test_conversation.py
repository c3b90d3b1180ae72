"""Conversations with the built-in model: on a pseudo-terminal, and through pipes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from tests.cli.kept import last_session, log_of, messages
from tests.cli.terminal import Terminal

# The model needs two steps for a known task and would use all steps for an unknown one.
FEW = {"DGEMMA_MAX_DENOISING_STEPS": "4", "DGEMMA_MAX_TOKENS": "32"}
ENDLESS = {
    "DGEMMA_MAX_DENOISING_STEPS": "100000", "DGEMMA_STABILITY_THRESHOLD": "99999", "DGEMMA_SPEED": "reference",
}
UP, SEARCH, ALT_ENTER, CTRL_C, CTRL_D = "\x1b[A", "\x12", "\x1b\r", "\x03", "\x04"


class Talk(Terminal):
    """A chat on a terminal that has reached its first prompt."""

    def __init__(self, state: Path, *arguments: str, **environment: str) -> None:
        super().__init__(
            ["chat", "-m", "demo", "--seed", "1", *arguments],
            env={**FEW, "DGEMMA_STATE": str(state), "PROMPT_TOOLKIT_NO_CPR": "1", **environment},
        )
        self.wait_for(lambda: self.text.endswith(">>>"))

    def prompts(self) -> int:
        return sum(line.startswith(">>>") for line in self.text.splitlines())

    def say(self, text: str, enter: str = "\r") -> list[str]:
        """Type a message, wait for the next prompt and return the rows between."""
        before = self.prompts()
        self.type(text + enter)
        self.wait_for(lambda: self.prompts() > before and self.text.endswith("\n>>>"))
        rows = self.text.splitlines()[:-1]
        last = max(i for i, row in enumerate(rows) if row.startswith(">>>"))
        return rows[last + 1 :]

    def leave(self) -> None:
        self.type(CTRL_D)
        assert self.finish() == 0


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_a_conversation_is_edited_answered_and_kept(state: Path) -> None:
    with Talk(state) as talk:
        assert talk.say("Sort 7 3 5") == ["3 5 7"]
        assert talk.say("Sort" + ALT_ENTER + "7 3 5")[0] == "... 7 3 5"
        assert messages(state)[-2]["content"] == "Sort\n7 3 5"
        talk.say('"""Sort\r9 3 5\r"""')
        assert messages(state)[-2]["content"] == "Sort\n9 3 5"
        talk.say("\x1b[200~Sort\r\n8 3 5\x1b[201~")  # pasted: its line break sends nothing
        assert messages(state)[-2]["content"] == "Sort\n8 3 5"
        assert len(messages(state)) == 8
        talk.type("/he\t")
        talk.wait_for(lambda: talk.text.endswith(">>> /help"))
        assert any("Alt-Enter" in row for row in talk.say(""))
        talk.type("/set max_to\t")
        talk.wait_for(lambda: talk.text.endswith(">>> /set max_tokens"))
        assert talk.say(" 9") == ["max_tokens: 9"]
        assert "there is no command /bogus" in talk.say("/bogus")
        assert any(re.fullmatch(r"cached tokens +[1-9]\d*", row) for row in talk.say("/stats"))
        talk.type("/edit\r")
        talk.wait_for(lambda: talk.text.endswith(">>> Sort\n... 8 3 5"))
        talk.say("\x7f2")
        assert [message["content"] for message in messages(state)[0::2]][-2:] == ["Sort\n9 3 5", "Sort\n8 3 2"]
        talk.type("/bye\r")
        assert talk.finish() == 0
    assert messages(state)[:2] == [{"role": "user", "content": "Sort 7 3 5"}, {"role": "assistant", "content": "3 5 7"}]


def test_a_turn_stays_until_its_edited_message_is_sent(state: Path) -> None:
    def edit(talk: Talk) -> None:
        talk.type("/edit\r")
        talk.wait_for(lambda: talk.text.endswith(">>> Sort 7 3 5"))

    with Talk(state) as talk:
        assert talk.say("Sort 7 3 5") == ["3 5 7"]
        before = messages(state)
        edit(talk)
        assert messages(state) == before
        talk.say("", CTRL_C)  # the edit is given up, so the turn stays
        assert messages(state) == before
        edit(talk)
        talk.say("\x7f" * 10)  # nothing is sent
        assert messages(state) == before
        edit(talk)
        talk.say("\x7f" * 10 + "/stats")  # a command is no message
        assert messages(state) == before
        talk.say("Sort 9 3 5")  # and what comes after it is a new turn
        assert [message["content"] for message in messages(state)[::2]] == ["Sort 7 3 5", "Sort 9 3 5"]
        talk.type("/edit\r")
        talk.wait_for(lambda: talk.text.endswith(">>> Sort 9 3 5"))
        talk.say("\x7f1")
        assert [message["content"] for message in messages(state)[::2]] == ["Sort 7 3 5", "Sort 9 3 1"]
        talk.leave()


def test_history_and_conversation_survive_a_crash(state: Path) -> None:
    with Talk(state) as talk:
        talk.say("My name is Ana.")
        talk.say("Sort" + ALT_ENTER + "7 3 5")
        talk.say("/set max_tokens 50")
        talk.type("half a line")
        talk.wait_for_text("half a line")
        talk.process.kill(signal.SIGKILL)
    before = messages(state)
    assert len(before) == 4
    with Talk(state, "--resume") as talk:
        assert re.search(r"continuing [0-9a-f]{8} after 2 turns", talk.text)
        talk.type(UP + UP)
        talk.wait_for(lambda: talk.text.endswith(">>> Sort\n... 7 3 5"))
        talk.type(CTRL_C)
        talk.wait_for(lambda: talk.text.endswith("\n>>>"))
        talk.type(SEARCH + "Ana")
        talk.wait_for_text("I-search backward: Ana")
        talk.type("\r")  # moves the found message to the prompt without sending it
        talk.wait_for(lambda: talk.text.endswith(">>> My name is Ana."))
        assert messages(state) == before
        talk.type(CTRL_C)
        talk.wait_for(lambda: talk.text.endswith("\n>>>"))
        assert "Ana" in talk.say("What is my name?")[0]
        assert any(re.fullmatch("max_tokens +50", row) for row in talk.say("/show"))
        talk.leave()
    assert messages(state)[:4] == before
    assert (state.stat().st_mode & 0o077) == 0  # only the owner can read it


def test_a_new_conversation_is_kept_beside_the_earlier_ones(state: Path) -> None:
    piped(state, b"Sort 7 3 5\n/set seed 3\n")
    first = last_session(state)
    piped(state, b"/set seed 3\n/system Be kind.\n")  # which is no conversation yet
    assert last_session(state) == first
    piped(state, b"Sort 2 1\n/clear\nSort 9 8\n")
    second, third = (log_of(state).load(entry.id) for entry in log_of(state).entries()[1::-1])
    assert [message["content"] for message in second.messages[::2]] == ["Sort 2 1"]
    assert [message["content"] for message in third.messages[::2]] == ["Sort 9 8"]
    assert log_of(state).load(str(first.id)) == first
    piped(state, b"/undo\n", "--continue")
    assert messages(state) == [] and last_session(state).id == third.id


def test_a_conversation_has_a_name_and_is_continued_by_it(state: Path) -> None:
    piped(state, b"My name is Ana.\n", "--session", "names")
    piped(state, b"Sort 7 3 5\n")
    done = piped(state, b"What is my name?\n", "--session", "names")
    assert b"Ana" in done.stdout and b"(names) after 1 turn" in done.stderr
    assert last_session(state).name == "names" and len(messages(state)) == 4
    for arguments, error in (
        (["--session", "names", "--continue"], "exclude each other"), (["--session", "1234abcd"], "looks like an id"),
        (["--session", ""], "cannot be a name"), (["--session", "a\tb"], "cannot be a name"),
    ):  # fmt: skip
        done = piped(state, b"Sort 2 1\n", *arguments)
        assert (done.returncode, done.stdout) == (2, b"") and error in done.stderr.decode()


def test_conversations_are_listed_named_and_changed_within_a_chat(state: Path) -> None:
    piped(state, b"My name is Ana.\n", "--session", "names")
    first = last_session(state).id
    with Talk(state) as talk:
        assert talk.say("/rename names")[0] == "another conversation is named names"
        assert talk.say("/rename sorts") == ["this conversation is sorts"]
        talk.say("Sort 7 3 5")
        here, there = talk.say("/sessions")
        assert re.match(rf"\* {last_session(state).id} .* 1 turn  \[sorts\] Sort 7 3 5$", here)
        assert re.match(rf"  {first} .* 1 turn  \[names\] My name is Ana\.$", there)
        assert talk.say("/rename names")[0].endswith("has the name 'names'")
        assert talk.say("/rename numbers") == ["this conversation is numbers"]
        assert talk.say("/sessions nobody")[0] == "there is no conversation 'nobody'"
        assert talk.say(f"/sessions {first}") == [f"{first}: 1 turn; /show shows them"]
        assert "Ana" in talk.say("What is my name?")[0]
        talk.leave()
    named = {entry.name: entry.turns for entry in log_of(state).entries()}
    assert named == {"names": 2, "numbers": 1}


def test_with_the_log_off_nothing_is_kept(state: Path) -> None:
    assert piped(state, b"Sort 7 3 5\n", DGEMMA_LOG="off").stdout == b"3 5 7\n"
    with Talk(state, DGEMMA_LOG="off") as talk:
        assert talk.say("Sort 7 3 5") == ["3 5 7"]
        talk.type(UP)
        talk.wait_for(lambda: talk.text.endswith(">>> Sort 7 3 5"))  # the history of this conversation
    assert not state.exists()
    done = piped(state, b"Sort 7 3 5\n", "--continue", DGEMMA_LOG="off")
    assert done.returncode == 2 and b"It is off by DGEMMA_LOG." in done.stderr


def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_leaves(state: Path) -> None:
    with Talk(state) as talk:
        talk.type("some text" + CTRL_C)
        talk.wait_for(lambda: talk.text.endswith("some text\n>>>"))
        talk.type(CTRL_C)
        talk.wait_for_text("Ctrl-C again or Ctrl-D leaves")
        talk.wait_for(lambda: talk.text.endswith("\n>>>"))
        assert talk.say("/system") == ["system prompt: (none)"]  # another line in between restarts the count
        talk.type(CTRL_C)
        talk.wait_for(lambda: talk.text.count("Ctrl-C again") == 2 and talk.text.endswith("\n>>>"))
        talk.type(CTRL_C)
        assert talk.finish() == 0
    assert log_of(state).entries() == []


def test_ctrl_c_in_the_first_canvas_keeps_nothing(state: Path) -> None:
    with Talk(state, **ENDLESS) as talk:
        talk.type("Sort 7 3 5\r")
        talk.wait_for(lambda: re.search(r"step \d+/100000", talk.text) is not None)
        assert talk.say(CTRL_C, enter="") == ["cancelled; nothing was kept"]
        assert not any(row.startswith("[user]") for row in talk.say("/show"))
        talk.type(UP + UP)  # past /show
        talk.wait_for(lambda: talk.text.endswith(">>> Sort 7 3 5"))


# Each canvas takes all its steps.
LONG = {
    "DGEMMA_MAX_DENOISING_STEPS": "15", "DGEMMA_STABILITY_THRESHOLD": "99999", "DGEMMA_SPEED": "reference",
    "DGEMMA_MAX_TOKENS": "64",
}


def test_ctrl_c_in_the_second_canvas_keeps_the_first(state: Path) -> None:
    with Talk(state, **LONG) as talk:
        talk.type("Count from 13 to 40.\r")
        talk.wait_for_text("canvas 2")
        rows = talk.say(CTRL_C, enter="")
        assert rows[-1] == "cancelled; the text above was kept"
        _, answer = messages(state)
        assert answer["role"] == "assistant" and answer["cancelled"] is True
        assert answer["content"].startswith("13 14 15")
        assert "".join(rows[:-1]).split() == answer["content"].split()
        assert "[assistant (cancelled)]" in talk.say("/show")
        assert any(re.fullmatch("finish reason +cancelled", row) for row in talk.say("/stats"))
        talk.say("/set steps 2")
        talk.say("Sort 7 3 5")  # the conversation continues
        assert len(messages(state)) == 4 and "cancelled" not in messages(state)[3]


def test_what_is_typed_while_the_model_writes_waits_for_the_prompt(state: Path) -> None:
    with Talk(state, **LONG) as talk:
        talk.type("Count from 13 to 40.\r")
        talk.wait_for_text("step ")
        talk.type("typed ahead")
        talk.wait_for_text("canvas 2")
        assert "typed" not in talk.text
        talk.wait_for(lambda: talk.text.endswith(">>> typed ahead"))


@pytest.mark.parametrize("answering", [True, False])
def test_ended_by_a_signal_it_leaves_the_terminal_as_it_was(state: Path, answering: bool) -> None:
    with Talk(state, **ENDLESS) as talk:
        if answering:
            talk.type("Sort 7 3 5\r")
            talk.wait_for_text("step ")
        assert not talk.process.getecho()
        talk.process.kill(signal.SIGTERM)
        assert talk.finish() == 143
        assert talk.process.getecho()
        assert "Traceback" not in talk.text


def demo_with(folder: Path, positions: int) -> Path:
    """Copy the demo with another number of positions."""
    shutil.copytree(DEMO_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = positions
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_ctrl_c_while_the_prompt_is_read_keeps_nothing(state: Path, tmp_path: Path) -> None:
    model = demo_with(tmp_path / "model", positions=1_000_000)
    (tmp_path / "long.txt").write_text("Sort 7 3 5\n" * 3_000)
    with Talk(state, "-m", str(model), **ENDLESS) as talk:
        talk.say(f"/read {tmp_path / 'long.txt'}")
        talk.type("please\r")
        talk.wait_for_text("reading the prompt")
        assert talk.say(CTRL_C, enter="") == ["cancelled; nothing was kept"]
        assert any(re.fullmatch("denoising steps +0", row) for row in talk.say("/stats"))
        talk.say("/set steps 2")
        assert talk.say("/drop") == [f"{tmp_path / 'long.txt'} will not be sent"]  # the file has waited for another try
        assert talk.say("Sort 7 3 5")  # the conversation continues
        assert len(messages(state)) == 2


def test_ctrl_c_while_the_model_loads_ends_the_program(state: Path, tmp_path: Path) -> None:
    model = demo_with(tmp_path / "model", positions=4096)
    pipe = model / "generation_config.json"
    pipe.unlink()
    os.mkfifo(pipe)
    with Terminal(["chat", "-m", str(model)], env={"DGEMMA_STATE": str(state)}) as terminal:
        writer = opened(pipe)
        time.sleep(0.5)  # now the program is reading the pipe
        terminal.type(CTRL_C)
        assert terminal.finish() == 130
        os.close(writer)
    assert "Traceback" not in terminal.text


def opened(pipe: Path) -> int:
    """Open the writing end of a named pipe as soon as a program reads it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(state: Path, tmp_path: Path) -> None:
    model = demo_with(tmp_path / "model", positions=112)
    with Talk(state, "-m", str(model)) as talk:
        talk.say("My name is Ana.")
        for number in range(20):
            if any("the conversation no longer fits" in row for row in talk.say(f"Sort {number} 3 5")):
                break
        kept = [message["content"] for message in messages(state)[0::2]]
        assert kept[0] == "My name is Ana." and kept[-1] == f"Sort {number} 3 5"  # forgotten, but not lost
        assert int(re.search(r"prompt tokens +(\d+)", "\n".join(talk.say("/stats")))[1]) < 112  # type: ignore[index]
        before = messages(state)
        assert "the message is too long" in talk.say("Sort 1 2 3 " * 20)[-2]
        talk.leave()
    assert messages(state) == before


def test_a_terminal_that_cannot_edit_gets_no_escape_codes(state: Path) -> None:
    with Talk(state, TERM="dumb") as talk:
        talk.type("Sort 7 3 5\r")
        talk.wait_for(lambda: talk.text.endswith("3 5 7\n>>>"))
        talk.leave()
        assert b"\x1b" not in talk.output


def test_a_terminal_that_cannot_edit_has_quotation_marks_and_two_ctrl_c(state: Path) -> None:
    def prompts(number: int) -> None:
        talk.wait_for(lambda: talk.prompts() == number and talk.text.endswith("\n>>>"))

    with Talk(state, TERM="dumb") as talk:
        talk.type('"""Sort\r')
        talk.wait_for(lambda: talk.text.endswith("\n..."))
        talk.type('9 3 5"""\r')
        prompts(2)
        assert messages(state)[-2]["content"] == "Sort\n9 3 5"
        talk.type('"""Sort\r')
        talk.wait_for(lambda: talk.text.endswith("\n..."))
        talk.type(CTRL_C)  # gives up the message
        prompts(3)
        assert "again" not in talk.text and len(messages(state)) == 2
        talk.type(CTRL_C)
        prompts(4)
        assert "Ctrl-C again or Ctrl-D leaves" in talk.text
        talk.type("/system\r")  # another line in between restarts the count
        prompts(5)
        talk.type(CTRL_C)
        prompts(6)
        talk.type(CTRL_C)
        assert talk.finish() == 0
    assert len(messages(state)) == 2


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Talk(tmp_path / "file" / "state") as talk:
        assert "what you type will not be kept" in talk.text
        answer, *said = talk.say("Sort 7 3 5")
        assert answer == "3 5 7" and said[0].startswith("dgemma-mlx: from here on nothing is kept: cannot write ")
        assert len(talk.say("Sort 9 8")) == 1  # it is said once
        talk.leave()


PROGRAM = [sys.executable, "-m", "dgemma_mlx", "chat", "-m", "demo", "--seed", "1"]


def piped(state: Path, stdin: bytes, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*PROGRAM, *arguments], input=stdin, capture_output=True, timeout=60, check=False,
        env={**os.environ, **FEW, "DGEMMA_STATE": str(state), **environment},
    )


def test_without_a_terminal_one_line_is_one_turn(state: Path) -> None:
    lines = 'Sort 7 3 5\r\n\n/stats\n"""My name is Ana."""\nWhat is my name?'
    done = piped(state, lines.encode())
    assert done.returncode == 0
    answers = done.stdout.decode().splitlines()
    assert answers[0] == "3 5 7" and "Ana" in answers[2] and len(answers) == 3
    assert b"cached tokens" in done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    assert [message["content"] for message in messages(state)[0::2]] == [
        "Sort 7 3 5", "My name is Ana.", "What is my name?"
    ]  # fmt: skip
    again = piped(state, b"What is my name?\n", "--resume")
    assert b"Ana" in again.stdout
    assert len(messages(state)) == 8


def test_an_error_in_a_pipe_is_reported_and_the_rest_is_answered(state: Path) -> None:
    done = piped(state, b"/bogus\nSort 7 3 5\n/edit\n/bye\nSort 2 1\n")
    assert (done.returncode, done.stdout) == (1, b"3 5 7\n")
    errors = done.stderr.decode().splitlines()
    assert errors[0] == "there is no command /bogus" and errors[1].startswith("hint: ")
    assert errors[2] == "/edit needs a terminal that can edit"


def test_bytes_that_are_not_text_are_refused(state: Path) -> None:
    done = piped(state, b"Sort 7 3 5\ncaf\xe9\nSort 2 1\n")
    assert (done.returncode, done.stdout) == (2, b"3 5 7\n")
    error, hint = done.stderr.decode().splitlines()
    assert error == "dgemma-mlx: standard input is not UTF-8 text (line 2)" and hint.startswith("hint: ")


def test_empty_input_is_not_an_error(state: Path) -> None:
    for stdin in (b"", b"\n \n"):
        done = piped(state, stdin)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.fixture
def running(state: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        PROGRAM, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **LONG, "DGEMMA_STATE": str(state)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        yield process
        process.kill()


def test_interrupted_in_a_pipe_it_keeps_what_there_is_and_ends_with_130(
    running: subprocess.Popen[bytes], state: Path
) -> None:
    assert running.stdin is not None and running.stdout is not None
    running.stdin.write(b"Count from 13 to 40.\nSort 7 3 5\n")
    running.stdin.close()
    first = running.stdout.read(8)  # the first canvas is committed
    running.send_signal(signal.SIGINT)
    answer = first + running.stdout.read()
    assert running.wait(60) == 130
    assert answer.startswith(b"13 14 15")
    (_, kept) = messages(state)
    assert kept["cancelled"] is True
    assert kept["content"].split() == answer.decode().split()


def test_a_reader_that_goes_away_ends_the_chat_quietly(running: subprocess.Popen[bytes]) -> None:
    assert running.stdin is not None and running.stdout is not None and running.stderr is not None
    running.stdout.close()
    running.stdin.write(b"Count from 13 to 40.\nSort 7 3 5\n")
    running.stdin.close()
    assert running.stderr.read() == b""
    assert running.wait(60) == 0


def test_without_a_conversation_there_is_nothing_to_continue(state: Path) -> None:
    done = piped(state, b"Hi\n", "--resume")
    assert (done.returncode, done.stdout) == (1, b"")
    error, hint = done.stderr.decode().splitlines()
    assert error == "dgemma-mlx: there is no conversation to continue" and hint.startswith("hint: ")


def test_the_conversation_of_an_earlier_version_is_continued(state: Path) -> None:
    turn = [{"role": "user", "content": "My name is Ana."}, {"role": "assistant", "content": "Nice to meet you, Ana."}]
    state.mkdir()
    earlier = state / "last_session.json"
    earlier.write_text(json.dumps({"format": "dgemma-mlx session 1", "messages": turn, "settings": {"seed": 1}}))
    done = piped(state, b"What is my name?\n", "--continue")
    assert b"Ana" in done.stdout and b"after 1 turn;" in done.stderr
    assert len(messages(state)) == 4 and len(log_of(state).entries()) == 1
    assert not earlier.exists() and json.loads((state / "last_session.old.json").read_text())["messages"] == turn


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_of_an_earlier_version_is_named_and_kept(state: Path, content: str) -> None:
    state.mkdir()
    (state / "last_session.json").write_text(content)
    done = piped(state, b"Sort 7 3 5\n")
    assert (done.returncode, done.stdout) == (0, b"3 5 7\n")
    assert "last_session.old.json" in done.stderr.decode()
    assert (state / "last_session.old.json").read_text() == content
    assert len(messages(state)) == 2


def test_resuming_takes_the_model_of_then_and_flags_of_now(state: Path, tmp_path: Path) -> None:
    model = demo_with(tmp_path / "model", positions=4096)
    piped(state, b"/set max_tokens 50\n/system Be brief.\nSort 7 3 5\n", "-m", str(model))
    without_model = [*PROGRAM[:4], "--resume", "--max-tokens", "20"]
    environment = {**os.environ, **FEW, "DGEMMA_STATE": str(state), "DGEMMA_SYSTEM": "Be kind."}
    done = subprocess.run(without_model, input=b"/show\nSort 2 1\n", capture_output=True, env=environment, check=False)
    shown = done.stderr.decode()
    assert re.search(r"^max_tokens +20$", shown, re.MULTILINE)
    assert re.search(r"^system +Be brief\.$", shown, re.MULTILINE)
    assert "built-in demo" not in shown
    assert last_session(state).model == str(model)
    shutil.rmtree(model)
    done = subprocess.run(without_model, input=b"", capture_output=True, env=environment, check=False)
    assert done.returncode == 1 and str(model).encode() in done.stderr
