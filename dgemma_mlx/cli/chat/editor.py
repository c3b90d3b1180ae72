"""Line editing on a terminal: history on disk, messages of several lines, completion of commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from dgemma_mlx.cli.chat.commands import COMMANDS, is_open
from dgemma_mlx.cli.log.session import CHANGEABLE


def editor(history: Path | None) -> Callable[[str], str | None]:
    """Return a function that asks for a message, starting with a text, and returns None when the user leaves.

    Ctrl-C gives up a text to start with, and then the message is empty.

    The history is kept in the file ``history``, or only in memory when it is None.
    """
    session: PromptSession[str] = PromptSession(
        ">>> ", history=InMemoryHistory() if history is None else FileHistory(str(history)), multiline=True,
        key_bindings=_keys(), completer=_Commands(), complete_while_typing=False, prompt_continuation="... ",
    )  # fmt: skip

    def ask(start: str) -> str | None:
        warned = False
        while True:
            try:
                text = session.prompt(default=start)
            except EOFError:
                return None
            except KeyboardInterrupt:
                if start:
                    return ""
                empty = not session.default_buffer.text
                if warned and empty:
                    return None
                if empty:
                    print("Ctrl-C again or Ctrl-D leaves", file=sys.stderr)
                warned = empty
            else:
                return text.encode("utf-8", "replace").decode()  # typed bytes may not be UTF-8

    return ask


def _keys() -> KeyBindings:
    """Return the key bindings: Enter sends unless quotation marks are open, and Alt-Enter starts a new line."""
    keys = KeyBindings()
    writing = has_focus(DEFAULT_BUFFER)  # not while the user searches the history

    @keys.add("escape", "enter", filter=writing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter", filter=writing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    return keys


class _Commands(Completer):
    """A completer for slash commands, the names of settings, and files."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield the words that complete the text before the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, rest = text[1:].partition(" ")
        if not space:
            names, done = {name: command.meaning for name, command in COMMANDS.items()}, name
        elif name == "set":
            names, done = dict.fromkeys(CHANGEABLE, ""), rest
        elif name in COMMANDS and COMMANDS[name].usage == "FILE":
            yield from PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)
            return
        else:
            return
        for word, meaning in names.items():
            if word.startswith(done):
                yield Completion(word, start_position=-len(done), display_meta=meaning)
