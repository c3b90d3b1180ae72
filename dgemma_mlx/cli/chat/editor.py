"""Line editing on a terminal: history on disk, messages of many lines, completion of commands."""

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

from dgemma_mlx.cli.chat.commands import COMMANDS, QUOTES, is_quoted
from dgemma_mlx.cli.chat.session import CHANGEABLE


def editor(history: Path | None) -> Callable[[str], str | None]:
    """Asks for a message, with a text to start from; None when the user leaves. Without ``history`` none is kept."""
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
                empty = not session.default_buffer.text
                if warned and empty:
                    return None
                if empty:
                    print("Ctrl-C again or Ctrl-D leaves", file=sys.stderr)
                warned, start = empty, ""
            else:
                return text.encode("utf-8", "replace").decode()  # typed bytes may be no UTF-8

    return ask


def _keys() -> KeyBindings:
    """Enter sends, unless quotation marks are open; Alt-Enter breaks the line."""
    keys = KeyBindings()
    writing = has_focus(DEFAULT_BUFFER)  # and not searching in the history

    @keys.add("escape", "enter", filter=writing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter", filter=writing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = buffer.text.strip()
        if text.startswith(QUOTES) and not is_quoted(text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    return keys


class _Commands(Completer):
    """Completes slash commands, the names of settings, and files."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
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
