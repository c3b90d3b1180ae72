"""The slash commands of a conversation."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from dgemma_mlx.checks import shown
from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.session import CHANGEABLE, Session
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.settings import parse
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import size

QUOTES = '"""'
_COMMAND = re.compile(r"/(\S*)\s*(.*)", re.DOTALL)
_SHORT = {"steps": "max_denoising_steps"}
_UNSET = {"seed": "random", "temp": "falls from t_max to t_min"}  # how a setting without a value is shown


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


def at_terminal() -> bool:
    """Return whether a person writes and reads: stdin and stdout are terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def can_edit() -> bool:
    """Return whether a person writes on a terminal that can move its cursor."""
    return at_terminal() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def is_quoted(text: str) -> bool:
    """Return whether the text begins and ends with three quotation marks."""
    return len(text) >= 2 * len(QUOTES) and text.startswith(QUOTES) and text.endswith(QUOTES)


def take(chat: Chat, line: str, *, edited: bool = False) -> Outcome:
    """Run a command, or add a message to the session. Text within three quotation marks is always a message.

    A message that was ``edited`` replaces the last turn.

    Raises `DgemmaError` for an unknown command and for a command that is used wrongly.
    """
    text = line.strip()
    if command := _COMMAND.fullmatch(text):
        name, rest = command.groups()
        if name not in COMMANDS:
            raise DgemmaError(f"there is no command /{name}", "/help lists the commands. Nothing was sent.")
        return COMMANDS[name].run(chat, rest) or Outcome()
    message = text[len(QUOTES) : -len(QUOTES)].strip() if is_quoted(text) else text
    if not message:
        return Outcome()
    if edited:
        chat.session.pop_turn()
    chat.session.add("user", chat.attached + message)
    chat.attached = ""
    return Outcome(ask=True)


def _say(text: str) -> None:
    """Print to the terminal, or to stderr when stdout is a pipe, which receives only answers."""
    print(visible(text), file=sys.stdout if sys.stdout.isatty() else sys.stderr)


def _help(chat: Chat, rest: str) -> None:
    width = max(len(f"/{name} {command.usage}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        _say(f"{f'/{name} {command.usage}':{width}}  {command.meaning}")
    _say('Alt-Enter starts a new line; """ begins and ends a message of several lines; Ctrl-C stops an answer.')


def _system(chat: Chat, rest: str) -> None:
    if rest:
        chat.session.system = None if rest == "none" else rest
    _say(f"system prompt: {chat.session.system or '(none)'}")


def _set(chat: Chat, rest: str) -> None:
    name, _, text = rest.partition(" ")
    name, text = _SHORT.get(name, name), text.strip()
    if name not in CHANGEABLE:
        message = f"there is no setting {shown(name)}" if name else "which setting?"
        raise DgemmaError(message, f"Settings: {', '.join(CHANGEABLE)}.")
    before = dict(chat.session.settings)
    if text in ("", "default"):
        chat.session.settings.pop(name, None)
    else:
        chat.session.settings[name] = parse(name, text, name)
    try:
        chat.check()
    except DgemmaError:
        chat.session.settings = before
        raise
    _say(f"{name}: {_value(chat, name)}")


def _value(chat: Chat, name: str) -> str:
    """Return the value of a setting as JSON, or in words where it has none."""
    value = chat.value_in_force(name)
    return _UNSET.get(name, "the server's") if value is None else json.dumps(value)


def _show(chat: Chat, rest: str) -> None:
    for name in CHANGEABLE:
        _say(f"{name:22} {_value(chat, name)}")
    _say(f"{'system':22} {chat.session.system or '(none)'}")
    for message in chat.session.messages:
        mark = " (cancelled)" if message.get("cancelled") else ""
        content = message.get("content") or ""
        _say(f"\n[{message['role']}{mark}]\n{content if isinstance(content, str) else json.dumps(content)}")
        for call in message.get("tool_calls") or ():
            _say(f"tool call: {json.dumps(call, ensure_ascii=False)}")
    if chat.attached:
        _say(f"\n{len(chat.attached):,} characters of files will be sent with the next message")


