"""What a person sees and types in a chat: banner, the line below the prompt, completion, an editor, the clipboard."""

from __future__ import annotations

import base64
import gc
import os
import re
import shutil
import subprocess
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

import dgemma_mlx
from dgemma_mlx.cli.chat.commands import take
from dgemma_mlx.cli.chat.local import LocalChat
from dgemma_mlx.cli.loading import model_loader
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.parameters import ModelOptions
from dgemma_mlx.cli.settings import SETTINGS, Settings
from dgemma_mlx.errors import DgemmaError
from tests.cli.test_conversation import CTRL_D, Talk, demo_with

STATUS = re.compile(r"\w+  [\d,]+ of [\d,]+ tokens of context")
CTRL_X_CTRL_E, RIGHT = "\x18\x05", "\x1b[C"


class Seen(Talk):
    """A chat on a terminal that tells where its cursor is, as real ones do. Then a line stands below the prompt."""

    def __init__(self, state: Path) -> None:
        super().__init__(state, PROMPT_TOOLKIT_NO_CPR="")

    def read(self, seconds: float = 0.1) -> bool:
        self.screen.write_process_input = self.process.send
        return super().read(seconds)

    @property
    def text(self) -> str:
        """The text without the line below the prompt."""
        rows = self.screen.text.splitlines()
        return "\n".join(rows[:-1] if rows and STATUS.match(rows[-1]) else rows).rstrip()

    def wait_for_status(self, pattern: str) -> None:
        """Wait until the line below the prompt is all of a pattern."""
        self.wait_for(lambda: re.fullmatch(pattern, self.screen.text.splitlines()[-1]) is not None)


