"""The clipboard of the machine that the user sits at."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from dgemma_mlx.errors import DgemmaError

_SECONDS = 5


def put(text: str) -> str:
    """Put a text on the clipboard and return where it is.

    A program of this machine takes it, unless the user has come over ssh. Otherwise tmux or the terminal is asked to
    (OSC 52), which cannot answer. Raises `DgemmaError` when there is neither.
    """
    for command in _commands():
        if shutil.which(command[0]) and _run(command, text):
            return "tmux and the terminal's clipboard" if command[0] == "tmux" else "the clipboard"
    stream = next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)
    if stream is None:
        raise DgemmaError("there is no clipboard", "Install wl-clipboard, xclip or xsel, or copy in a terminal.")
    stream.write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\a")
    stream.flush()
    return "the terminal's clipboard, if it allows that (OSC 52)"


def _commands() -> Iterator[list[str]]:
    """Yield the commands that may take the text from their standard input, the best first."""
    if not any(os.environ.get(name) for name in ("SSH_CONNECTION", "SSH_TTY")):
        if sys.platform == "darwin":
            yield ["pbcopy"]
        if os.environ.get("WAYLAND_DISPLAY"):
            yield ["wl-copy"]
        if os.environ.get("DISPLAY"):
            yield ["xclip", "-selection", "clipboard"]
            yield ["xsel", "--clipboard", "--input"]
    if os.environ.get("TMUX"):  # by default it keeps OSC 52 of programs from the terminal
        yield ["tmux", "load-buffer", "-w", "-"]


def _run(command: list[str], text: str) -> bool:
    """Return whether a command has taken the text. What stays to serve it must not hold this program's streams."""
    environment = {**os.environ, "LC_CTYPE": "UTF-8"} if command[0] == "pbcopy" else None  # else it takes Mac Roman
    try:
        done = subprocess.run(
            command, input=text.encode(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
            timeout=_SECONDS, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