def _clear(chat: Chat, rest: str) -> None:
    chat.session.messages, chat.attached = [], ""
    _say("a new conversation")


def _regen(chat: Chat, rest: str) -> Outcome:
    chat.session.add("user", _last_question(chat))
    return Outcome(ask=True, again=True)


def _undo(chat: Chat, rest: str) -> None:
    _last_question(chat)
    _say("the last turn is undone")


def _edit(chat: Chat, rest: str) -> Outcome:
    if not can_edit():
        raise DgemmaError("/edit needs a terminal that can edit", "/undo removes the last turn.")
    if not chat.session.turns:
        raise _no_turn()
    return Outcome(text=str(chat.session.messages[chat.session.questions[-1]]["content"]))


def _last_question(chat: Chat) -> str:
    """Remove the last turn and return its question. Raises `DgemmaError` when there is no turn."""
    question = chat.session.pop_turn()
    if question is None:
        raise _no_turn()
    return question


def _no_turn() -> DgemmaError:
    return DgemmaError("there is no turn yet", "Write a message first.")


def _read(chat: Chat, rest: str) -> None:
    path = _path(rest, "/read FILE")
    try:
        if path.exists() and not path.is_file():
            raise DgemmaError(f"{path} is not a file", "Only text files can be read.")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", "Check the name of the file.") from None
    except UnicodeDecodeError:
        raise DgemmaError(f"{path} is not UTF-8 text", "Only text can be read.") from None
    chat.attached += text.strip() + "\n\n"
    _say(f"{path}: {len(text):,} characters, which will be sent with your next message")


def _save(chat: Chat, rest: str) -> None:
    path = _path(rest, "/save FILE")
    if os.path.exists(path):
        try:
            Session.load(path)
        except DgemmaError as error:
            raise DgemmaError(f"not overwritten: {error.message}", "Choose another name.") from None
    chat.session.save(path)
    _say(f"saved to {path}")


def _load(chat: Chat, rest: str) -> None:
    path = _path(rest, "/load FILE")
    chat.session, chat.attached = replace(Session.load(path), model=chat.session.model), ""
    turns = chat.session.turns
    _say(f"{turns} turn{'' if turns == 1 else 's'} from {path}")


def _path(text: str, usage: str) -> Path:
    """Return the path that follows a command. Raises `DgemmaError` when there is none."""
    path = Path(os.path.expanduser(text))
    if not path.name or "\0" in text:
        raise DgemmaError("which file?", f"Write {usage}.")
    return path


def _stats(chat: Chat, rest: str) -> None:
    if chat.last is None:
        raise DgemmaError("nothing has been generated yet", "Write a message first.")
    for name, value in asdict(chat.last.statistics).items():
        shown = size(value) if name == "peak_memory" else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
        _say(f"{name.replace('_', ' '):20} {shown}")
    _say(f"{'finish reason':20} {chat.last.finish_reason}")
    _say(f"{'seed':20} {chat.last.seed}")


def _bye(chat: Chat, rest: str) -> Outcome:
    return Outcome(leave=True)


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


COMMANDS = {
    "help": Command("", "show this list", _help),
    "system": Command("[TEXT|none]", "set, remove or show the system prompt", _system),
    "set": Command("NAME [VALUE]", "change a setting; without VALUE, restore its default", _set),
    "show": Command("", "show settings and conversation", _show),
    "clear": Command("", "begin a new conversation", _clear),
    "regen": Command("", "answer the last message again", _regen),
    "undo": Command("", "forget the last turn", _undo),
    "edit": Command("", "change the last message and send it again", _edit),
    "read": Command("FILE", "send a text file with the next message", _read),
    "save": Command("FILE", "save the conversation", _save),
    "load": Command("FILE", "continue a saved conversation", _load),
    "stats": Command("", "show the statistics of the last answer", _stats),
    "bye": Command("", "leave (so does Ctrl-D)", _bye),
}
