"""Slash commands for files: /read, /save, /load."""

from __future__ import annotations

import os
from dataclasses import replace

from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.command import Command, path_of, say
from dgemma_mlx.cli.chat.session import Session
from dgemma_mlx.errors import DgemmaError


def _read(chat: Chat, rest: str) -> None:
    path = path_of(rest, "/read FILE")
    try:
        if path.exists() and not path.is_file():
            raise DgemmaError(f"{path} is not a file", "Only text files can be read.")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", "Check the name of the file.") from None
    except UnicodeDecodeError:
        raise DgemmaError(f"{path} is not UTF-8 text", "Only text can be read.") from None
    chat.attached += text.strip() + "\n\n"
    say(f"{path}: {len(text):,} characters, which will be sent with your next message")


def _save(chat: Chat, rest: str) -> None:
    path = path_of(rest, "/save FILE")
    if os.path.exists(path):
        try:
            Session.load(path)
        except DgemmaError as error:
            raise DgemmaError(f"not overwritten: {error.message}", "Choose another name.") from None
    chat.session.save(path)
    say(f"saved to {path}")


def _load(chat: Chat, rest: str) -> None:
    path = path_of(rest, "/load FILE")
    chat.session, chat.attached = replace(Session.load(path), model=chat.session.model), ""
    turns = chat.session.turns
    say(f"{turns} turn{'' if turns == 1 else 's'} from {path}")


COMMANDS = {
    "read": Command("FILE", "send a text file with the next message", _read),
    "save": Command("FILE", "save the conversation", _save),
    "load": Command("FILE", "continue a saved conversation", _load),
}
