"""What a slash command is, and what all of them share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.render.visible import visible


class Outcome(NamedTuple):
    """What the loop has to do after a line.

    Attributes:
        ask: Answer the last message.
        again: The message has been answered before.
        leave: End the conversation.
        text: Start the next line with this text, which is the last message; the line replaces its turn.
    """

    ask: bool = False
    again: bool = False
    leave: bool = False
    text: str = ""


class Command(NamedTuple):
    """A slash command.

    Attributes:
        usage: What follows the name.
        meaning: What the command does.
        run: The function that runs it.
    """

    usage: str
    meaning: str
    run: Callable[[Chat, str], Outcome | None]


def at_terminal() -> bool:
    """Return whether a person writes and reads: stdin and stdout are terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def can_edit() -> bool:
    """Return whether a person writes on a terminal that can move its cursor."""
    return at_terminal() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def say(text: str) -> None:
    """Print to the terminal, or to stderr when stdout is a pipe, which receives only answers."""
    print(visible(text), file=sys.stdout if sys.stdout.isatty() else sys.stderr)
