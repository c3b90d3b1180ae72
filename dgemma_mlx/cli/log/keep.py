"""Keeping answers: what the commands call when an answer is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from dgemma_mlx.cli.images import kept_image
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.events import Done, Event
    from dgemma_mlx.infill.fill import Filled


class Keeper:
    """Stores conversations in the log, unless the setting ``log`` is off. It never raises: an answer is worth more.

    What cannot be stored is said in one line on stderr, once.
    """

    def __init__(self, settings: Settings) -> None:
        self._is_on = settings["log"].value

    def keep(self, session: Session, kind: str, answer: Mapping[str, Any] | None = None) -> None:
        """Store a conversation as ``Log.save`` does, and say when it got another id or name by that.

        What was printed reaches its reader before.
        """
        with suppress(OSError):  # the reader is gone, or the disk is full, which the end of the program says
            sys.stdout.flush()
        if not self._is_on:
            return
        from dgemma_mlx.cli.log.log import Log

        log, id, name = Log(), session.id, session.name
        try:
            log.save(session, kind, answer)
            is_removed = id is not None and log.named(id) is None
        except DgemmaError as error:
            self._is_on = False
            print(f"dgemma-mlx: from here on nothing is kept: {error.message}\nhint: {error.hint}", file=sys.stderr)
            return
        if id is not None and session.id != id:
            named = "" if session.name is None else f", named {session.name}"
            if is_removed:
                problem = f"conversation {id} was removed by another program; it is kept again as"
            else:
                problem = f"another program has changed conversation {id}; this one goes on as"
            print(visible(f"dgemma-mlx: {problem} {session.id}{named}"), file=sys.stderr)
        elif session.name != name:
            changed = f"another conversation has the name {name}; this one is {session.name}"
            print(f"dgemma-mlx: {visible(changed)}", file=sys.stderr)

    def keep_answer(self, session: Session, kind: str, done: Done, model: str) -> None:
        """Add an answer to a conversation and store it. One without text and calls is not kept."""
        if _add(session, done):
            self.keep(session, kind, about(done, model))

    @contextmanager
    def keeping(
        self, session: Session, kind: str, model: str
    ) -> Iterator[Callable[[Iterable[Event]], Iterator[Event]]]:
        """Yield a function that passes on the events of an answer, and adds the answer to ``session``.

        When the block ends, by Ctrl-C as well, the conversation is kept, if there is a new answer. Answers with calls
        of tools, and the results that the block adds, may come before the last one. Where no answer follows the
        results, an empty one ends the turn, marked as cancelled; calls without a result are left out.
        """
        from dgemma_mlx.events import Done

        ends: list[Done] = []

        def watched(events: Iterable[Event]) -> Iterator[Event]:
            for event in events:
                if isinstance(event, Done) and _add(session, event):
                    ends.append(event)
                yield event

        try:
            yield watched
        finally:
            if ends:
                _end_turn(session)
                self.keep(session, kind, about(ends[-1], model))

    def keep_turn(
        self, kind: str, prompt: str, text: str, system: str | None, answer: Mapping[str, Any],
        images: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Store a question and its answer as a conversation of their own.

        ``answer`` is that of ``keep``, and ``images`` are the parts of a message's content that the question shows.
        """
        session = Session(system=system, model=answer["model"])
        session.add("user", prompt, images=[kept_image(image) for image in images])
        session.add("assistant", text)
        self.keep(session, kind, answer)


def _add(session: Session, done: Done) -> bool:
    """Add an answer to a conversation. Return False, without a change, for one without text and calls."""
    if not done.text.strip() and not done.tool_calls:
        return False
    session.add(
        "assistant", done.text, tool_calls=[asdict(call) for call in done.tool_calls], thinking=done.thinking,
        cancelled=done.finish_reason == "cancelled",
    )  # fmt: skip
    return True


def _end_turn(session: Session) -> None:
    """Let the last turn end with an answer where results of tools are its end."""
    messages = session.messages
    results = list(takewhile(lambda message: message["role"] == "tool", reversed(messages)))
    if not results:
        return
    calls = messages[-len(results) - 1].get("tool_calls") or []
    answered = {result["tool_call_id"] for result in results}
    messages[-len(results) - 1]["tool_calls"] = [call for call in calls if call["id"] in answered]
    session.add("assistant", "", cancelled=True)


def about(done: Done | Filled, model: str) -> dict[str, Any]:
    """Return what the log keeps about an answer besides its text."""
    reason = getattr(done, "finish_reason", "stop")
    return {"model": model, "seed": done.seed, "finish_reason": reason, "statistics": asdict(done.statistics)}
