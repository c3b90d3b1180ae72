"""The slash command that copies: /copy."""

from __future__ import annotations

from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.clipboard import put
from dgemma_mlx.cli.chat.command import Command, say
from dgemma_mlx.cli.code_block import first_block
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import counted


def _copy(chat: Chat, rest: str) -> None:
    if rest not in ("", "code"):
        hint = "/copy copies the last answer, and /copy code its first code block."
        raise DgemmaError(f"/copy does not know {rest}", hint)
    answers = [message["content"] for message in chat.session.messages if message["role"] == "assistant"]
    if not answers:
        raise DgemmaError("there is no answer yet", "Write a message first.")
    text = first_block(answers[-1] or "") if rest else answers[-1]
    if not text:
        kind = "code block" if rest else "text"
        raise DgemmaError(f"the last answer has no {kind}", "/copy copies all of it." if rest else "It is a tool call.")
    place = put(text)
    say(f"{counted(len(text), 'character')} copied to {place}")


COMMANDS = {"copy": Command("[code]", "copy the last answer, or its first code block", _copy)}
