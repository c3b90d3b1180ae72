"""Line editing on a terminal: history on disk, messages of several lines, completion of commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from dgemma_mlx.cli.chat.commands import COMMANDS, is_open
from dgemma_mlx.cli.chat.paths import escaped, last_word
from dgemma_mlx.cli.log.session import CHANGEABLE
from dgemma_mlx.cli.settings import SETTINGS
from dgemma_mlx.errors import DgemmaError

_STYLE = Style.from_dict({"bottom-toolbar": "noreverse dim"})


def editor(
    history: Path | None, status: Callable[[], str], models: Callable[[], Iterable[str]]
) -> Callable[[str], str | None]:
    """Return a function that asks for a message, starting with a text, and returns None when the user leaves.

    Ctrl-C gives up a text to start with, and then the message is empty.

    The history is kept in the file ``history``, or only in memory when it is None. ``status`` returns the line that
    stands below the prompt, and ``models`` the names of models that can be completed.
    """
    session: PromptSession[str] = PromptSession(
        ">>> ", history=InMemoryHistory() if history is None else FileHistory(str(history)), multiline=True,
        key_bindings=_keys(), completer=Words(models), complete_while_typing=False, prompt_continuation="... ",
        auto_suggest=AutoSuggestFromHistory(), tempfile_suffix=".md", style=_STYLE,
    )  # fmt: skip

    def ask(start: str) -> str | None:
        warned = False
        while True:
            try:
                text = session.prompt(default=start, bottom_toolbar=status())
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

    @keys.add("c-x", "c-e", filter=writing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()  # of VISUAL or EDITOR; its text comes back and is not sent yet

    return keys


class Words(Completer):
    """A completer for slash commands, settings and their values, models, and files."""

    def __init__(self, models: Callable[[], Iterable[str]]) -> None:
        """``models`` returns the names of models, when they are asked for."""
        self._models = models

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield the words that complete the text before the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, rest = text[1:].partition(" ")
        if not space:
            yield from _beginning(name, {name: command.meaning for name, command in COMMANDS.items()})
        elif name == "set":
            setting, space, value = rest.partition(" ")
            yield from _beginning(value, _values(setting)) if space else _beginning(rest, dict.fromkeys(CHANGEABLE, ""))
        elif name == "model":
            with suppress(DgemmaError):  # such as a server that has gone
                yield from _beginning(rest, dict.fromkeys(self._models(), ""))
        elif name == "copy":
            yield from _beginning(rest, {"code": ""})
        elif name in COMMANDS and COMMANDS[name].usage.lstrip("[").startswith("FILE"):
            yield from _paths(rest, complete_event)


def _beginning(done: str, words: dict[str, str]) -> Iterable[Completion]:
    """Yield the words that begin with what is typed, with their meanings."""
    for word, meaning in words.items():
        if word.startswith(done):
            yield Completion(word, start_position=-len(done), display_meta=meaning)


def _values(setting: str) -> dict[str, str]:
    """Return the values of a setting that has few."""
    kind = SETTINGS[setting] if setting in CHANGEABLE else None
    if kind is None:
        return {}
    return dict.fromkeys(kind.choices or (("on", "off") if kind.type is bool else ()), "")


def _paths(typed: str, complete_event: CompleteEvent) -> Iterable[Completion]:
    """Yield the paths that complete the last of several, which has a backslash before its spaces."""
    word = last_word(typed)
    if word is None:
        return
    for found in PathCompleter(expanduser=True).get_completions(Document(word), complete_event):
        yield Completion(escaped(found.text), start_position=0, display=found.display)
