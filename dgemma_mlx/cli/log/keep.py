"""Keeping answers: what the commands call when an answer is printed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.events import Done


class Keeper:
    """Stores conversations in the log, unless the setting ``log`` is off. It never raises: an answer is worth more.

    What cannot be stored is said in one line on stderr, once.
    """

    def __init__(self, settings: Settings) -> None:
        self._is_on = settings["log"].value

    def keep(self, session: Session, kind: str, answer: Mapping[str, Any] | None = None) -> None:
        """Store a conversation as ``Log.save`` does, and say when it got another id or name by that."""
        if not self._is_on:
            return
        from dgemma_mlx.cli.log.log import Log

        id, name = session.id, session.name
        try:
            Log().save(session, kind, answer)
        except DgemmaError as error:
            self._is_on = False
            print(f"dgemma-mlx: from here on nothing is kept: {error.message}\nhint: {error.hint}", file=sys.stderr)
            return
        if id is not None and session.id != id:
            named = "" if session.name is None else f", named {session.name}"
            print(f"dgemma-mlx: another program has changed conversation {id}; this one goes on as {session.id}{named}",
                  file=sys.stderr)  # fmt: skip
        elif session.name != name:
            print(f"dgemma-mlx: another conversation has the name {name}; this one is {session.name}", file=sys.stderr)

    def keep_turn(
        self, kind: str, prompt: Sequence[Mapping[str, Any]] | str, text: str, *, system: str | None,
        about: Mapping[str, Any],
    ) -> None:
        """Store a question and its answer as a conversation of their own. ``about`` is the ``answer`` of ``keep``."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(map(dict, prompt))
        session = Session([*messages, {"role": "assistant", "content": text}], system, model=about["model"])
        self.keep(session, kind, about)


def about(done: Done, model: str | None) -> dict[str, Any]:
    """Return what the log keeps about an answer besides its text."""
    return {
        "model": model, "seed": done.seed, "finish_reason": done.finish_reason, "statistics": asdict(done.statistics)
    }
