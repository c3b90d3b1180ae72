"""Slash commands for files: /read, /files, /drop, /save, /load."""

from __future__ import annotations

import os
from dataclasses import replace

from dgemma_mlx.cli.attachments import Attachment, read_attachments
from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.command import Command, say
from dgemma_mlx.cli.chat.paths import path_of, paths_of
from dgemma_mlx.cli.images import AttachedImage, gone_line
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import counted, size


def _read(chat: Chat, rest: str) -> None:
    found = read_attachments(paths_of(rest, "/read FILE"), say)
    again = {attachment.name for attachment in found}
    chat.attachments = [*(old for old in chat.attachments if old.name not in again), *found]
    for attachment in found:
        say(_described(chat, attachment))
    say_waiting(chat)


def say_waiting(chat: Chat) -> None:
    """Say how many files go with the next message."""
    them = "it" if len(chat.attachments) == 1 else "them"
    say(f"{counted(len(chat.attachments), 'file')} will be sent with your next message; /drop takes {them} back")


def _described(chat: Chat, attachment: Attachment | AttachedImage) -> str:
    """Return the name and the size of a file, and its tokens where they can be counted."""
    if isinstance(attachment, AttachedImage):
        return str(attachment)
    tokens = chat.tokens_of(str(attachment))
    length = size(len(attachment.text.encode()))
    return f"{attachment.name}: {length}" + ("" if tokens is None else f", {tokens:,} tokens")


def _files(chat: Chat, rest: str) -> None:
    for number, attachment in enumerate(chat.attachments, 1):
        say(f"{number}  {_described(chat, attachment)}")
    if not chat.attachments:
        say("no file waits for your next message; /read FILE adds one")


def _drop(chat: Chat, rest: str) -> None:
    if not chat.attachments:
        raise DgemmaError("no file waits for your next message", "/read FILE adds one.")
    found = [
        attachment for number, attachment in enumerate(chat.attachments, 1)
        if rest in ("", str(number), attachment.name, os.path.basename(attachment.name))
    ]  # fmt: skip
    if not found:
        raise DgemmaError(f"no file that waits is called {rest}", "/files lists them; /drop takes a number or a name.")
    if rest and len(found) > 1:
        raise DgemmaError(f"{len(found)} files that wait are called {rest}", "/files lists them; take the number.")
    chat.attachments = [attachment for attachment in chat.attachments if attachment not in found]
    for attachment in found:
        say(f"{attachment.name} will not be sent")


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
    chat.session, chat.attachments = replace(Session.load(path), model=chat.session.model), []
    say(f"{counted(chat.session.turns, 'turn')} from {path}, as a new conversation")
    if (line := gone_line(chat.session.messages)) is not None:
        say(line)


COMMANDS = {
    "read": Command("FILE...", "send text files, or folders of them, with the next message", _read),
    "files": Command("", "list the files that will be sent", _files),
    "drop": Command("[N|NAME]", "take back one of these files, or all", _drop),
    "save": Command("FILE", "save the conversation", _save),
    "load": Command("FILE", "continue a saved conversation", _load),
}
