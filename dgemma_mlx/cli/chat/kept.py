"""Slash commands for the conversations that are kept: /sessions, /rename."""

from __future__ import annotations

from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.command import Command, say
from dgemma_mlx.cli.images import gone_line
from dgemma_mlx.cli.log.log import CONTINUABLE, Log, check_continuable, check_name
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import counted

_LISTED = 10


def _sessions(chat: Chat, rest: str) -> None:
    log = Log()
    if rest:
        _switch(chat, log, rest)
        return
    from dgemma_mlx.cli.sessions import line_of

    found = log.entries(CONTINUABLE, _LISTED)
    for entry in found:
        say(("* " if entry.id == chat.session.id else "  ") + line_of(entry))
    if not found:
        say("no conversation is kept yet")


def _switch(chat: Chat, log: Log, key: str) -> None:
    """Go on with another conversation, and with the model of now. Raises `DgemmaError`, without a change."""
    entry = log.entry(log.find(key))
    check_continuable(entry)
    before, chat.session = chat.session, log.load(entry.id)
    chat.session.model = before.model
    try:
        chat.check()
    except DgemmaError:
        chat.session = before
        raise
    chat.attachments = []
    say(f"{entry.id}: {counted(chat.session.turns, 'turn')}; /show shows them")
    if (line := gone_line(chat.session.messages)) is not None:
        say(line)


def _rename(chat: Chat, rest: str) -> None:
    if not chat.setting("log"):
        raise DgemmaError("this conversation is not kept: the setting log is off", "/save FILE saves it.")
    log = Log()
    if chat.session.id is None:  # it is kept with its first answer
        check_name(rest)
        if log.named(rest) is not None:
            raise DgemmaError(f"another conversation is named {rest}", "Choose another name.")
    else:
        log.rename(chat.session.id, rest)
    chat.session.name = rest
    say(f"this conversation is {rest}")


COMMANDS = {
    "sessions": Command("[NAME]", "list the last conversations, or go on with one", _sessions),
    "rename": Command("NAME", "give this conversation a name", _rename),
}
