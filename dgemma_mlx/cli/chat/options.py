"""Slash commands for what answers are made with, and what they took: /system, /set, /show, /stats."""

from __future__ import annotations

import json
from dataclasses import asdict

from dgemma_mlx.checks import shown
from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.command import Command, say
from dgemma_mlx.cli.images import image_label
from dgemma_mlx.cli.log.session import CHANGEABLE
from dgemma_mlx.cli.settings import parse
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import counted, size

_SHORT = {"steps": "max_denoising_steps"}
_UNSET = {"seed": "random", "temp": "falls from t_max to t_min"}  # how a setting without a value is shown


def _system(chat: Chat, rest: str) -> None:
    if rest:
        chat.session.system = None if rest == "none" else rest
    say(f"system prompt: {chat.session.system or '(none)'}")


def _set(chat: Chat, rest: str) -> None:
    name, _, text = rest.partition(" ")
    name, text = _SHORT.get(name, name), text.strip()
    if name not in CHANGEABLE:
        message = f"there is no setting {shown(name)}" if name else "which setting?"
        raise DgemmaError(message, f"Settings: {', '.join(CHANGEABLE)}.")
    before = dict(chat.session.settings)
    if text in ("", "default"):
        chat.session.settings.pop(name, None)
    else:
        chat.session.settings[name] = parse(name, text, name)
    try:
        chat.check()
    except DgemmaError:
        chat.session.settings = before
        raise
    say(f"{name}: {_value(chat, name)}")


def _value(chat: Chat, name: str) -> str:
    """Return the value of a setting as JSON, or in words where it has none."""
    value = chat.value_in_force(name)
    return _UNSET.get(name, "the server's") if value is None else json.dumps(value)


def _show(chat: Chat, rest: str) -> None:
    for name in CHANGEABLE:
        say(f"{name:22} {_value(chat, name)}")
    say(f"{'system':22} {chat.session.system or '(none)'}")
    for message in chat.session.messages:
        mark = " (cancelled)" if message.get("cancelled") else ""
        content = message.get("content") or ""
        images = "".join(f"{image_label(image)}\n" for image in message.get("images", ()))
        say(f"\n[{message['role']}{mark}]\n{images}{content if isinstance(content, str) else json.dumps(content)}")
        for call in message.get("tool_calls") or ():
            say(f"tool call: {json.dumps(call, ensure_ascii=False)}")
    if chat.attachments:
        say(f"\n{counted(len(chat.attachments), 'file')} will be sent with the next message: /files")


def _stats(chat: Chat, rest: str) -> None:
    if chat.last is None:
        raise DgemmaError("nothing has been generated yet", "Write a message first.")
    for name, value in asdict(chat.last.statistics).items():
        shown = size(value) if name == "peak_memory" else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
        counts = " (after the prompt)" if name == "tokens_per_second" else ""
        say(f"{name.replace('_', ' '):20} {shown}{counts}")
    say(f"{'finish reason':20} {chat.last.finish_reason}")
    say(f"{'seed':20} {chat.last.seed}")


COMMANDS = {
    "system": Command("[TEXT|none]", "set, remove or show the system prompt", _system),
    "set": Command("NAME [VALUE]", "change a setting; without VALUE, restore its default", _set),
    "show": Command("", "show settings and conversation", _show),
    "stats": Command("", "show the statistics of the last answer", _stats),
}
