"""Agents: programs that work on a folder with the model's help, against a server on this machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.live import serving
from tests.server.quick import quick_model

HERE = Path(__file__).parent
PROGRAMS = HERE / "node_modules" / ".bin"
AIDER = HERE.parent.parent / ".venv-aider" / "bin"

# Runs a program with these variables, and returns what it prints: run(command, variables).
Run = Callable[[list[str], dict[str, str]], str]

# The tools by which agents read a file, and the argument that does it.
_READING = {"exec_command": 'cmd:<|"|>cat note.txt<|"|>', "[Bb]ash": 'command:<|"|>cat note.txt<|"|>'}


def script(prompt: str) -> str:
    """Return what the model writes to an agent: a call, an edit of a file, or an answer."""
    if "zebra" in prompt:  # which is in the note
        return "The word is zebra."
    if "animal.txt" in prompt:
        return "animal.txt\n```\nzebra\n```"
    tools = re.findall(r"<\|tool>declaration:(\w+)\{", prompt)
    for name, argument in _READING.items():
        tool = next((tool for tool in tools if re.fullmatch(name, tool)), None)
        if tool is not None and "note.txt" in prompt:
            return f"<|channel>thought\nHm.\n<channel|>I look.<|tool_call>call:{tool}{{{argument}}}<tool_call|>"
    return "<|channel>thought\nEasy.\n<channel|>3 5 7"


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a server whose model writes what ``script`` says."""
    with serving(lambda: quick_model(script, positions=1 << 18)) as address:
        yield address


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A function that runs a program in a folder with ``note.txt``, in a home of its own."""
    home, folder = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    folder.mkdir()
    (folder / "note.txt").write_text("The word is zebra.\n")

    def run(command: list[str], variables: dict[str, str]) -> str:
        environment = {"PATH": f"{PROGRAMS}:{AIDER}:/usr/local/bin:/usr/bin:/bin", "HOME": str(home), **variables}
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