def program(folder: Path, name: str, script: str) -> Path:
    """Write a shell script into a folder of programs."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_person_sees_model_context_and_how_to_leave(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Sort 7 3 5")
    with Seen(tmp_path / "state") as talk:
        assert talk.text.startswith("demo, 0 of 4,096 tokens of context; /help lists the commands, Ctrl-D leaves\n")
        talk.wait_for_status("demo  0 of 4,096 tokens of context")
        talk.say("Sort 7 3 5")
        talk.wait_for_status(r"demo  [1-9]\d* of 4,096 tokens of context")
        talk.say(f"/read {tmp_path / 'a.txt'}")
        talk.wait_for_status(".*  1 file to send")
        talk.say("/clear")
        talk.wait_for_status("demo  0 of 4,096 tokens of context")
        assert talk.say("/set stats on") == ["stats: true"]
        answer, *rows = talk.say("Sort 7 3 5")
        assert answer == "3 5 7"
        line = " ".join(rows)
        assert re.search(r"tokens in 1 canvas.* tokens/s after the prompt.* \d+ of 4,096 tokens of context$", line)
        assert talk.say("/?") == talk.say("/help")
        for word in ("exit", "quit", "help"):
            assert talk.say(word)[0] == f"{word} alone is not sent to the model"
        assert "/read FILE sends a file" in talk.say(str(tmp_path / "a.txt"))[-1]
        talk.say('"""exit"""')  # a message
        talk.type("/exit\r")
        assert talk.finish() == 0
        assert "tokens of context\n" not in talk.text.split("/exit")[1]  # the line below the prompt does not stay


def test_words_are_completed_and_suggested(tmp_path: Path) -> None:
    (tmp_path / "My File.txt").write_text("Sort 7 3 5")
    with Talk(tmp_path / "state", HOME=str(tmp_path)) as talk:
        for typed, completed in (
            ("/read a ~/My\t", r"/read a ~/My\ File.txt"), ("/set stats of\t", "/set stats off"),
            ("/set speed ref\t", "/set speed reference"), ("/model d\t", "/model demo"), ("/copy c\t", "/copy code"),
        ):  # fmt: skip
            talk.type(typed)
            talk.wait_for(lambda: talk.text.endswith(">>> " + completed))  # noqa: B023
            talk.type("\x15")  # erases the line
            talk.wait_for(lambda: talk.text.endswith(">>>"))
        talk.say("Sort 7 3 5")
        talk.type("So")
        talk.wait_for(lambda: talk.text.endswith(">>> Sort 7 3 5"))  # suggested
        talk.type(RIGHT + "\r")
        talk.wait_for(lambda: talk.text.count("\n>>> Sort 7 3 5\n") == 2 and talk.prompts() == 3)


def test_an_editor_writes_a_message_that_is_not_sent_yet(tmp_path: Path) -> None:
    editor = program(tmp_path / "bin", "editor", 'cat "$1" >"$0.seen"; printf "Sort\\n9 3 5\\n" >"$1"')
    with Talk(tmp_path / "state", EDITOR=str(editor), VISUAL="") as talk:
        talk.type("draft" + CTRL_X_CTRL_E)
        talk.wait_for(lambda: talk.text.endswith(">>> Sort\n... 9 3 5"))
        assert Path(f"{editor}.seen").read_text() == "draft"
        assert talk.say("") == ["... 9 3 5", "3 5 9"]


def test_an_answer_is_copied_by_a_program_or_by_the_terminal(tmp_path: Path) -> None:
    program(tmp_path / "bin", "xclip", f'cat >"{tmp_path}/$2"')
    places = {"DISPLAY": ":0", "WAYLAND_DISPLAY": "", "SSH_CONNECTION": "", "SSH_TTY": "", "TMUX": ""}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    with Talk(tmp_path / "state", PATH=path, **places) as talk:
        assert "there is no answer yet" in talk.say("/copy")
        talk.say("Sort 7 3 5")
        assert talk.say("/copy") == ["5 characters copied to the clipboard"]
        assert (tmp_path / "clipboard").read_text() == "3 5 7"
        assert "the last answer has no code block" in talk.say("/copy code")
        assert "/copy does not know all" in talk.say("/copy all")
    with Talk(tmp_path / "state", PATH=path, **{**places, "SSH_CONNECTION": "1 2 3 4"}) as talk:
        talk.say("Sort 9 3 5")
        assert talk.say("/copy") == ["5 characters copied to the terminal's clipboard, if it allows that (OSC 52)"]
        assert b"\x1b]52;c;" + base64.b64encode(b"3 5 9") + b"\a" in talk.output
    assert (tmp_path / "clipboard").read_text() == "3 5 7"


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_an_answer_is_copied_to_tmux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgemma_mlx.cli.chat.clipboard import put

    tmux = ["tmux", "-S", str(tmp_path / "socket")]
    subprocess.run([*tmux, "-f", "/dev/null", "new-session", "-d", "sleep", "60"], check=True)
    try:
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SSH_TTY", "/dev/pts/9")
        monkeypatch.setenv("TMUX", f"{tmp_path / 'socket'},1,0")
        assert put("a\nß") == "tmux and the terminal's clipboard"
        shown = subprocess.run([*tmux, "show-buffer"], capture_output=True, check=True)
        assert shown.stdout.decode() == "a\nß"
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)


def test_code_is_copied_without_its_fences(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chat = switchable()
    chat.session.messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Here:\n```python\nprint(1)\n```\nand\n```\n2\n```"},
    ]
    program(tmp_path / "bin", "xsel", f'cat >"{tmp_path}/copied"')
    for name in ("WAYLAND_DISPLAY", "SSH_CONNECTION", "SSH_TTY", "TMUX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    take(chat, "/copy code")
    assert (tmp_path / "copied").read_text() == "print(1)\n"
    monkeypatch.delenv("DISPLAY")
    with pytest.raises(DgemmaError, match="there is no clipboard"):
        take(chat, "/copy")


def switchable() -> LocalChat:
    """Return a chat with the demo that can load other models."""
    defaults = {name: kind.default for name, kind in SETTINGS.items()}
    options = ModelOptions()
    return LocalChat(
        dgemma_mlx.load("demo"), Session(), {**defaults, "max_denoising_steps": 4, "max_tokens": 32, "seed": 1},
        draw=False, opener=lambda name: model_loader(Settings({}), replace(options, model=name)),
    )  # fmt: skip


def test_another_model_goes_on_with_the_conversation(tmp_path: Path) -> None:
    other = demo_with(tmp_path / "other", positions=2048)
    with Seen(tmp_path / "state") as talk:
        talk.say("My name is Ana.")
        assert talk.say("/model")[0].startswith("* demo")
        assert "answers from now on" in talk.say(f"/model {other}")[-1]
        talk.wait_for_status(r"other  \d+ of 2,048 tokens of context")
        assert "Ana" in talk.say("What is my name?")[0]
        assert any(row.startswith("hint: ") for row in talk.say("/model /nowhere/at/all"))
        talk.wait_for_status(r"other  \d+ of 2,048 tokens of context")
        talk.type(CTRL_D)
        assert talk.finish() == 0


def test_the_memory_of_a_model_is_free_before_the_next_is_loaded(tmp_path: Path) -> None:
    chat = switchable()
    take(chat, "Sort 7 3 5")
    assert chat.answer()
    first = weakref.ref(chat.model.network)
    damaged = demo_with(tmp_path / "damaged", positions=2048)
    for path in damaged.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DgemmaError):
        take(chat, f"/model {damaged}")
    assert chat.model.name == "demo" and chat.session.model is None
    gc.collect()
    assert first() is None
    take(chat, "Sort 9 3 5")
    assert chat.answer()
    with pytest.raises(DgemmaError):
        take(chat, "/model nobody/nothing")
    assert chat.model.name == "demo"
