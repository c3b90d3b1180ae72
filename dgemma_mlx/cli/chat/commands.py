"""All slash commands of a conversation, and the loop's way to them.

A group of commands is a file of its own with a ``COMMANDS``, which ``COMMANDS`` here collects in the order of /help.
"""

from __future__ import annotations

import re

from dgemma_mlx.cli.attachments import Attachment, with_attachments
from dgemma_mlx.cli.chat import copy, files, kept, models, options, pictures, turns
from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.command import Command, Outcome, at_terminal, say
from dgemma_mlx.cli.chat.paths import paths_of
from dgemma_mlx.cli.images import AttachedImage
from dgemma_mlx.errors import DgemmaError

QUOTES = '"""'
_COMMAND = re.compile(r"/(\S*)\s*(.*)", re.DOTALL)


def is_quoted(text: str) -> bool:
    """Return whether the text begins and ends with three quotation marks."""
    return len(text) >= 2 * len(QUOTES) and text.startswith(QUOTES) and text.endswith(QUOTES)


def is_open(text: str) -> bool:
    """Return whether the text begins with three quotation marks and does not end with them."""
    return text.strip().startswith(QUOTES) and not is_quoted(text.strip())


def take(chat: Chat, line: str, *, edited: bool = False) -> Outcome:
    """Run a command, or add a message to the session. Text within three quotation marks is always a message.

    A message that was ``edited`` replaces the last turn.

    On a terminal, the absolute paths of images in a line attach them, as when files are dragged into the window. A line
    without other words only attaches them.

    Raises `DgemmaError` for an unknown command and for a command that is used wrongly.
    """
    text = line.strip()
    words, command = text, _COMMAND.fullmatch(text)
    name = ALIASES.get(command[1], command[1]) if command else None
    if command and name in COMMANDS:
        return COMMANDS[name].run(chat, command[2]) or Outcome()
    if at_terminal() and not is_quoted(text) and (found := pictures.dragged(text)).paths:
        if chat.reads_images or name is not None or not found.text:
            pictures.attach(chat, found.paths)
            if not (words := found.text):
                return Outcome()
        else:
            say(f"{chat.model_name} reads no images: {found.paths[0].name} is sent as its path")
    elif name is not None:
        raise _no_command(text, name)
    if at_terminal() and text in ("exit", "quit", "help"):
        hint = f"Write /{text}. To send the word as a message, write {QUOTES}{text}{QUOTES}."
        raise DgemmaError(f"{text} alone is not sent to the model", hint)
    message = text[len(QUOTES) : -len(QUOTES)].strip() if is_quoted(text) else words
    if not message:
        return Outcome()
    before = chat.session.pop_turn() if edited else None  # its images stay
    images = [*((before or {}).get("images", ())),
              *(each.image for each in chat.attachments if isinstance(each, AttachedImage))]  # fmt: skip
    files_before = [each for each in chat.attachments if isinstance(each, Attachment)]
    chat.session.add("user", with_attachments(message, files_before), images=images)
    chat.attachments = []
    return Outcome(ask=True)


def _no_command(text: str, name: str) -> DgemmaError:
    """Return the error about a line with a slash that is no command: a mistake, or a file that was dropped there."""
    try:
        is_file = all(path.exists() for path in paths_of(text, "/read FILE"))
    except DgemmaError:
        is_file = False
    hint = "/help lists the commands. Nothing was sent."
    if is_file:
        hint = "/read FILE sends a file, and /image FILE shows a picture."
    return DgemmaError(f"there is no command /{name}", hint)


def _help(chat: Chat, rest: str) -> None:
    width = max(len(f"/{name} {command.usage}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        say(f"{f'/{name} {command.usage}':{width}}  {command.meaning}")
    say('Alt-Enter starts a new line; """ begins and ends a message of several lines; Ctrl-C stops an answer.')
    say("Ctrl-X Ctrl-E writes the message in your editor; Tab completes; the right arrow takes a suggestion.")


def _bye(chat: Chat, rest: str) -> Outcome:
    return Outcome(leave=True)


COMMANDS = {
    "help": Command("", "show this list; so does /?", _help),
    **models.COMMANDS,
    **options.COMMANDS,
    **turns.COMMANDS,
    **files.COMMANDS,
    **pictures.COMMANDS,
    **copy.COMMANDS,
    **kept.COMMANDS,
    "bye": Command("", "leave; so do /exit, /quit and Ctrl-D", _bye),
}
ALIASES = {"?": "help", "exit": "bye", "quit": "bye"}
