"""The options that choose a conversation of the log: ``--continue`` and ``--session``."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from dgemma_mlx.cli.images import gone_line
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.parameters import prompt_option
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError


def session_names(beginning: str = "") -> list[str]:
    """Return the names, and the ids of unnamed conversations, that begin so, for the shell's completion.

    A log that cannot be read has none.
    """
    return _names(beginning, ())


def continuable_names(beginning: str = "") -> list[str]:
    """Return what ``session_names`` does, of the conversations that can be continued."""
    from dgemma_mlx.cli.log.log import CONTINUABLE

    return _names(beginning, CONTINUABLE)


def _names(beginning: str, kinds: Collection[str]) -> list[str]:
    """Return the names and ids of conversations of these kinds, or of all."""
    from dgemma_mlx.cli.log.log import Log

    try:
        found = [entry.name or entry.id for entry in Log().entries(kinds)]
    except DgemmaError:
        return []
    return [name for name in found if name.startswith(beginning)]


Continue = Annotated[
    bool, prompt_option("--continue", "--resume", "-c", help="Go on with the last conversation of chat or generate.")
]
Named = Annotated[
    str | None,
    prompt_option("--session", metavar="NAME", autocompletion=continuable_names,
                  help="Go on with the conversation of this name or id, or begin one with this name."),
]  # fmt: skip


@dataclass(frozen=True)
class ConversationOptions:
    """The options of chat and generate about the conversation."""

    last: Continue = False
    session: Named = None

    def is_given(self) -> bool:
        """Return whether one of the options is given."""
        return self.last or self.session is not None

    def check(self, **others: bool) -> None:
        """Raise `DgemmaError` (exit code 2) when an option that excludes them is given, such as ``raw=True``."""
        for name in (name for name, given in others.items() if given and self.is_given()):
            hint = "A conversation has messages, one at a time."
            raise DgemmaError(f"--{name} cannot be combined with --continue or --session", hint, exit_code=2)

    def open(self, settings: Settings) -> Session | None:
        """Return the conversation that the options choose. None without options, and for a name that is new.

        Raises `DgemmaError` when there is none to continue, or when the log is off.
        """
        if not self.is_given():
            return None
        if self.last and self.session is not None:
            raise DgemmaError("--continue and --session exclude each other", "Name the conversation once.", 2)
        if not settings["log"].value:
            hint = f"It is off by {settings['log'].origin}. Conversations are kept in the log."
            raise DgemmaError("--continue and --session need the setting log", hint, exit_code=2)
        from dgemma_mlx.cli.log.log import Log, check_continuable, check_name

        log = Log()
        id = log.last() if self.session is None else log.named(self.session)
        if id is None and self.session is None:
            raise DgemmaError("there is no conversation to continue", "`dgemma-mlx chat` begins one.")
        if id is None:
            check_name(str(self.session))
            return None
        check_continuable(log.entry(id))
        found = log.load(id)
        if (line := gone_line(found.messages)) is not None:
            print(f"dgemma-mlx: {visible(line)}", file=sys.stderr)
        return found
