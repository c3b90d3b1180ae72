"""The slash command for the model that answers: /model."""

from __future__ import annotations

from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.command import Command, say


def _model(chat: Chat, rest: str) -> None:
    if rest:
        chat.switch(rest)
        say(f"{chat.model_name} answers from now on, {chat.context}")
        return
    found = chat.models()
    if chat.model_name not in dict(found):
        found = [(chat.model_name, "answers now"), *found]
    width = max(len(name) for name, _ in found)
    for name, about in found:
        say(f"{'*' if name == chat.model_name else ' '} {name:{width}}  {about}")
    say("/model NAME lets another model answer, and keeps the conversation")


COMMANDS = {"model": Command("[NAME]", "list models, or let another one answer", _model)}
