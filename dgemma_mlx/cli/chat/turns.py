"""Slash commands for the turns of a conversation: /clear, /regen, /undo, /edit."""

from __future__ import annotations

from typing import Any

from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.command import Command, Outcome, can_edit, say
from dgemma_mlx.errors import DgemmaError


def _clear(chat: Chat, rest: str) -> None:
    chat.session, chat.attachments = chat.session.fresh(), []
    say("a new conversation")


def _regen(chat: Chat, rest: str) -> Outcome:
    question = _last_question(chat)
    chat.session.add("user", question["content"], images=question.get("images"))
    return Outcome(ask=True, again=True)


def _undo(chat: Chat, rest: str) -> None:
    _last_question(chat)
    say("the last turn is undone")


def _edit(chat: Chat, rest: str) -> Outcome:
    if not can_edit():
        raise DgemmaError("/edit needs a terminal that can edit", "/undo removes the last turn.")
    if not chat.session.turns:
        raise _no_turn()
    return Outcome(text=str(chat.session.messages[chat.session.questions[-1]]["content"]))


def _last_question(chat: Chat) -> dict[str, Any]:
    """Remove the last turn and return its question. Raises `DgemmaError` when there is no turn."""
    question = chat.session.pop_turn()
    if question is None:
        raise _no_turn()
    return question


def _no_turn() -> DgemmaError:
    return DgemmaError("there is no turn yet", "Write a message first.")


COMMANDS = {
    "clear": Command("", "begin a new conversation", _clear),
    "regen": Command("", "answer the last message again", _regen),
    "undo": Command("", "forget the last turn", _undo),
    "edit": Command("", "change the last message and send it again", _edit),
}
