"""The slash commands, as a table."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.session import CHANGEABLE, Session
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.settings import parse
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import size

QUOTES = '"""'
_COMMAND = re.compile(r"/(\S*)\s*(.*)", re.DOTALL)
_SHORT = {"steps": "max_denoising_steps"}
_UNSET = {"seed": "random", "temp": "falls from t_max to t_min"}


class Outcome(NamedTuple):
    """What a line leaves to the loop: ``ask`` to answer the last message, ``text`` to start the next one with."""

    ask: bool = False
    again: bool = False
    leave: bool = False
    text: str = ""


def at_terminal() -> bool:
    """Whether a person writes and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def can_edit() -> bool:
    """Whether that person's terminal can move its cursor."""
    return at_terminal() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def is_quoted(text: str) -> bool:
    """Whether the text begins and ends with three quotation marks."""
    return len(text) >= 2 * len(QUOTES) and text.startswith(QUOTES) and text.endswith(QUOTES)


def take(chat: Chat, line: str) -> Outcome:
    """Runs a command, or adds a message to the session; what is in three quotation marks is always a message.

    Raises ``DgemmaError`` where there is no such command, or it is used wrongly.
    """
    text = line.strip()
    if command := _COMMAND.fullmatch(text):
        name, rest = command.groups()
        if name not in COMMANDS:
            raise DgemmaError(f"there is no command /{name}", "/help lists them; nothing was sent to the model.")
        return COMMANDS[name].run(chat, rest) or Outcome()
    message = text[len(QUOTES) : -len(QUOTES)].strip() if is_quoted(text) else text
    if not message:
        return Outcome()
    chat.session.add("user", chat.attached + message)
    chat.attached = ""
    return Outcome(ask=True)


def _say(text: str) -> None:
    """To the terminal; in a pipe stdout is for answers alone."""
    print(visible(text), file=sys.stdout if sys.stdout.isatty() else sys.stderr)


def _help(chat: Chat, rest: str) -> None:
    width = max(len(f"/{name} {command.usage}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        _say(f"{f'/{name} {command.usage}':{width}}  {command.meaning}")
    _say('Alt-Enter breaks a line; """ begins and ends a message of many lines; Ctrl-C stops an answer.')


def _system(chat: Chat, rest: str) -> None:
    if rest:
        chat.session.system = None if rest == "none" else rest
    _say(f"system prompt: {chat.session.system or '(none)'}")


def _set(chat: Chat, rest: str) -> None:
    name, _, text = rest.partition(" ")
    name, text = _SHORT.get(name, name), text.strip()
    if name not in CHANGEABLE:
        message = f"there is no setting {name!r}" if name else "which setting?"
        raise DgemmaError(message, f"Settings: {', '.join(CHANGEABLE)}.")
    before = dict(chat.session.settings)
    if text in ("", "default"):
        chat.session.settings.pop(name, None)
    else:
        chat.session.settings[name] = parse(name, text, name)
    try:
        chat.generation()
    except DgemmaError:
        chat.session.settings = before
        raise
    _say(f"{name}: {_value(chat, name)}")


def _value(chat: Chat, name: str) -> str:
    """A setting as it is in force, the checkpoint's own where nothing else was chosen."""
    value = chat.setting(name)
    value = getattr(chat.model.generation, name, None) if value is None else value
    return _UNSET[name] if value is None else json.dumps(value)


def _show(chat: Chat, rest: str) -> None:
    for name in CHANGEABLE:
        _say(f"{name:22} {_value(chat, name)}")
    _say(f"{'system':22} {chat.session.system or '(none)'}")
    for message in chat.session.messages:
        mark = " (cancelled)" if message.get("cancelled") else ""
        _say(f"\n[{message['role']}{mark}]\n{message['content']}")
    if chat.attached:
        _say(f"\n{len(chat.attached):,} characters of files go with the next message")


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
        raise DgemmaError("/edit needs a terminal that can edit", "/undo takes the last turn back.")
    return Outcome(text=_last_question(chat))


def _last_question(chat: Chat) -> str:
    question = chat.session.pop_turn()
    if question is None:
        raise DgemmaError("there is no turn yet", "Write a message first.")
    return question


def _read(chat: Chat, rest: str) -> None:
    path = _path(rest, "/read FILE")
    try:
        if path.exists() and not path.is_file():
            raise DgemmaError(f"{path} is no file", "Only text files can be read.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", "Check its name.") from None
    except UnicodeDecodeError:
        raise DgemmaError(f"{path} is no text in UTF-8", "Only text can be read.") from None
    chat.attached += text.strip() + "\n\n"
    _say(f"{path}: {len(text):,} characters, sent with your next message")


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
    path = Path(os.path.expanduser(text))
    if not path.name or "\0" in text:
        raise DgemmaError("which file?", f"Write {usage}.")
    return path


def _stats(chat: Chat, rest: str) -> None:
    if chat.last is None:
        raise DgemmaError("nothing was generated yet", "Write a message first.")
    for name, value in asdict(chat.last.statistics).items():
        shown = size(value) if name == "peak_memory" else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
        _say(f"{name.replace('_', ' '):20} {shown}")
    _say(f"{'finish reason':20} {chat.last.finish_reason}")
    _say(f"{'seed':20} {chat.last.seed}")


def _bye(chat: Chat, rest: str) -> Outcome:
    return Outcome(leave=True)


class Command(NamedTuple):
    """What follows the name, what it does, and the function."""

    usage: str
    meaning: str
    run: Callable[[Chat, str], Outcome | None]


COMMANDS = {
    "help": Command("", "this list", _help),
    "system": Command("[TEXT|none]", "set, remove or show the system prompt", _system),
    "set": Command("NAME [VALUE]", "change a setting; without value, back to its default", _set),
    "show": Command("", "settings and conversation", _show),
    "clear": Command("", "begin a new conversation", _clear),
    "regen": Command("", "answer the last message again", _regen),
    "undo": Command("", "forget the last turn", _undo),
    "edit": Command("", "change the last message and send it again", _edit),
    "read": Command("FILE", "send a text file with the next message", _read),
    "save": Command("FILE", "save the conversation", _save),
    "load": Command("FILE", "go on with a saved conversation", _load),
    "stats": Command("", "what the last answer took", _stats),
    "bye": Command("", "leave (so does Ctrl-D)", _bye),
}
